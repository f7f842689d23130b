"""Fetching: reader threads bring parts of chunks to where these belong: a slot, a block, or a parameter's own storage."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from weightstream.device.stage import DeviceStage
from weightstream.errors import LoadCancelledError
from weightstream.prefetch import overdue
from weightstream.prefetch.mapping import populate
from weightstream.prefetch.memory import PAGE_BYTES, copy_out
from weightstream.prefetch.source import ByteRange
from weightstream.scheduler.course import Course, Fill
from weightstream.scheduler.reading import Reading

__all__ = ["Fetching"]


class Fetching:
    """See the module. `fetch` is called on reader threads, without the lock.

    Args:
        course: the lock, and whether the load has been stopped.
        reading: how to read.
        stage: whose `buffers` say where to.

    Attributes:
        writes: to what readers are writing that is memory of the model's, or that they copy to from a slot. Guarded by
            the lock.
    """

    def __init__(self, course: Course, reading: Reading, stage: DeviceStage) -> None:
        self.writes: dict[object, list[memoryview]] = {}
        self._course = course
        self._source, self._eviction = reading.source, reading.eviction
        self._stage = stage

    def fetch(self, fill: Fill, part: ByteRange, on_copy: Callable[[], None]) -> float | None:
        """Read a part of a chunk; return since when it was copied from the slot, if it was.

        Args:
            fill: the chunk.
            part: what of it.
            on_copy: called, with the lock held, when it has been read and is about to be copied.
        """
        whole, transfer = fill.chunk.source, fill.chunk.transfer
        begin, end = part.begin - whole.begin, part.end - whole.begin
        if fill.shift is None:
            view = None if fill.slot is None else fill.slot.view
            if transfer.in_place:
                with self._writing() as buffers:
                    buffers.extend(self._stage.buffers(transfer, view, begin, end))
                    self._read_through_cache(fill, part, buffers)
            else:
                self._read_through_cache(fill, part, self._stage.buffers(transfer, view, begin, end))
            return None
        assert fill.slot is not None
        pages = fill.slot.view[part.begin // PAGE_BYTES * PAGE_BYTES - whole.begin // PAGE_BYTES * PAGE_BYTES :]
        wanted = pages[part.begin % PAGE_BYTES :][: part.end - part.begin]
        if fill.direct:
            self._source.read_direct(part, pages)
        else:
            self._read_through_cache(fill, part, [wanted])
        if not fill.bounces:
            return None
        copy_s = self._course.clock.now()
        with self._writing(on_copy) as buffers:
            buffers.extend(self._stage.buffers(transfer, None, begin, end))
            copy_out(wanted, buffers)
        return copy_s

    def _read_through_cache(self, fill: Fill, part: ByteRange, buffers: list[memoryview]) -> None:
        if fill.chunk.is_mapped:
            for buffer in buffers:
                populate(buffer)
            return
        self._source.read(part, buffers)
        if fill.tuned and self._eviction is not None:
            self._eviction.forget(part)

    def buffers_of(self, fill: Fill) -> list[memoryview]:
        """Return the memory that the bytes of a chunk are in, once all of them are."""
        if fill.direct and not fill.bounces:
            assert fill.slot is not None
            assert fill.shift is not None
            return [fill.slot.view[fill.shift : fill.shift + fill.chunk.num_bytes]]
        view = None if fill.slot is None else fill.slot.view
        return self._stage.buffers(fill.chunk.transfer, view, 0, fill.chunk.num_bytes)

    @contextmanager
    def _writing(self, on_begin: Callable[[], None] | None = None) -> Generator[list[memoryview], None, None]:
        """Let a reader write to memory that is not a slot's; or raise, because the load has been stopped.

        The drain waits for those that have begun, so nothing is written to the model after the load has ended.

        Args:
            on_begin: called, with the lock held, if it may.

        Yields:
            A list for the memory.
        """
        course = self._course
        with course.condition:
            if course.error is not None:
                raise LoadCancelledError("the load was stopped before this was written")
            write = object()
            buffers = self.writes[write] = []
            if on_begin is not None:
                on_begin()
        try:
            yield buffers
        finally:
            with course.condition:
                del self.writes[write]
                overdue.is_over(write)
                if course.error is not None:
                    course.condition.notify_all()
