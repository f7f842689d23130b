"""The ring: the host buffers that chunks are read into before they are copied to a device.

Owns the memory and knows who holds which slot. A slot is free, or held by exactly one: the reader that fills it, then
the device stage that copies from it. It comes back only through `release`. One that somebody may still write to, nobody
knows how long, is written off (`write_off`): it is not handed out, until whoever may write to it says that this is over
(`recover`), or for ever. The ring is grown segment by segment, is kept from load to load, and is shared by all loads of
one `Loader`.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass

from weightstream.prefetch.memory import PAGE_BYTES, Budget, MemoryAccount, allocate

__all__ = ["Ring", "RingStatistics", "Segment", "Slot", "slot_bytes_for"]

#: Segments of about this size are mapped, and page-locked, one at a time, so that reading starts before all is locked.
_SEGMENT_BYTES = 64 * 2**20


def slot_bytes_for(chunk_bytes: int) -> int:
    """Return the size of a slot: a chunk, and a page at either end for what a direct read must read too much."""
    return chunk_bytes + 2 * PAGE_BYTES


class Segment:
    """One mapping of the ring. `settled` is set once it is page-locked, or once that was refused (`pinned` false).

    `wanted`: false once its ring is closed; there is no use in page-locking it any more.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.num_bytes = len(memory)
        self.pinned = False
        #: How many of its slots were written off, and may still be written to.
        self.num_lost = 0
        #: Whether its slots are on their way out, and how many of them have gone.
        self.is_retired = False
        self.num_forgotten = 0
        self.wanted = True
        self.settled = threading.Event()


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One host buffer, page-aligned. `view` belongs to whoever holds the slot."""

    segment: Segment
    offset: int
    view: memoryview


@dataclass(frozen=True, slots=True)
class RingStatistics:
    """A snapshot: numbers of slots, and bytes. `num_recovered`: how often one came back that had been written off."""

    num_slots: int
    num_free: int
    num_written_off: int
    num_recovered: int
    num_bytes: int
    pinned_bytes: int


class Ring:
    """A pool of equal slots within a ceiling. Thread-safe; no method blocks.

    Args:
        slot_bytes: size of one slot, a multiple of the page size.
        budget: the ceiling for all segments together, which other takers may share.
        account: where the ring's bytes are entered.
        on_free: told, without a lock held, how many slots have come back.
    """

    def __init__(
        self, slot_bytes: int, budget: Budget, account: MemoryAccount, on_free: Callable[[int], None] = lambda _: None
    ) -> None:
        self.slot_bytes = slot_bytes
        self._budget = budget
        self._account = account
        self._on_free = on_free
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self._free: list[Slot] = []
        self._num_slots = 0
        self._num_written_off = 0
        self._num_recovered = 0
        self._is_closed = False

    def grow(self, num_slots: int, *, numa_node: int | None = None) -> list[Segment]:
        """Map segments until the ring has `num_slots` usable slots, or there is no more; return the new ones.

        There is no more when the budget is spent, or the kernel refuses to map memory.

        New ones lie on `numa_node`, if the kernel can arrange that: copies to a device of another node are slower.
        Slots that were written off do not count as usable but still count towards the budget: their memory is held.
        """
        added: list[Segment] = []
        with self._lock:
            want = num_slots + self._num_written_off
            while self._num_slots < want:
                count = max(1, min(want - self._num_slots, _SEGMENT_BYTES // self.slot_bytes))
                while count and not self._budget.take(count * self.slot_bytes):
                    count -= 1
                if not count:
                    break
                try:
                    segment = Segment(allocate(count * self.slot_bytes, numa_node=numa_node))
                except OSError:  # the limits of the process or of the machine (RLIMIT_AS, overcommit)
                    self._budget.give(count * self.slot_bytes)
                    break
                self._account.hold(segment.num_bytes)
                whole = memoryview(segment.memory)
                for offset in range(0, segment.num_bytes, self.slot_bytes):
                    self._free.append(Slot(segment, offset, whole[offset : offset + self.slot_bytes]))
                self._segments.append(segment)
                self._num_slots += count
                added.append(segment)
        return added

    def acquire_nowait(self) -> Slot | None:
        """Take a free slot, or None. The most recently freed comes first: its memory is warm in the caches."""
        with self._lock:
            return self._free.pop() if self._free else None

    @property
    def has_free(self) -> bool:
        """Whether `acquire_nowait` would return one now."""
        with self._lock:
            return bool(self._free)

    def release(self, *slots: Slot) -> None:
        """Give slots back. Only their holder may, and only when nothing reads or writes their memory any more."""
        with self._lock:
            if self._is_closed:
                return
            for slot in slots:
                if slot.segment.is_retired:
                    self._forget(slot.segment, 1)
                else:
                    self._free.append(slot)
        self._on_free(len(slots))

    def write_off(self, slot: Slot) -> None:
        """Give up a slot whose memory somebody may still write to. It is not handed out before `recover`."""
        with self._lock:
            self._num_written_off += 1
            slot.segment.num_lost += 1

    def recover(self, slot: Slot) -> None:
        """Give back a slot that was written off. Only who may have written to it may, when he has stopped.

        It is a slot like others again. If the ring has been closed, it was all that kept its segment's memory.
        """
        with self._lock:
            slot.segment.num_lost -= 1
            self._num_written_off -= 1
            self._num_recovered += 1
            if self._is_closed and not slot.segment.num_lost:
                self._give_back(slot.segment)
        self.release(slot)  # until then it is held, as ever, by who gives it back

    def retire(self, segment: Segment) -> None:
        """Hand out no slot of a segment any more. What is held of it comes back as ever; then its memory goes."""
        with self._lock:
            segment.is_retired = True
            gone = [slot for slot in self._free if slot.segment is segment]
            self._free = [slot for slot in self._free if slot.segment is not segment]
            self._forget(segment, len(gone))

    def _forget(self, segment: Segment, num_slots: int) -> None:
        """Let go of so many slots of a retired segment, and of its memory with the last. The lock is held."""
        self._num_slots -= num_slots
        segment.num_forgotten += num_slots
        if segment.num_forgotten * self.slot_bytes == segment.num_bytes and segment in self._segments:
            self._segments.remove(segment)
            self._give_back(segment)

    def _give_back(self, segment: Segment) -> None:
        self._budget.give(segment.num_bytes)
        self._account.release(segment.num_bytes)

    def shrink(self, left_bytes: int) -> list[Segment]:
        """Forget segments whose slots are all free, until so much of the budget is left; return them, for unpinning."""
        gone: list[Segment] = []
        with self._lock:
            for segment in list(self._segments):
                free = [slot for slot in self._free if slot.segment is segment]
                enough = self._budget.left_bytes >= left_bytes
                if enough or not segment.settled.is_set() or len(free) * self.slot_bytes < segment.num_bytes:
                    continue
                self._segments.remove(segment)
                self._free = [slot for slot in self._free if slot.segment is not segment]
                self._num_slots -= len(free)
                self._give_back(segment)
                gone.append(segment)
        return gone

    def statistics(self) -> RingStatistics:
        with self._lock:
            return RingStatistics(
                num_slots=self._num_slots,
                num_free=len(self._free),
                num_written_off=self._num_written_off,
                num_recovered=self._num_recovered,
                num_bytes=sum(segment.num_bytes for segment in self._segments),
                pinned_bytes=sum(segment.num_bytes for segment in self._segments if segment.pinned),
            )

    def close(self) -> list[Segment]:
        """Forget all slots and return the segments, for unpinning. Their memory goes with the last reference.

        Those with slots that were written off are held by whoever may still write to them, and count until `recover`.
        """
        with self._lock:
            segments, self._segments, self._free = self._segments, [], []
            self._num_slots = 0
            self._is_closed = True
            for segment in segments:
                segment.wanted = False
                if not segment.num_lost:
                    self._give_back(segment)
        return segments
