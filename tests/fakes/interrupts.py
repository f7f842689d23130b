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
        again: raises it once more: so many functions later, from 0 on; None: once is enough. `again_where` says where.
    """

    def __init__(self, number: int, files: tuple[str, ...], again: int | None = None) -> None:
        self.where = self.again_where = ""
        self._left = number
        self._files = files
        self._left_again = again

    def profile(self, frame: FrameType, event: str, called: object) -> None:
        """For `sys.setprofile`."""
        is_moment = event == "c_return" or (event == "call" and frame.f_lasti <= _begin_of(frame.f_code))
        if not is_moment or not frame.f_code.co_filename.endswith(self._files):
            return
        if self._left == 0:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}, {event} {called}"
            raise KeyboardInterrupt  # which ends the profiling too
        self._left -= 1

    def trace(self, frame: FrameType, event: str, _: object) -> None:
        """For `sys.settrace`, which one exception does not end, where the first has ended the profiling."""
        if self._left_again is None or not self.where or self.again_where:
            return
        code = frame.f_code
        if not code.co_filename.endswith(self._files) or frame.f_lasti > _begin_of(code):
            return
        if self._left_again == 0:
            self.again_where = f"{code.co_filename}:{frame.f_lineno}"
            raise KeyboardInterrupt
        self._left_again -= 1


@functools.cache
def _begin_of(code: CodeType) -> int:
    """Where a function begins. A generator that goes on is said to be called, too, but not within its `try`."""
    return next(step.offset for step in dis.get_instructions(code) if step.opname == "RESUME")


@contextmanager
def interrupted(number: int, files: tuple[str, ...], again: int | None = None) -> Generator[Countdown, None, None]:
    """Interrupt what this thread does inside, once or twice; see `Countdown`. What other threads do is left alone."""
    countdown = Countdown(number, files, again)
    before, tracer = sys.getprofile(), sys.gettrace()
    sys.setprofile(countdown.profile)
    if again is not None:
        sys.settrace(countdown.trace)
    try:
        yield countdown
    finally:
        sys.setprofile(before)
        if again is not None:
            sys.settrace(tracer)
