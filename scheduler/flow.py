"""The flow of one load: its chunks from granted to placed, who may go on, and who waits.

A chunk is granted to a reader when its turn has come and there is a buffer for it; filled, it waits for the load's own
thread, which submits its copies; copied, its slot goes back to the ring and its tensors are placed. Back-pressure is
nothing but this: no free slot, no grant.

Threads and locks. `take` and the reads it returns run on reader threads, `_reclaim` on a thread of this load,
everything else on the load's own thread; `stop` on any. One condition guards all state. It is never held
while a slot is given back, because that wakes the reader pool, whose lock is taken before this one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from weightstream.device.backend import Event
from weightstream.device.stage import DeviceStage
from weightstream.errors import LoadTimeoutError
from weightstream.prefetch.readers import Thread
from weightstream.prefetch.ring import Ring, Slot
from weightstream.prefetch.source import Source
from weightstream.scheduler.clock import Clock
from weightstream.scheduler.ledger import Ledger
from weightstream.scheduler.plan import Chunk, LoadPlan

__all__ = ["Filled", "Flow"]


class Filled(NamedTuple):
    """A chunk whose bytes are in a slot, in the file's layout from `shift` on, or packed (None)."""

    chunk: Chunk
    slot: Slot
    shift: int | None


class Flow:
    """See the module.

    Args:
        plan: what to read.
        source: where from; used by reader threads.
        stage: where to; `buffers` is used by reader threads.
        ring: where slots come from and go back to.
        clock: time and conditions.
        ledger: kept up to date under this object's lock.
        admit: asked, in the order of the plan and without blocking, whether a chunk may be granted now.
    """

    def __init__(
        self,
        plan: LoadPlan,
        source: Source,
        stage: DeviceStage,
        ring: Ring,
        clock: Clock,
        ledger: Ledger,
        admit: Callable[[Chunk], bool] | None = None,
    ) -> None:
        self.bytes_read = 0
        self.bytes_placed = 0
        self._plan = plan
        self._source = source
        self._stage = stage
        self._ring = ring
        self._clock = clock
        self._ledger = ledger
        self._admit = admit
        self._condition = clock.condition()
        self._next = 0
        self._unplaced = len(plan.chunks)
        self._reads: dict[int, Slot | None] = {}
        self._filled: deque[Filled] = deque()
        self._unused: list[Slot] = []
        self._copies: deque[tuple[Filled, Event]] = deque()
        self._placed: list[Chunk] = []
        self._error: BaseException | None = None
        self._drained = False
        self._reclaimer: Thread | None = None

    # Reader threads.

    def take(self) -> Callable[[], None] | None:
        """Grant the next chunk, if its turn has come; see `prefetch.readers.ReadQueue`."""
        with self._condition:
            if self._error is not None or self._next == len(self._plan.chunks):
                return None
            chunk = self._plan.chunks[self._next]
            whole = self._source.direct
            slot: Slot | None = None
            if self._admit is not None and not self._admit(chunk):
                return None
            if whole or chunk.transfer.slot_bytes:
                slot = self._ring.acquire_nowait()
                if slot is None:
                    return None
            self._next += 1
            self._reads[chunk.index] = slot
            self._ledger.change(reading=1)
        return lambda: self._read(chunk, slot, whole=whole)

    def _read(self, chunk: Chunk, slot: Slot | None, *, whole: bool) -> None:
        error: BaseException | None = None
        shift: int | None = None
        try:
            if whole:
                assert slot is not None
                shift = self._source.read_whole(chunk.source, slot.view)
            else:
                buffers = self._stage.buffers(chunk.transfer, None if slot is None else slot.view)
                self._source.read(chunk.source, buffers)
        except BaseException as exc:  # noqa: BLE001 (whatever it is, it ends the load and not the reader thread)
            error = exc
        with self._condition:
            if chunk.index not in self._reads:  # given up by `drain`: the slot is written off, nobody waits
                return
            del self._reads[chunk.index]
            useful = error is None and self._error is None
            if error is not None:
                self._error = self._error or error
            if useful:
                self.bytes_read += chunk.num_bytes
                if slot is None:
                    self._placed.append(chunk)
                else:
                    self._filled.append(Filled(chunk, slot, shift))
            self._ledger.change(reading=-1, filled=1 if useful and slot is not None else 0)
            if slot is not None and not useful:
                self._unused.append(slot)  # `drain` gives it back: who has waited for that finds every slot free
            self._condition.notify_all()

    # The load's own thread.

    def start(self) -> None:
        """Begin to book time to the pipeline."""
        with self._condition:
            self._ledger.enter("pipeline")

    def next(self, deadline: float | None, timeout_s: float | None) -> Filled | list[Chunk] | None:
        """Wait for something to do: a filled chunk to submit, or chunks to place.

        Returns:
            None when every chunk has been placed.

        Raises:
            LoadTimeoutError: the deadline, on the load's clock, has passed.
            BaseException: whatever stopped the load.
        """
        with self._condition:
            while True:
                if self._error is not None:
                    raise self._error
                if self._filled:
                    self._ledger.change(filled=-1, copying=1)
                    return self._filled.popleft()
                if self._placed:
                    placed, self._placed = self._placed, []
                    self._unplaced -= len(placed)
                    self._ledger.change(binding=1)
                    return placed
                if self._unplaced == 0:
                    return None
                remaining = None if deadline is None else deadline - self._clock.now()
                if remaining is not None and remaining <= 0:
                    raise LoadTimeoutError(
                        "the load took too long",
                        expected=f"at most {timeout_s:g} s",
                        actual=f"{self.bytes_placed} of {self._plan.num_bytes} bytes placed",
                        hint="Raise scheduler.timeout_s, or look at the report's phases for what is slow",
                    )
                self._condition.wait(remaining)

    def submitted(self, filled: Filled, event: Event | None) -> None:
        """Note that a filled chunk's copies are on their way (or done, without an event)."""
        with self._condition:
            if event is not None:
                self._copies.append((filled, event))
                if self._reclaimer is None:
                    self._reclaimer = self._clock.spawn(self._reclaim, "weightstream-copies")
                self._condition.notify_all()
                return
            self._placed.append(filled.chunk)
            self._ledger.change(copying=-1)
        self._ring.release(filled.slot)

    def not_submitted(self, filled: Filled) -> None:
        """Take a chunk back whose copies could not be submitted, and of which none is under way."""
        with self._condition:
            self._ledger.change(copying=-1)
            self._unused.append(filled.slot)

    def bound(self, chunks: list[Chunk]) -> None:
        """Note that the tensors of chunks that `next` returned have been placed."""
        with self._condition:
            self.bytes_placed += sum(chunk.num_bytes for chunk in chunks)
            self._ledger.change(binding=-1)

    # Any thread.

    def stop(self, error: BaseException) -> None:
        """End the flow with an error: `next` raises it, and nothing more is granted. The first error wins."""
        with self._condition:
            self._error = self._error or error
            self._condition.notify_all()

    def pause(self, seconds: float) -> bool:
        """Wait on a reader thread, but not longer than until the flow is stopped; return whether it goes on."""
        until = self._clock.now() + seconds
        with self._condition:
            while self._error is None and (left := until - self._clock.now()) > 0:
                self._condition.wait(left)
            return self._error is None

    def drain(self, grace_s: float) -> int:
        """Wait until no reader and no copy of this load is at work, and give back every slot it still has.

        A read that has not returned after `grace_s` seconds hangs in the kernel: its slot is written off and its
        buffers, which it keeps alive, are never looked at again. Copies are waited for as long as they take: their
        source and destination must not be reused.

        Returns:
            The number of reads given up.
        """
        until = self._clock.now() + grace_s
        with self._condition:
            while self._reads and (left := until - self._clock.now()) > 0:
                self._condition.wait(left)
            stuck = list(self._reads.values())
            self._reads.clear()
            self._ledger.change(reading=-len(stuck))
            while self._copies:
                self._condition.wait()
            unused = [*self._unused, *(filled.slot for filled in self._filled)]
            self._unused.clear()
            self._filled.clear()
            self._ledger.change(filled=-self._ledger.filled)
            self._drained = True
            self._condition.notify_all()
        for slot in unused:
            self._ring.release(slot)
        for held in stuck:
            if held is not None:
                self._ring.write_off(held)
        if self._reclaimer is not None:
            self._reclaimer.join()
        return len(stuck)

    def _reclaim(self) -> None:
        """Wait for copies in the order in which they were submitted, on a thread of its own, and free their slots."""
        while True:
            with self._condition:
                while not self._copies and not self._drained:
                    self._condition.wait()
                if not self._copies:
                    return
                filled, event = self._copies[0]
            error: BaseException | None = None
            try:
                event.synchronize()
            except BaseException as exc:  # noqa: BLE001 (a driver's error ends the load)
                error = exc
            with self._condition:
                self._copies.popleft()
                self._ledger.change(copying=-1)
                if error is not None:
                    self._error = self._error or error
                else:
                    self._placed.append(filled.chunk)
                self._condition.notify_all()
            if error is None:
                self._ring.release(filled.slot)
            else:  # the device may still be reading from it
                self._ring.write_off(filled.slot)
