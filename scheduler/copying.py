"""Copying: copies on their way to a device are waited for, in the order of their submission, and their slots freed."""

from __future__ import annotations

import functools
from collections import deque

from weightstream.device.backend import Event
from weightstream.prefetch.readers import Thread
from weightstream.prefetch.ring import Ring
from weightstream.scheduler.course import Course, Filled

__all__ = ["Copying"]


class Copying:
    """See the module. Each device has a thread of its own: those that are fast do not wait for those that are slow.

    Args:
        course: the lock, and what it guards beside this.
        ring: where slots go back to.
    """

    def __init__(self, course: Course, ring: Ring) -> None:
        self._course = course
        self._ring = ring
        self._copies: dict[int, deque[tuple[Filled, Event]]] = {}
        self._threads: list[Thread] = []

    @property
    def is_busy(self) -> bool:
        """Whether copies are on their way. The lock is held."""
        return any(self._copies.values())

    def put(self, filled: Filled, event: Event) -> None:
        """Wait for an event behind the copies of a chunk, on the device's thread. The lock is held."""
        device = filled.chunk.transfer.device
        copies = self._copies.get(device)
        if copies is None:
            copies = self._copies[device] = deque()
            wait = functools.partial(self._run, copies)
            self._threads.append(self._course.clock.spawn(wait, f"weightstream-copies-{device}"))
        copies.append((filled, event))
        self._course.condition.notify_all()

    def join(self) -> None:
        """Wait until the threads have ended, which they do once the course is drained."""
        for thread in self._threads:
            thread.join()

    def _run(self, copies: deque[tuple[Filled, Event]]) -> None:
        course = self._course
        while True:
            with course.condition:
                while not copies and not course.is_drained:
                    course.condition.wait()
                if not copies:
                    return
                filled, event = copies[0]
            error: BaseException | None = None
            try:
                event.synchronize()
            except BaseException as exc:  # noqa: BLE001 (a driver's error ends the load)
                error = exc
            if error is None and course.recorder is not None:
                course.recorder.copied(filled.chunk)
            with course.condition:
                copies.popleft()
                course.ledger.change(copying=-1)
                course.fail(error)
                if error is None:
                    course.placed.append(filled.chunk)
                course.condition.notify_all()
            if error is None:
                self._ring.release(filled.slot)
            else:  # the device may still be reading from it
                self._ring.write_off(filled.slot)
