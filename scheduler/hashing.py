"""Hashing: the threads on which one load's chunks are hashed, before they are handed on."""

from __future__ import annotations

from weightstream.errors import IntegrityError
from weightstream.prefetch.readers import Thread
from weightstream.scheduler.course import Course, Fill
from weightstream.scheduler.verification import Part, Verification

__all__ = ["Hashing"]


class Hashing:
    """See the module. A chunk that is being hashed is still one that is filled, which gives its slot back if need be.

    Args:
        course: the lock, and what it guards beside this.
        verification: what hashes and compares; guarded by the lock.

    Attributes:
        num_busy: how many threads are hashing. When the load fails, they must be waited for.
    """

    def __init__(self, course: Course, verification: Verification[Fill]) -> None:
        self.num_busy = 0
        self._course = course
        self._verification = verification
        self._threads: list[Thread] = []
        course.ledger.verifies()

    def put(self, fill: Fill, buffers: list[memoryview]) -> None:
        """Have a chunk hashed when its turn has come, in the memory that it is in. The lock is held."""
        self._verification.put(Part(fill.chunk.source, buffers, fill))
        self._course.ledger.change(unhashed=1)
        while len(self._threads) < self._verification.num_threads:
            name = f"weightstream-hash-{len(self._threads)}"
            self._threads.append(self._course.clock.spawn(self._run, name))
        self._course.condition.notify_all()

    def join(self) -> None:
        """Wait until the threads have ended, which they do once the course is drained or has failed."""
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        course = self._course
        while (part := self._next_part()) is not None:
            began_s = course.clock.now()
            error: BaseException | None = None
            try:
                self._verification.hash(part, lambda: course.error is None)
            except BaseException as exc:  # noqa: BLE001 (whatever it is, it ends the load)
                error = exc
            if error is None and course.recorder is not None:
                course.recorder.hashed(part.item.chunk, began_s)
            with course.condition:
                self.num_busy -= 1
                course.ledger.change(hashing=-1)
                course.fail(error)
                self._finish(part, course.clock.now() - began_s)
                course.condition.notify_all()
            del part  # it holds buffers that must not outlive the load

    def _next_part(self) -> Part[Fill] | None:
        """Wait for something to hash; None: for the end."""
        course = self._course
        with course.condition:
            while course.error is None:
                part = self._verification.take()
                if part is not None:
                    self.num_busy += 1
                    course.ledger.change(unhashed=-1, hashing=1)
                    return part
                if course.is_drained:
                    return None
                course.condition.wait()
            return None

    def _finish(self, part: Part[Fill], seconds: float) -> None:
        course = self._course
        if course.error is not None:
            return
        try:
            self._verification.finish(part, seconds)
        except IntegrityError as error:
            course.fail(error)
            return
        course.ledger.change(filled=course.hand_over(part.item))
