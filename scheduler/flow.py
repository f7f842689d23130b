"""The flow of one load: its chunks from granted to placed, who may go on, and who waits.

A chunk is granted to readers when its turn has come and there is a buffer for it; they read it in as many parts as the
tuner says. If the load is verified, it is then hashed, in its turn. Filled, it waits for the load's own thread, which submits its copies; copied, its slot goes back to the ring
and its tensors are placed. Back-pressure is nothing but this: no free slot, no grant.

Threads and locks. `take` and the reads it returns run on reader threads, `_reclaim` on a thread of this load per device,
`_hash` on others, everything else on the load's own thread; `stop` on any. One condition guards all state. It is never held
while a slot is given back, because that wakes the reader pool, whose lock is taken before this one.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from weightstream.device.backend import Event
from weightstream.device.stage import DeviceStage
from weightstream.errors import IntegrityError, LoadTimeoutError
from weightstream.prefetch.mapping import populate
from weightstream.prefetch.memory import PAGE_BYTES, copy_out
from weightstream.prefetch.readers import Thread
from weightstream.prefetch.ring import Ring, Slot
from weightstream.prefetch.source import ByteRange
from weightstream.scheduler.clock import Clock
from weightstream.scheduler.ledger import Ledger, Section
from weightstream.scheduler.plan import Chunk, LoadPlan
from weightstream.scheduler.reading import Reading
from weightstream.scheduler.verification import Part, Verification

__all__ = ["Filled", "Flow"]


class Filled(NamedTuple):
    """A chunk whose bytes are in a slot, in the file's layout from `shift` on, or packed (None)."""

    chunk: Chunk
    slot: Slot
    shift: int | None


@dataclass(slots=True, eq=False)
class _Fill:
    """A chunk that is being read: everything before `position` in its file has been given to readers.

    `tuned`: read in parts and measured, as the tuner says; else from the page cache, which is as fast as it is.
    `bounces`: read directly into the slot and copied at once, by the reader, to where the bytes belong in host memory.
    """

    chunk: Chunk
    slot: Slot | None
    direct: bool
    tuned: bool
    bounces: bool
    position: int
    left_bytes: int
    num_reading: int = 0
    given_up: bool = False


