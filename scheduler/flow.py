"""The flow of one load: its chunks from granted to placed, as the load's own thread sees it.

Chunks are read (`filling`), hashed if the load is verified (`hashing`), and handed over here; the load's thread submits
their copies, which are waited for (`copying`), and places their tensors. What these stations share is their `Course`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from weightstream.device.backend import Event
from weightstream.device.stage import DeviceStage
from weightstream.errors import LoadTimeoutError
from weightstream.prefetch.ring import Ring, Slot
from weightstream.scheduler.clock import Clock
from weightstream.scheduler.copying import Copying
from weightstream.scheduler.course import Course, Fill, Filled
from weightstream.scheduler.filling import Filling, Read
from weightstream.scheduler.hashing import Hashing
from weightstream.scheduler.ledger import Ledger, Section
from weightstream.scheduler.plan import Chunk, LoadPlan
from weightstream.scheduler.reading import Reading
from weightstream.scheduler.verification import Verification

__all__ = ["Flow", "Step"]


#: So many chunks are submitted at a time: the first is waited for, and its slot free again, only behind the last. With
#: all that there were, 64 slots were submitted in 70 ms on an H100's host, and readers had none meanwhile.
_AT_ONCE = 8


class Step(NamedTuple):
    """What the load's thread is to do next: submit the copies of filled chunks to one device, or place chunks."""

    filled: Sequence[Filled] = ()
    placed: Sequence[Chunk] = ()


