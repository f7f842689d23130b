"""Stragglers: loads that have ended although something of theirs has not returned from the file system, and may yet."""

from __future__ import annotations

from weightstream.scheduler.clock import Clock

__all__ = ["Stragglers"]


class Stragglers:
    """See the module. Thread-safe; its lock is the last one that is taken.

    Args:
        clock: time and conditions.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._condition = clock.condition()
        self._loads: set[object] = set()
        self._is_in_haste = False

    def add(self, load: object) -> None:
        """Note that a load has ended before all that it has begun."""
        with self._condition:
            self._loads.add(load)

    def discard(self, load: object) -> None:
        """Note that nothing of a load is left, if it was a straggler."""
        with self._condition:
            self._loads.discard(load)
            self._condition.notify_all()

    def wait(self, grace_s: float) -> int:
        """Wait until none is left, or for so long; return how many are left."""
        until = self._clock.now() + grace_s
        with self._condition:
            while self._loads and not self._is_in_haste and (left_s := until - self._clock.now()) > 0:
                self._condition.wait(left_s)
            return len(self._loads)

    def hurry(self) -> None:
        """Have `wait` return at once, now and later."""
        with self._condition:
            self._is_in_haste = True
            self._condition.notify_all()
