"""Filling: chunks are granted to readers, in the order of the plan, and read, in as many parts as the tuner says.

A chunk is granted when its turn has come and there is a buffer for it. Back-pressure is nothing but this: no free slot,
no grant. `Filling.take` and the reads that it returns run on reader threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from weightstream.device.stage import DeviceStage
from weightstream.prefetch import overdue
from weightstream.prefetch.memory import PAGE_BYTES
from weightstream.prefetch.ring import Ring, Slot
from weightstream.prefetch.source import ByteRange
from weightstream.scheduler.course import Course, Fill
from weightstream.scheduler.fetching import Fetching
from weightstream.scheduler.hashing import Hashing
from weightstream.scheduler.plan import Chunk, LoadPlan
from weightstream.scheduler.reading import Reading

__all__ = ["Filling", "GivenUp", "Read"]


class Read(NamedTuple):
    """A read in progress: of which shard, from where on, and since when. `lands`: its bytes are being copied already."""

    shard: int
    offset: int
    began_s: float
    lands: bool = False


class GivenUp(NamedTuple):
    """What `Filling.give_up` found: how many reads are stuck, and the slots that no read writes to."""

    num_reads: int
    unused: list[Slot]


class Filling:
    """See the module. What has no underscore is called with the lock held, except for `take` and `has_part`.

    Args:
        course: the lock, and what it guards beside this.
        plan: what to read.
        reading: how.
        stage: where to; `buffers` is used by reader threads.
        ring: where slots come from, and those go back to that are only read through.
        admit: asked, in the order of the plan and without blocking, whether a chunk may be granted now.
        hashing: hashes what has been read, if the load is verified.

    Attributes:
        reads: those in progress, in the order in which they began.
        num_copies: how many parts of chunks readers have copied from slots.
        cached_read_s: seconds that readers spent on what was in the page cache, added up.
        storage_read_s: seconds that they spent on the rest.
        storage_cpu_s: of these, processor time, except of reads that are copied from a slot.
    """

    def __init__(
        self,
        course: Course,
        plan: LoadPlan,
        reading: Reading,
        stage: DeviceStage,
        ring: Ring,
        *,
        admit: Callable[[Chunk], bool] | None,
        hashing: Hashing | None,
    ) -> None:
        self.reads: dict[object, Read] = {}
        self.num_copies = 0
        self.cached_read_s = 0.0
        self.storage_read_s = 0.0
        self.storage_cpu_s = 0.0
        self._course = course
        self._plan = plan
        self._source, self._tuner = reading.source, reading.tuner
        self._resident, self._passes = reading.resident, reading.passes
        self._widen = reading.widen
        self._fetching = Fetching(course, reading, stage)
        self._stage = stage
        self._ring = ring
        self._admit = admit
        self._hashing = hashing
        self._next = 0
        self._next_part_of: Fill | None = None
        self._on_return: Callable[[], None] = lambda: None
        self._waits_since_s: float | None = None

    @property
    def starved_since_s(self) -> float | None:
        """Since when a chunk has waited for a slot although every slot there is has been written off; None: it has not.

        Another load may have lost them. While one of them is only held, by whomever, this one is not starved.
        """
        if self._waits_since_s is None:
            return None
        found = self._ring.statistics()
        return self._waits_since_s if found.num_written_off == found.num_slots else None

    @property
    def num_writing(self) -> int:
        """How many readers are writing to memory of the model's, or copying from a slot."""
        return len(self._fetching.writes)

    @property
    def is_over(self) -> bool:
        """Whether every chunk has been read and let go."""
        return self._next == len(self._plan.chunks) and not self._course.fills

    @property
    def has_part(self) -> bool:
        """Whether a chunk is being read of which a part has not been granted; see `prefetch.readers.ReadQueue`."""
        return self._next_part_of is not None

    def take(self) -> Callable[[], None] | None:
        """Grant the next part of a chunk, if its turn has come; see `prefetch.readers.ReadQueue`."""
        course = self._course
        with course.condition:
            if course.error is not None or len(self.reads) >= self._tuner.setting.workers:
                return None
            fill = self._next_part_of or self._open_next()
            if fill is None:
                return None
            begin, end = fill.position, self._end_of_part(fill)
            fill.position = end
            fill.num_reading += 1
            self._next_part_of = fill if end < fill.chunk.source.end else None
            read = object()
            part = ByteRange(fill.chunk.source.shard, begin, end)
            self.reads[read] = Read(part.shard, begin, course.clock.now())
            course.ledger.change(reading=1)
            course.ledger.starved = self._are_others_starved()
            number = self._tuner.begin() if fill.tuned else None
        return lambda: self._read(read, fill, part, number)

    def give_up(self, on_return: Callable[[], None]) -> GivenUp:
        """Wait for no read any more; `on_return` is called, on its thread, for each that returns after all.

        What a read that is given up may still write to is its own from here on: its slot is written off, and its blocks
        live as long as the views that it holds. Once it has returned it writes no more, because it is synchronous, and
        its thread, the only one that knows this, gives the slot back (`_come_back`). Why that is safe at any moment:

        - *It returns while the load is drained.* The lock decides. Before this method it is an ordinary read; after it
          the slot has been written off already, under the same lock, so it cannot come back before that. (The ring's
          lock is taken after this one, here and in `take`; only `release`, which wakes readers, must not be.)
        - *Other parts of its chunk are still stuck.* The slot goes back with the last of them.
        - *The ring is closed, or its segment retired, before it returns.* The views keep the mapping; page-locking may
          be undone under a read, which then writes to ordinary memory. `Ring.recover` takes the segment off the
          accounts, and hands nothing out.
        - *A new load is counting slots.* It sees this one written off, or held, or free. If it made others instead, the
          ring has one more than it needs, within its budget. If it waits for one, giving it back wakes its readers.
        - *The process is forked.* The child has the memory and not the thread: there, the slot stays written off.
        - *It was read into a block of an adopted parameter.* No slot is involved. The parameter is on meta again, the
          block is nobody's but the read's, and is unmapped with the last view of it.
        - *It was read into a slot on its way to a block, or to a parameter.* It does not copy any more: see `Fetching._writing`.
        - *It was reading into a parameter that has storage.* Such a read is waited for far longer (`Flow.drain`). Should it
          be given up in the end, the storage lives as long as its views, as a block does, and is `overdue`: no load writes
          to it until then.
        """
        self._on_return = on_return
        for write, buffers in self._fetching.writes.items():
            overdue.expect(write, buffers)
        found = GivenUp(len(self.reads), [])
        for fill in self._course.fills.values():  # a chunk of which no part is being read has its slot to give back
            fill.given_up = fill.num_reading > 0
            if fill.slot is None:
                continue
            if fill.given_up:
                self._ring.write_off(fill.slot)
            else:
                found.unused.append(fill.slot)
        self._course.fills.clear()
        self.reads.clear()
        ledger = self._course.ledger
        ledger.change(reading=-ledger.reading, landing=-ledger.landing)
        return found

    def _are_others_starved(self) -> bool:
        """Say whether readers that found no slot still have nothing to do, now that one of them has."""
        return (
            self._course.ledger.starved
            and len(self.reads) < self._tuner.setting.workers
            and not self.has_part
            and self._next < len(self._plan.chunks)
            and not self._ring.has_free
        )

    def _open_next(self) -> Fill | None:
        if self._next == len(self._plan.chunks):
            return None
        chunk = self._plan.chunks[self._next]
        if self._admit is not None and not self._admit(chunk):
            return None
        tuned = not self._resident[chunk.index]
        direct = tuned and self._tuner.setting.direct and self._source.has_direct(chunk.source.shard)
        passes = self._passes[chunk.index]
        slot: Slot | None = None
        if direct or passes or chunk.transfer.slot_bytes:
            slot = self._ring.acquire_nowait()
            if slot is None:
                if self._waits_since_s is None:
                    self._waits_since_s = self._course.clock.now()
                if not self._course.ledger.starved:
                    self._course.ledger.change()
                    self._course.ledger.starved = True
                return None
        self._waits_since_s = None
        self._next += 1
        bounces = passes or (direct and not chunk.transfer.slot_bytes and self._stage.lands(chunk.transfer))
        fill = Fill(chunk, slot, direct, tuned, bounces, chunk.source.begin, chunk.num_bytes)
        self._course.fills[chunk.index] = fill
        return fill

    def _end_of_part(self, fill: Fill) -> int:
        """Return where the next part ends: on a page, so that no two direct reads write to the same one."""
        end = fill.chunk.source.end
        if not fill.tuned:
            return end
        read_bytes = self._tuner.setting.read_bytes
        cut = (fill.position + read_bytes) // PAGE_BYTES * PAGE_BYTES
        return cut if end - cut >= read_bytes // 4 else end

    def _read(self, read: object, fill: Fill, part: ByteRange, number: int | None) -> None:
        course = self._course
        error: BaseException | None = None
        began_s = course.clock.now()
        copy_s: float | None = None
        cpu_s = time.thread_time()
        try:
            copy_s = self._fetching.fetch(fill, part, lambda: self._lands(read))
        except BaseException as exc:  # noqa: BLE001 (whatever it is, it ends the load and not the reader thread)
            error = exc
        ended_s = course.clock.now()
        cpu_s = time.thread_time() - cpu_s
        if error is None:
            self._note_part(fill, part.end - part.begin, began_s, copy_s, ended_s, cpu_s)
        with course.condition:
            given_up = fill.given_up  # it may be at any moment after this, for the sake of other parts
            workers = None if given_up else self._finish(read, fill, part, error, number, ended_s - began_s)
        if given_up:
            self._come_back(fill)
        elif workers is not None:
            self._widen(workers)

    def _lands(self, read: object) -> None:
        """Count a read that has ended, and whose bytes are now copied, as a copy until it is off the list. The lock is held.

        It is on the list: reads are given up only once the course has an error.
        """
        self.reads[read] = self.reads[read]._replace(lands=True)
        self._course.ledger.change(reading=-1, landing=1)

    def _finish(
        self,
        read: object,
        fill: Fill,
        part: ByteRange,
        error: BaseException | None,
        number: int | None,
        seconds: float,
    ) -> int | None:
        """Take a read off the list, and its chunk on; return how many readers there should be, if that has changed."""
        course, num_bytes = self._course, part.end - part.begin
        busy = len(self.reads) >= self._tuner.setting.workers
        lands = self.reads.pop(read).lands
        fill.num_reading -= 1
        course.fail(error)
        num_filled = 0
        if course.error is None:
            course.bytes_read += num_bytes
            self.num_copies += lands
            if fill.num_reading == fill.left_bytes == 0:
                num_filled = self._complete(fill)
        course.ledger.change(reading=lands - 1, landing=-lands, filled=num_filled)
        if course.error is not None or not fill.num_reading:
            course.condition.notify_all()
        if not fill.tuned or course.error is not None:
            return None
        if fill.direct and not self._source.has_direct(part.shard):
            self._tuner.refuse_direct()
            return None
        has_changed = self._tuner.end(number, num_bytes, seconds, busy=busy)
        return self._tuner.setting.workers if has_changed else None

    def _complete(self, fill: Fill) -> int:
        """Pass a chunk on whose last part has been read; return how many more can be copied now. The lock is held."""
        if self._hashing is None:
            return self._course.hand_over(fill)
        try:
            self._hashing.put(fill, self._fetching.buffers_of(fill))
        except RuntimeError as error:  # no more threads can be had
            self._course.fail(error)
        return 0

    def _come_back(self, fill: Fill) -> None:
        """Give back what belongs to a read alone that was given up and has returned; see `give_up`."""
        with self._course.condition:
            fill.num_reading -= 1
            slot = None if fill.num_reading else fill.slot
        if slot is not None:
            self._ring.recover(slot)
        self._on_return()

    def _note_part(
        self, fill: Fill, num_bytes: int, began_s: float, copy_s: float | None, ended_s: float, cpu_s: float
    ) -> None:
        """Note that a part is there; with the last one, give back a slot that was only read through.

        Before the chunk is handed over: who has waited for the load finds every slot free. Without the lock, see `Course`.
        """
        course = self._course
        if course.recorder is not None:
            course.recorder.read(fill.chunk, began_s, ended_s if copy_s is None else copy_s, ended_s, num_bytes)
        with course.condition:
            read_s = (ended_s if copy_s is None else copy_s) - began_s
            if fill.tuned:
                self.storage_read_s += read_s
                self.storage_cpu_s += cpu_s if copy_s is None else 0.0
            else:
                self.cached_read_s += read_s
            fill.left_bytes -= num_bytes
            slot = fill.slot if fill.bounces and not fill.left_bytes and not fill.given_up else None
            if slot is not None:
                fill.slot = None
        if slot is not None:
            self._ring.release(slot)
