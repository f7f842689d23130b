"""What a load asks of the Python interpreter, for a time: no garbage collection, and quick changes between threads.

Both are settings of the process, so each is counted: it holds from the first that asks for it until the last is done,
and is then as it was before.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["no_garbage_collection", "quick_thread_switches"]

#: How long a thread may keep the interpreter while others wait for it. By default that is 5 ms, and an event loop takes
#: the interpreter twice for one tick: with a load beside it, 2.8 % of ticks of 1 ms were late by more than 10 ms, and
#: with this value 0.2 % (two cores, 46,000 tensors, 2026-11-24).
_SWITCH_INTERVAL_S = 0.0005


class _Shared:
    """A setting that several threads want at a time. `set_it` returns what sets it back."""

    def __init__(self, set_it: Callable[[], Callable[[], None]]) -> None:
        self._set_it = set_it
        self._lock = threading.Lock()
        self._holders = 0
        self._undo: Callable[[], None] = lambda: None

    @contextmanager
    def hold(self) -> Generator[None, None, None]:
        with self._lock:
            if self._holders == 0:
                self._undo = self._set_it()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._undo()


def _disable_collector() -> Callable[[], None]:
    was_enabled = gc.isenabled()
    gc.disable()
    return gc.enable if was_enabled else gc.disable


def _shorten_interval() -> Callable[[], None]:
    before = sys.getswitchinterval()
    if before <= _SWITCH_INTERVAL_S:
        return lambda: None
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    return lambda: sys.setswitchinterval(before + 1e-7)  # it is cut off to whole microseconds


_collector = _Shared(_disable_collector)
_interval = _Shared(_shorten_interval)


def no_garbage_collection() -> AbstractContextManager[None]:
    """Switch the collector off while many objects are made at once. Not for code that waits for I/O.

    Making tens of thousands of tensors lets the collector scan the whole model again and again (0.33 s a scan for
    46,000 modules), for nothing: none of the new objects is garbage.
    """
    return _collector.hold()


def quick_thread_switches() -> AbstractContextManager[None]:
    """Let other threads, above all an event loop's, have the interpreter soon while this one works in Python."""
    return _interval.hold()
