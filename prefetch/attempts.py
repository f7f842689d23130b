"""Attempts: what the operating system refuses for a moment is asked for again, a few times, with growing pauses."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from weightstream.errors import ReadError
from weightstream.ranks import ranked_logger

__all__ = ["ONCE", "Attempts", "refused", "sleeping", "tried"]

logger = ranked_logger(__name__)

T = TypeVar("T")

_TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT})

#: Pauses double from the first, less or more by half so that many readers do not come back at once. The longest keeps
#: `prefetch.retries: 100` from meaning years. Neither is measured.
_FIRST_PAUSE_S = 0.04
_LONGEST_PAUSE_S = 2.0


def refused(
    what: str, error: OSError, *, file: object, offset: int | None = None, hint: str | None = None
) -> ReadError:
    """Return the error for what the operating system refused to do with a file: `what`, at `offset` if it was a read."""
    where = "" if offset is None else f" at offset {offset}"
    return ReadError(f"cannot {what}{where}: {error.strerror} (errno {error.errno})", file=file, hint=hint)


def tried(error: ReadError, num_retries: int) -> ReadError:
    """Have an error that is final say how often it was tried again."""
    error.what += f", after {num_retries} retries"
    return error


class Attempts:
    """Decides whether something is tried once more. Thread-safe where what it calls is.

    Args:
        num_retries: how often.
        pause: waits for so many seconds and returns whether to go on (false: the load was stopped).
        on_retry: told of each.
        on_begin: told of the file that is about to be looked at.
    """

    def __init__(
        self,
        num_retries: int,
        *,
        pause: Callable[[float], bool],
        on_retry: Callable[[], None],
        on_begin: Callable[[object], None] = lambda _: None,
    ) -> None:
        self._num_retries = num_retries
        self._pause = pause
        self._on_retry = on_retry
        self._on_begin = on_begin

    def once_more(self, error: OSError, number: int, what: object) -> bool:
        """Say whether to try again after `number` retries have failed, the last one with `error`; wait before that."""
        if error.errno not in _TRANSIENT or number >= self._num_retries:
            return False
        logger.debug("%s: %s, retry %d", what, error, number + 1)
        self._on_retry()
        pause_s = min(_FIRST_PAUSE_S * 2**number, _LONGEST_PAUSE_S)
        return self._pause(pause_s * random.uniform(0.5, 1.5))  # noqa: S311 (jitter, not a secret)

    def call(self, action: Callable[[], T], file: object) -> T:
        """Call what looks at a file and raises ReadError `from` the OSError that it met (see `refused`); return its result.

        It starts from the beginning each time, so a descriptor that has become stale is opened anew.
        """
        number = 0
        while True:
            self._on_begin(file)
            try:
                return action()
            except ReadError as error:
                if not isinstance(error.__cause__, OSError):
                    raise
                if not self.once_more(error.__cause__, number, file):
                    raise tried(error, number)  # noqa: B904 (it has its cause)
            number += 1


def sleeping(num_retries: int, *, on_retry: Callable[[], None] = lambda: None) -> Attempts:
    """Make attempts that simply sleep: for whoever looks at a checkpoint outside of a load, and can be left behind."""

    def pause(seconds: float) -> bool:
        time.sleep(seconds)
        return True

    return Attempts(num_retries, pause=pause, on_retry=on_retry)


#: No second attempt: for whoever looks at a checkpoint outside of a load.
ONCE = Attempts(0, pause=lambda _: True, on_retry=lambda: None)