class Flow:
    """See the module.

    Args:
        plan: what to read.
        reading: how.
        stage: where to; `buffers` is used by reader threads.
        ring: where slots come from and go back to.
        clock: time and conditions.
        ledger: kept up to date under this object's lock; its recorder is told what becomes of chunks.
        admit: asked, in the order of the plan and without blocking, whether a chunk may be granted now.
        verification: hashes every chunk before it is handed on, if the load is verified; guarded by this object's lock.
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
        verification: Verification[_Fill] | None = None,
    ) -> None:
        self.bytes_read = 0
        self.bytes_placed = 0
        self._plan = plan
        self._source, self._tuner = reading.source, reading.tuner
        self._resident, self._widen = reading.resident, reading.widen
        self._eviction = reading.eviction
        self._paths, self._stall_s = reading.paths, reading.stall_s
        self._stage = stage
        self._ring = ring
        self._clock = clock
        self._ledger = ledger
        self._recorder = ledger.recorder
        self._admit = admit
        self._verification = verification
        if verification is not None:
            ledger.verifies()
        self._condition = clock.condition()
        self._next = 0
        self._unplaced = len(plan.chunks)
        self._fills: dict[int, _Fill] = {}
        self._next_part_of: _Fill | None = None
        #: Reads in progress, in the order in which they began: the shard, where, and since when.
        self._reads: dict[object, tuple[int, int, float]] = {}
        self._filled: deque[Filled] = deque()
        self._unused: list[Slot] = []
        #: By device: those that are fast do not wait for those that are slow.
        self._copies: dict[int, deque[tuple[Filled, Event]]] = {}
        self._placed: list[Chunk] = []
        self._error: BaseException | None = None
        self._drained = False
        self._on_return: Callable[[], None] = lambda: None
        self._reclaimers: list[Thread] = []
        self._num_hashing = 0
        self._hashers: list[Thread] = []

    # Reader threads.

    def take(self) -> Callable[[], None] | None:
        """Grant the next part of a chunk, if its turn has come; see `prefetch.readers.ReadQueue`."""
        with self._condition:
            if self._error is not None or len(self._reads) >= self._tuner.setting.workers:
                return None
            fill = self._next_part_of or self._open_next()
            if fill is None:
                return None
            begin, end = fill.position, self._end_of_part(fill)
            fill.position = end
            fill.num_reading += 1
            self._next_part_of = fill if end < fill.chunk.source.end else None
            read = object()
            self._reads[read] = fill.chunk.source.shard, begin, self._clock.now()
            self._ledger.change(reading=1)
            number = self._tuner.begin() if fill.tuned else None
        return lambda: self._read(read, fill, begin, end, number)

    def _open_next(self) -> _Fill | None:
        if self._next == len(self._plan.chunks):
            return None
        chunk = self._plan.chunks[self._next]
        if self._admit is not None and not self._admit(chunk):
            return None
        tuned = not self._resident[chunk.index]
        direct = tuned and self._tuner.setting.direct and self._source.has_direct(chunk.source.shard)
        slot: Slot | None = None
        if direct or chunk.transfer.slot_bytes:
            slot = self._ring.acquire_nowait()
            if slot is None:
                return None
        self._next += 1
        bounces = direct and not chunk.transfer.slot_bytes and self._stage.lands(chunk.transfer)
        fill = self._fills[chunk.index] = _Fill(
            chunk, slot, direct, tuned, bounces, chunk.source.begin, chunk.num_bytes
        )
        return fill

    def _end_of_part(self, fill: _Fill) -> int:
        """Return where the next part ends: on a page, so that no two direct reads write to the same one."""
        end = fill.chunk.source.end
        if not fill.tuned:
            return end
        read_bytes = self._tuner.setting.read_bytes
        cut = (fill.position + read_bytes) // PAGE_BYTES * PAGE_BYTES
        return cut if end - cut >= read_bytes // 4 else end

    def _read(self, read: object, fill: _Fill, begin: int, end: int, number: int | None) -> None:
        error: BaseException | None = None
        began_s = self._clock.now()
        copy_s: float | None = None
        try:
            copy_s = self._fetch(fill, ByteRange(fill.chunk.source.shard, begin, end))
        except BaseException as exc:  # noqa: BLE001 (whatever it is, it ends the load and not the reader thread)
            error = exc
        ended_s = self._clock.now()
        seconds = ended_s - began_s
        if error is None:
            self._note_part(fill, end - begin, began_s, copy_s, ended_s)
        with self._condition:
            if fill.given_up:
                self._come_back(fill)
                return
            busy = len(self._reads) >= self._tuner.setting.workers
            del self._reads[read]
            fill.num_reading -= 1
            self._error = self._error or error
            was_filled = len(self._filled)
            if self._error is None:
                self.bytes_read += end - begin
                if fill.num_reading == fill.left_bytes == 0:
                    self._complete(fill)
            self._ledger.change(reading=-1, filled=len(self._filled) - was_filled)
            if self._error is not None or not fill.num_reading:
                self._condition.notify_all()
            has_changed = False
            if fill.tuned and self._error is None:
                if fill.direct and not self._source.has_direct(fill.chunk.source.shard):
                    self._tuner.refuse_direct()
                else:
                    has_changed = self._tuner.end(number, end - begin, seconds, busy=busy)
            workers = self._tuner.setting.workers
        if has_changed:
            self._widen(workers)

    def _come_back(self, fill: _Fill) -> None:
        """Note that a read has returned which `drain` gave up: the slot is written off, nobody waits."""
        fill.num_reading -= 1
        if fill.slot is not None and not fill.num_reading:
            self._ring.settle(fill.slot)
        self._on_return()

    def _note_part(self, fill: _Fill, num_bytes: int, began_s: float, copy_s: float | None, ended_s: float) -> None:
        """Note that a part is there; with the last one, give back a slot that was only read through.

        Before the chunk is handed over: who has waited for the load finds every slot free. Without the lock, see above.
        """
        if self._recorder is not None:
            self._recorder.read(fill.chunk, began_s, ended_s if copy_s is None else copy_s, ended_s, num_bytes)
        with self._condition:
            fill.left_bytes -= num_bytes
            slot = fill.slot if fill.bounces and not fill.left_bytes and not fill.given_up else None
            if slot is not None:
                fill.slot = None
        if slot is not None:
            self._ring.release(slot)

    def _fetch(self, fill: _Fill, part: ByteRange) -> float | None:
        """Read a part; return since when it was copied from the slot, if it was."""
        whole = fill.chunk.source
        offset = part.begin // PAGE_BYTES * PAGE_BYTES - whole.begin // PAGE_BYTES * PAGE_BYTES
        if fill.direct:
            assert fill.slot is not None
            self._source.read_direct(part, fill.slot.view[offset:])
            if not fill.bounces:
                return None
        view = None if fill.slot is None else fill.slot.view
        buffers = self._stage.buffers(fill.chunk.transfer, view, part.begin - whole.begin, part.end - whole.begin)
        if fill.chunk.is_mapped:
            for buffer in buffers:
                populate(buffer)
            return None
        if not fill.bounces:
            self._source.read(part, buffers)
            if fill.tuned and self._eviction is not None:
                self._eviction.forget(part)
            return None
        assert view is not None
        copy_s = self._clock.now()
        copy_out(view[offset + part.begin % PAGE_BYTES :], buffers)
        return copy_s

    def _complete(self, fill: _Fill) -> None:
        """Pass a chunk whose last part has been read to those who hash it, in whatever memory it is, or on."""
        verification = self._verification
        if verification is None:
            self._hand_over(fill)
            return
        chunk, slot = fill.chunk, fill.slot
        if fill.direct and not fill.bounces:
            assert slot is not None
            shift = chunk.source.begin % PAGE_BYTES
            buffers = [slot.view[shift : shift + chunk.num_bytes]]
        else:
            view = None if slot is None else slot.view
            buffers = self._stage.buffers(chunk.transfer, view, 0, chunk.num_bytes)
        verification.put(Part(chunk.source, buffers, fill))
        self._ledger.change(unhashed=1)
        while len(self._hashers) < verification.num_threads:
            number = len(self._hashers)
            self._hashers.append(self._clock.spawn(lambda: self._hash(verification), f"weightstream-hash-{number}"))
        self._condition.notify_all()

    def _hand_over(self, fill: _Fill) -> None:
        """Pass a chunk on whose last part has been read, and hashed if need be."""
        del self._fills[fill.chunk.index]
        if fill.slot is None or fill.bounces:
            self._placed.append(fill.chunk)
        else:
            shift = fill.chunk.source.begin % PAGE_BYTES if fill.direct else None
            self._filled.append(Filled(fill.chunk, fill.slot, shift))

    # The load's own thread.

    def enter(self, section: Section) -> None:
        """Book time to a section of the load from now on; readers may be at work."""
        with self._condition:
            self._ledger.enter(section)

    def wait_until_read(self, deadline: float | None, timeout_s: float | None) -> None:
        """Wait until every chunk has been read; meanwhile nothing is submitted or placed. There must be slots for all.

        Raises:
            LoadTimeoutError, BaseException: as in `next`.
        """
        with self._condition:
            while self._next < len(self._plan.chunks) or self._fills:
                if self._error is not None:
                    raise self._error
                self._wait(deadline, timeout_s)

    def next(self, deadline: float | None, timeout_s: float | None) -> Filled | list[Chunk] | None:
        """Wait for something to do: a filled chunk to submit, or chunks to place.

        Returns:
            None when every chunk has been placed.

        Raises:
            LoadTimeoutError: the deadline, on the load's clock, has passed, or a read has not returned for too long.
            BaseException: whatever stopped the load.
        """
        with self._condition:
            while True:
                if self._error is not None:
                    raise self._error
                if self._recorder is not None:
                    self._recorder.take_up()
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
                self._wait(deadline, timeout_s)

    def _wait(self, deadline: float | None, timeout_s: float | None) -> None:
        """Wait for a change, or raise if a limit has been passed. The lock is held."""
        self._condition.wait(self._left_s(deadline, timeout_s))

    def _left_s(self, deadline: float | None, timeout_s: float | None) -> float | None:
        """Return after how many seconds a limit may have been passed, or raise if one has."""
        now = self._clock.now()
        limits: list[float] = []
        if deadline is not None:
            limits.append(deadline - now)
            if limits[-1] <= 0:
                raise LoadTimeoutError(
                    "the load took too long",
                    expected=f"at most {timeout_s:g} s",
                    actual=f"{self.bytes_placed} of {self._plan.total_bytes} bytes placed",
                    hint="Raise scheduler.timeout_s, or look at the report's phases for what is slow",
                )
        if self._stall_s is not None:
            shard, offset, began_s = next(iter(self._reads.values()), (0, 0, now))  # one that begins now has all of it
            limits.append(began_s + self._stall_s - now)
            if limits[-1] <= 0:
                raise LoadTimeoutError(
                    "a read does not return",
                    file=self._paths[shard],
                    expected=f"at most {self._stall_s:g} s",
                    actual=f"no answer to the read at offset {offset} for {now - began_s:.3g} s",
                    hint="It is given up, and its slot with it. Look at the file system, or raise prefetch.stall_s",
                )
        return min(limits, default=None)

    def submitted(self, filled: Filled, event: Event | None) -> None:
        """Note that a filled chunk's copies are on their way (or done, without an event)."""
        if self._recorder is not None:  # before the copies' thread can say that they have ended
            self._recorder.submitted(filled.chunk, is_done=event is None)
        with self._condition:
            if event is not None:
                device = filled.chunk.transfer.device
                copies = self._copies.get(device)
                if copies is None:
                    copies = self._copies[device] = deque()
                    reclaim = functools.partial(self._reclaim, copies)
                    self._reclaimers.append(self._clock.spawn(reclaim, f"weightstream-copies-{device}"))
                copies.append((filled, event))
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
        if self._recorder is not None:
            self._recorder.bound(chunks)
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

    def drain(self, grace_s: float, *, on_return: Callable[[], None] = lambda: None) -> int:
        """Wait until no reader and no copy of this load is at work, and give back every slot it still has.

        A read that has not returned after `grace_s` seconds hangs in the kernel: its slot is written off and its
        buffers, which it keeps alive, are never looked at again. Copies are waited for as long as they take: their
        source and destination must not be reused.

        Args:
            grace_s: how long reads are waited for.
            on_return: called, on its thread, for each read that was given up and returns after all.

        Returns:
            The number of reads given up.
        """
        until = self._clock.now() + grace_s
        with self._condition:
            while (self._reads or self._num_hashing) and (left := until - self._clock.now()) > 0:
                self._condition.wait(left)
            hashers = [] if self._num_hashing else self._hashers  # a page of a mapped file may never come
            num_stuck = len(self._reads)
            self._on_return = on_return
            stuck: list[Slot] = []
            for fill in self._fills.values():  # a chunk of which no part is being read has its slot to give back
                fill.given_up = fill.num_reading > 0
                if fill.slot is not None:
                    (stuck if fill.given_up else self._unused).append(fill.slot)
            self._fills.clear()
            self._reads.clear()
            self._ledger.change(reading=-num_stuck)
            while any(self._copies.values()):
                self._condition.wait()
            unused = [*self._unused, *(filled.slot for filled in self._filled)]
            self._unused.clear()
            self._filled.clear()
            self._ledger.change(filled=-self._ledger.filled)
            self._drained = True
            self._condition.notify_all()
        for slot in unused:
            self._ring.release(slot)
        for slot in stuck:
            self._ring.write_off(slot)
        for hasher in hashers:
            hasher.join()
        for reclaimer in self._reclaimers:
            reclaimer.join()
        return num_stuck

    def _hash(self, verification: Verification[_Fill]) -> None:
        """Hash chunks in the order of their bytes and hand them on, on one of several threads of their own.

        A chunk that is being hashed is still in `_fills`: when the load fails, `drain` waits for the hashing, and gives
        its slot back.
        """
        while True:
            with self._condition:
                while (part := self._next_part_to_hash(verification)) is None:
                    if self._drained or self._error is not None:
                        return
                    self._condition.wait()
            began_s = self._clock.now()
            error: BaseException | None = None
            try:
                verification.hash(part, lambda: self._error is None)
            except BaseException as exc:  # noqa: BLE001 (whatever it is, it ends the load)
                error = exc
            if error is None and self._recorder is not None:
                self._recorder.hashed(part.item.chunk, began_s)
            with self._condition:
                self._num_hashing -= 1
                self._ledger.change(hashing=-1)
                self._error = self._error or error
                self._finish_hashed(verification, part, self._clock.now() - began_s)
                self._condition.notify_all()
            del part  # it holds buffers that must not outlive the load

    def _next_part_to_hash(self, verification: Verification[_Fill]) -> Part[_Fill] | None:
        part = None if self._error is not None else verification.take()
        if part is not None:
            self._num_hashing += 1
            self._ledger.change(unhashed=-1, hashing=1)
        return part

    def _finish_hashed(self, verification: Verification[_Fill], part: Part[_Fill], seconds: float) -> None:
        if self._error is not None:
            return
        try:
            verification.finish(part, seconds)
        except IntegrityError as error:
            self._error = error
            return
        was_filled = len(self._filled)
        self._hand_over(part.item)
        self._ledger.change(filled=len(self._filled) - was_filled)

    def _reclaim(self, copies: deque[tuple[Filled, Event]]) -> None:
        """Wait for a device's copies in the order of their submission, on a thread of its own, and free their slots."""
        while True:
            with self._condition:
                while not copies and not self._drained:
                    self._condition.wait()
                if not copies:
                    return
                filled, event = copies[0]
            error: BaseException | None = None
            try:
                event.synchronize()
            except BaseException as exc:  # noqa: BLE001 (a driver's error ends the load)
                error = exc
            if error is None and self._recorder is not None:
                self._recorder.copied(filled.chunk)
            with self._condition:
                copies.popleft()
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
