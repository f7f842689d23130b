"""Ctrl-C at a chosen moment of the calling thread.

A signal's handler runs in the main thread, where the interpreter looks for signals: when a function of Python begins, and
when one of C has returned, whose result is then lost. (Also at the end of a loop's turn, which is left out here: something
is called in each turn of ours.) Which of these moments it is, a test that sends signals cannot choose. Here it can, and go
through all of them.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import CodeType, FrameType

__all__ = ["Countdown", "interrupted"]


class Countdown:
    """Raises KeyboardInterrupt at a moment of its own; `where` says which that was, once it has come.

    Args:
        number: the moment's, from 0 on.
        files: ends of the names of the files whose moments count.
    """

    def __init__(self, number: int, files: tuple[str, ...]) -> None:
        self.where = ""
        self._left = number
        self._files = files

    def profile(self, frame: FrameType, event: str, called: object) -> None:
        """For `sys.setprofile`."""
        is_moment = event == "c_return" or (event == "call" and frame.f_lasti <= _begin_of(frame.f_code))
        if not is_moment or not frame.f_code.co_filename.endswith(self._files):
            return
        if self._left == 0:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}, {event} {called}"
            raise KeyboardInterrupt  # which ends the profiling too
        self._left -= 1


@functools.cache
def _begin_of(code: CodeType) -> int:
    """Where a function begins. A generator that goes on is said to be called, too, but not within its `try`."""
    return next(step.offset for step in dis.get_instructions(code) if step.opname == "RESUME")


@contextmanager
def interrupted(number: int, files: tuple[str, ...]) -> Generator[Countdown, None, None]:
    """Interrupt what this thread does inside, once; see `Countdown`. What other threads do is left alone."""
    countdown = Countdown(number, files)
    before = sys.getprofile()
    sys.setprofile(countdown.profile)
    try:
        yield countdown
    finally:
        sys.setprofile(before)
