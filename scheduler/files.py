"""The files of one load: opened, looked at, compared and closed, each on one thread that is kept for this.

Every such call may hang for ever in a file system that has gone away. The load waits for it within its limits, and then
leaves the thread behind: should the call return after all, the thread closes what there is to close, and ends. Closing
is its work too, because that may hang as well, and because a descriptor must not be closed while a read that was given up
is still in the kernel: its number could be another file's when the read goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar, cast

from weightstream.errors import LoadTimeoutError
from weightstream.ranks import ranked_logger
from weightstream.scheduler.clock import Clock
from weightstream.scheduler.exits import FILES_GRACE_S, ended_at_exit
from weightstream.scheduler.stragglers import Stragglers

__all__ = ["GRACE_S", "Files"]

logger = ranked_logger(__name__)

T = TypeVar("T")

#: How long a load that was stopped waits for a call or a read in hand before it is given up. Not measured: an ordinary
#: read of one chunk takes milliseconds, and Ctrl-C should end a program within a second.
GRACE_S = 0.5


class Files:
    """See the module. `call` and `close` are for the load's own thread, the rest for any.

    Args:
        clock: time and threads.
        stragglers: where it is entered for as long as it is not closed although the load has ended.
        stall_s: how long one attempt at one file may take; None: for ever.
        timeout_s: how long the load may take, for the message, and `deadline`, the moment on the clock that ends it.

    Attributes:
        opened: what the thread closes in the end; filled by what is called.
    """

    def __init__(
        self,
        clock: Clock,
        stragglers: Stragglers,
        *,
        stall_s: float | None,
        timeout_s: float | None,
        deadline: float | None,
    ) -> None:
        self.opened = ExitStack()
        self._clock = clock
        self._stragglers = stragglers
        self._stall_s = stall_s
        self._timeout_s = timeout_s
        self._deadline = deadline
        self._condition = clock.condition()
        self._action: Callable[[], object] | None = None
        self._result: object = None
        self._error: BaseException | None = None
        self._file: object = None
        self._began_s = 0.0
        self._stop: BaseException | None = None
        self._stopped_s = 0.0
        self._num_readers = 0
        self._is_closing = False
        self._is_closed = False
        self._is_left_behind = False
        clock.spawn(self._run, "weightstream-files")

    def call(self, action: Callable[[], T]) -> T:
        """Have something done, and wait for it; return its result.

        Raises:
            LoadTimeoutError: it took too long, and was given up.
            BaseException: what it has raised, or what the load was stopped with.
        """
        with self._condition:
            self._action = action
            self._began_s = self._clock.now()
            self._condition.notify_all()
            while self._action is not None:
                try:
                    left_s = self._left_s()
                except BaseException:
                    self._is_left_behind = self._is_closing = True
                    raise
                self._condition.wait(left_s)
            error, self._error = self._error, None
            result, self._result = cast("T", self._result), None
        if error is not None:
            raise error
        return result

    def begin(self, file: object) -> None:
        """Note, on the thread itself, which file it turns to: time begins anew."""
        with self._condition:
            self._file = file
            self._began_s = self._clock.now()

    def pause(self, seconds: float) -> bool:
        """Wait on the thread itself, but not longer than until the load is stopped; return whether it goes on."""
        until = self._clock.now() + seconds
        with self._condition:
            while self._may_go_on() and (left_s := until - self._clock.now()) > 0:
                self._condition.wait(left_s)
            return self._may_go_on()

    def stop(self, error: BaseException) -> None:
        """Let `call` raise an error, unless what it waits for is about to return."""
        with self._condition:
            if self._stop is None:
                self._stop, self._stopped_s = error, self._clock.now()
            self._condition.notify_all()

    def keep_open(self, num_readers: int) -> None:
        """Say that reads which were given up still use the files; or, with -1 and on its thread, that one is back."""
        with self._condition:
            self._num_readers += num_readers
            self._condition.notify_all()

    def close(self) -> None:
        """Have everything closed, and wait until it is, but not for what hangs."""
        until = self._clock.now() + GRACE_S
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()
            while not self._is_closed and not self._is_left_behind and not self._num_readers:
                left_s = until - self._clock.now()
                if left_s <= 0:
                    break
                self._condition.wait(left_s)
            if not self._is_closed:
                self._stragglers.add(self)

    def _may_go_on(self) -> bool:
        return self._stop is None and not self._is_left_behind

    def _left_s(self) -> float | None:
        """Return how long the action may go on at most, or raise what ends it. The lock is held."""
        now = self._clock.now()
        limits: list[float] = []
        if self._stop is not None:
            limits.append(self._stopped_s + GRACE_S - now)
            if limits[-1] <= 0:
                raise self._stop
        for seconds, end, setting in (
            (self._timeout_s, self._deadline, "scheduler.timeout_s"),
            (self._stall_s, self._began_s + (self._stall_s or 0.0), "prefetch.stall_s"),
        ):
            if seconds is None or end is None:
                continue
            limits.append(end - now)
            if limits[-1] <= 0:
                raise LoadTimeoutError(
                    "the file system did not answer in time",
                    file=self._file,
                    expected=f"at most {seconds:g} s",
                    actual=f"no answer for {now - self._began_s:.3g} s, while the file was opened, read or compared",
                    hint=f"Look at the file system, or raise {setting}",
                )
        return min(limits, default=None)

    def _run(self) -> None:
        with ended_at_exit(self.stop, FILES_GRACE_S):
            self._serve()

    def _serve(self) -> None:
        while (action := self._next()) is not None:
            try:
                result, error = action(), None
            except BaseException as exc:  # noqa: BLE001 (it belongs to who has called)
                result, error = None, exc
            del action  # it may refer to the load
            with self._condition:
                self._action, self._result, self._error = None, result, error
                del result, error
                self._condition.notify_all()
        try:
            self.opened.close()
        except Exception:  # they are closed all the same, and were only read from: nothing is lost
            logger.warning("the file system complained when files were closed", exc_info=True)
        with self._condition:
            self._result = self._error = None
            self._is_closed = True
            self._condition.notify_all()
        self._stragglers.discard(self)

    def _next(self) -> Callable[[], object] | None:
        """Wait for something to do; None: for everything to be closed."""
        with self._condition:
            while self._action is None and not (self._is_closing and not self._num_readers):
                self._condition.wait()
            return self._action