class Flow:
    """See the module. For the load's own thread, except for what `stop` and `pause` say.

    Args:
        plan: what to read.
        reading: how.
        stage: where to; `buffers` is used by reader threads.
        ring: where slots come from and go back to.
        clock: time and conditions.
        ledger: kept up to date under the flow's lock; its recorder is told what becomes of chunks.
        admit: asked, in the order of the plan and without blocking, whether a chunk may be granted now.
        verification: hashes every chunk before it is handed on, if the load is verified.

    Attributes:
        filling: grants reads; for the reader pool.
        bytes_placed: how many bytes are where they belong.
        lock_wait_s: how long copies waited for their slots to be page-locked.
    """

    def __init__(
        self,
        plan: LoadPlan,
        reading: Reading,
        stage: DeviceStage,
        ring: Ring,
        clock: Clock,
        ledger: Ledger,
        admit: Callable[[Chunk], bool] | None = None,
        verification: Verification[Fill] | None = None,
    ) -> None:
        course = self._course = Course(clock, ledger)
        ledger.copies = stage.copies
        self.bytes_placed = 0
        self.lock_wait_s = 0.0
        self._hashing = None if verification is None else Hashing(course, verification)
        self.filling = Filling(course, plan, reading, stage, ring, admit=admit, hashing=self._hashing)
        self._copying = Copying(course, ring)
        self._ring = ring
        self._total_bytes = plan.total_bytes
        self._paths: Sequence[Path] = reading.paths
        self._stall_s = reading.stall_s
        self._unplaced = len(plan.chunks)
        self._unused: list[Slot] = []
        #: Whether filled chunks were submitted last: then those that are there are placed, or they would wait for as long
        #: as there are others to submit, where a copy takes its time (a cast on the CPU).
        self._submitted_last = False

    @property
    def bytes_read(self) -> int:
        """How many bytes have arrived in host memory."""
        return self._course.bytes_read

    def enter(self, section: Section) -> None:
        """Book time to a section of the load from now on; readers may be at work."""
        with self._course.condition:
            self._course.ledger.enter(section)

    def given(self, num_bytes: int) -> None:
        """Note that tensors have been placed which are views of mapped files, and are not read."""
        with self._course.condition:
            self.bytes_placed += num_bytes

    def wait_until_read(self, deadline: float | None, timeout_s: float | None) -> None:
        """Wait until every chunk has been read; meanwhile nothing is submitted or placed. There must be slots for all.

        Raises:
            LoadTimeoutError, BaseException: as in `next`.
        """
        course = self._course
        with course.condition:
            while not self.filling.is_over:
                if course.error is not None:
                    raise course.error
                course.condition.wait(self._left_s(deadline, timeout_s))

    def next(self, deadline: float | None, timeout_s: float | None) -> Step | None:
        """Wait for something to do: filled chunks to submit, or chunks to place.

        Returns:
            None when every chunk has been placed.

        Raises:
            LoadTimeoutError: the deadline, on the load's clock, has passed, or a read has not returned for too long.
            BaseException: whatever stopped the load.
        """
        course = self._course
        with course.condition:
            while True:
                if course.error is not None:
                    raise course.error
                if self._unplaced == 0:
                    return None
                left_s = self._left_s(deadline, timeout_s)  # also where there is always something to do
                if course.recorder is not None:
                    course.recorder.take_up()
                if course.filled and not (course.placed and self._submitted_last):
                    self._submitted_last = True
                    return Step(filled=self._filled())
                if course.placed:
                    self._submitted_last = False
                    placed, course.placed = course.placed, []
                    self._unplaced -= len(placed)
                    course.ledger.change(binding=1)
                    return Step(placed=placed)
                course.condition.wait(left_s)

    def wait_locked(self, filled: Filled) -> None:
        """Wait until a filled chunk's slot is page-locked, or will not be. For the load's thread."""
        settled = filled.slot.segment.settled
        if not settled.is_set():
            began_s = self._course.clock.now()
            settled.wait()
            self.lock_wait_s += self._course.clock.now() - began_s

    def _filled(self) -> list[Filled]:
        """Take the first filled chunk, and all behind it whose copies can be submitted with its own. The lock is held.

        Those for the same device, from page-locked memory: copies from other memory take their time where they are
        submitted, and between two of them the load may have to end.
        """
        waiting, taken = self._course.filled, [self._course.filled.popleft()]
        device = taken[0].chunk.transfer.device
        while waiting and len(taken) < _AT_ONCE and waiting[0].chunk.transfer.device == device:
            if not (taken[-1].slot.segment.pinned and waiting[0].slot.segment.pinned):
                break
            taken.append(waiting.popleft())
        if self._course.ledger.copies:
            self._course.ledger.change(filled=-len(taken), copying=len(taken))
        return taken

    def submitted(self, filled: Sequence[Filled], events: Sequence[Event | None]) -> None:
        """Note that the copies of filled chunks are on their way, or done: those without an event. All have one, or none."""
        course = self._course
        if not filled:
            return
        on_their_way = [(one, event) for one, event in zip(filled, events, strict=True) if event is not None]
        with course.condition:
            if on_their_way:
                try:
                    self._copying.put(on_their_way)
                except RuntimeError:  # no more threads can be had
                    for _, event in on_their_way:
                        event.synchronize()
                    course.ledger.change(copying=-len(filled))
                    self._unused += [one.slot for one in filled]
                    raise
                return
            course.placed += [one.chunk for one in filled]
            course.ledger.change(copying=-len(filled))
        self._ring.release(*(one.slot for one in filled))

    def dropped(self, filled: Sequence[Filled]) -> None:
        """Note that filled chunks go nowhere."""
        with self._course.condition:
            self._course.placed += [one.chunk for one in filled]
        self._ring.release(*(one.slot for one in filled))

    def not_submitted(self, filled: Sequence[Filled]) -> None:
        """Take chunks back whose copies could not be submitted, and of which none is under way."""
        with self._course.condition:
            self._course.ledger.change(copying=-len(filled))
            self._unused += [one.slot for one in filled]

    def bound(self, chunks: Sequence[Chunk]) -> None:
        """Note that the tensors of chunks that `next` returned have been placed."""
        course = self._course
        if course.recorder is not None and course.ledger.copies:
            course.recorder.bound(chunks)
        with course.condition:
            self.bytes_placed += sum(chunk.num_bytes for chunk in chunks)
            course.ledger.change(binding=-1)

    def stop(self, error: BaseException) -> None:
        """End the flow with an error, from any thread: `next` raises it, nothing more is granted. The first one wins."""
        self._course.stop(error)

    def pause(self, seconds: float) -> bool:
        """Wait on a reader thread, but not longer than until the flow is stopped; return whether it goes on."""
        return self._course.pause(seconds)

    def drain(self, grace_s: float, *, on_return: Callable[[], None] = lambda: None) -> int:
        """Wait until no reader and no copy of this load is at work, and give back every slot it still has.

        A read that has not returned after `grace_s` seconds is slow or hangs in the kernel: what it may write to is its own
        from then on, and goes back when it returns (see `Filling.give_up`). Where the load's time is up, it is given up
        as soon as it is that old, which one that hangs mostly is by then. Copies are waited for as long as they take: their
        source and destination must not be reused. The same holds for reads that write to parameters themselves, which are
        of what is in the page cache: only after `prefetch.stall_s` they are given up, too.

        Args:
            grace_s: how long other reads are waited for.
            on_return: called, on its thread, for each read that was given up and returns after all.

        Returns:
            The number of reads given up.
        """
        course, hashing = self._course, self._hashing
        until = course.clock.now() + grace_s
        with course.condition:
            while self.filling.reads and (left := self._left_to_read_s(until, grace_s)) > 0:
                course.condition.wait(left)
            while hashing and hashing.num_busy and (left := until - course.clock.now()) > 0:
                course.condition.wait(left)
            if hashing and hashing.num_busy:  # a page of a mapped file may never come
                hashing = None
            while self.filling.num_writing and (left := self._left_to_write_s()) > 0:
                course.condition.wait(left)
            given_up = self.filling.give_up(on_return)
            while self._copying.is_busy:
                course.condition.wait()
            unused = [*given_up.unused, *self._unused, *(filled.slot for filled in course.filled)]
            self._unused.clear()
            course.filled.clear()
            course.ledger.change(filled=-course.ledger.filled)
            course.is_drained = True
            course.condition.notify_all()
        for slot in unused:
            self._ring.release(slot)
        if hashing is not None:
            hashing.join()
        self._copying.join()
        return given_up.num_reads

    def _left_to_read_s(self, until: float, grace_s: float) -> float:
        """Return how long reads are still waited for. The lock is held."""
        if isinstance(self._course.error, LoadTimeoutError):
            until = max(read.began_s for read in self.filling.reads.values()) + grace_s
        return until - self._course.clock.now()

    def _left_to_write_s(self) -> float:
        """Return how long reads that write to parameters are still waited for. The lock is held."""
        if self._stall_s is None:
            return threading.TIMEOUT_MAX
        last_s = max((read.began_s for read in self.filling.reads.values()), default=0.0)
        return last_s + self._stall_s - self._course.clock.now()

    def check_time(self, deadline: float | None, timeout_s: float | None) -> None:
        """Raise LoadTimeoutError if the load's time is up."""
        if deadline is not None and self._course.clock.now() >= deadline:
            raise LoadTimeoutError(
                "the load took too long",
                expected=f"at most {timeout_s:g} s",
                actual=f"{self.bytes_placed} of {self._total_bytes} bytes placed",
                hint="Raise scheduler.timeout_s, or look at the report's phases for what is slow",
            )

    def _left_s(self, deadline: float | None, timeout_s: float | None) -> float | None:
        """Return after how many seconds a limit may have been passed, or raise if one has. The lock is held."""
        now = self._course.clock.now()
        limits: list[float] = []
        if deadline is not None:
            self.check_time(deadline, timeout_s)
            limits.append(deadline - now)
        if self._stall_s is not None:
            oldest = next(iter(self.filling.reads.values()), Read(0, 0, now))  # one that begins now has all of it
            limits.append(oldest.began_s + self._stall_s - now)
            if limits[-1] <= 0:
                raise LoadTimeoutError(
                    "a read does not return",
                    file=self._paths[oldest.shard],
                    expected=f"at most {self._stall_s:g} s",
                    actual=f"no answer to the read at offset {oldest.offset} for {now - oldest.began_s:.3g} s",
                    hint="It is given up, and its slot with it. Look at the file system, or raise prefetch.stall_s",
                )
            if (starved_since_s := self.filling.starved_since_s) is not None:
                limits.append(starved_since_s + self._stall_s - now)
                if limits[-1] <= 0:
                    raise LoadTimeoutError(
                        "there is no slot to read into: all are lost to reads of other loads that do not return",
                        expected=f"one within {self._stall_s:g} s",
                        hint="Look at the file system, or raise prefetch.host_memory",
                    )
        return min(limits, default=None)
