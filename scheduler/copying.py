"""Copying: copies on their way to a device are waited for, in the order of their submission, and their slots freed."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence

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

    def put(self, submitted: Sequence[tuple[Filled, Event]]) -> None:
        """Wait for events, each behind the copies of a chunk to the same device, on its thread. The lock is held."""
        device = submitted[0][0].chunk.transfer.device
        copies = self._copies.get(device)
        if copies is None:
            copies = self._copies[device] = deque()
            wait = functools.partial(self._run, copies)
            self._threads.append(self._course.clock.spawn(wait, f"weightstream-copies-{device}"))
        copies.extend(submitted)
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
                waiting = list(copies)
            done, error = self._wait(waiting)
            with course.condition:
                for _ in range(max(1, len(done))):
                    copies.popleft()
                course.ledger.change(copying=-max(1, len(done)))
                course.fail(error)
                course.placed += [filled.chunk for filled in done]
                course.condition.notify_all()
            if error is None:
                self._ring.release(*(filled.slot for filled in done))
            else:  # the device may still be reading from it
                self._ring.write_off(waiting[0][0].slot)

    def _wait(self, waiting: Sequence[tuple[Filled, Event]]) -> tuple[list[Filled], BaseException | None]:
        """Wait for the first of some copies, and return those that are done by then; or none, and its error.

        All of them at once: where copies are faster than Python, the thread would fall behind them one by one.
        """
        done: list[Filled] = []
        try:
            waiting[0][1].synchronize()
            for filled, event in waiting:
                if done and not event.query():
                    break
                done.append(filled)
                if self._course.recorder is not None:
                    self._course.recorder.copied(filled.chunk)
        except BaseException as error:  # noqa: BLE001 (a driver's error ends the load)
            if not done:
                return done, error
        return done, None
