"""The plan of a load: frozen data that says what is read, in which order, and where it goes. No I/O, no device.

Tensors that lie next to each other in a shard form an *extent*; extents are cut into *chunks* that fit a slot. A small
tensor (one without a block of its own) is never cut, unless it is larger than a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from weightstream.device.layout import ALIGNMENT_BYTES, Given, Layout, Transfer, padded
from weightstream.device.placement import Place
from weightstream.prefetch.header import TensorSpec
from weightstream.prefetch.source import ByteRange

__all__ = ["Chunk", "LoadPlan", "make_plan"]

#: A chunk is closed rather than filled up with less than this much of a large tensor.
_MIN_CUT_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one read fetches, and what becomes of it."""

    index: int
    source: ByteRange
    transfer: Transfer

    @property
    def num_bytes(self) -> int:
        return self.source.end - self.source.begin


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """All chunks of a load, in the order in which they are read.

    Attributes:
        chunks: `chunks[i].index == i`.
        layout: the blocks that the chunks fill.
        num_bytes: bytes of all tensors.
        num_extents: contiguous byte ranges that the chunks were cut from.
        parts: place -> number of chunks, for places that are in more than one.
        empty: places without bytes.
        given: places whose bytes are where they belong: they are read by nobody.
        given_ranges: where these lie in the shards, in the order in which they should be brought in.
    """

    chunks: tuple[Chunk, ...]
    layout: Layout
    num_bytes: int
    num_extents: int
    parts: dict[int, int]
    empty: tuple[int, ...]
    given: tuple[int, ...] = ()
    given_ranges: tuple[ByteRange, ...] = ()


def make_plan(  # noqa: PLR0913 (sizes and switches that have nothing in common)
    specs: list[TensorSpec],
    places: list[Place],
    *,
    lands: bool,
    chunk_bytes: int,
    own_bytes: int,
    block_bytes: int,
    order: Literal["model", "file"],
    isolate_large: bool = False,
    mapped: Sequence[int] | None = None,
) -> LoadPlan:
    """Cut the wanted tensors into chunks and lay them out.

    Args:
        specs: what is wanted, sorted by shard and by `begin`.
        places: what becomes of each; parallel to `specs`.
        lands: whether the device's blocks can be read into directly.
        chunk_bytes: the most that one chunk may need of a slot.
        own_bytes: tensors of this size or more get a block of their own.
        block_bytes: size of the blocks that smaller ones share.
        order: of the chunks; by `Place.position` of the earliest tensor in each, or as they lie in the files.
        isolate_large: never put a large tensor and another into one chunk, nor tensors on either side of it into one
            block (a consumer that takes tensors one by one could otherwise wait for a chunk that waits for it).
        mapped: the sizes of the shards, if they are mapped and tensors may stay in them.
    """
    layout = Layout(
        places,
        lands=lands,
        own_bytes=own_bytes,
        block_bytes=block_bytes,
        share_across_large=not isolate_large,
        given=None if mapped is None else Given(list(mapped), [(spec.shard, spec.begin) for spec in specs]),
    )
    cutter = _Cutter(specs, layout, chunk_bytes, isolate_large=isolate_large)
    cuts = list(cutter.cut())
    parts: dict[int, int] = {}
    for cut in cuts:
        for place in {cut.first, cut.stop - 1}:
            parts[place] = parts.get(place, 0) + 1
    if order == "model":
        position_of = attrgetter("position")
        cuts.sort(key=lambda cut: min(map(position_of, places[cut.first : cut.stop])))
    chunks = tuple(
        Chunk(
            index,
            ByteRange(cut.shard, cut.begin, cut.end),
            layout.transfer(cut.first, cut.stop, cut.head, cut.end - cut.begin),
        )
        for index, cut in enumerate(cuts)
    )
    given, ranges = _given(specs, places, layout, chunk_bytes, order)
    return LoadPlan(
        chunks,
        layout,
        sum(chunk.num_bytes for chunk in chunks) + sum(specs[place].num_bytes for place in given),
        cutter.num_extents,
        {place: count for place, count in parts.items() if count > 1},
        tuple(cutter.empty),
        given,
        ranges,
    )


def _given(
    specs: list[TensorSpec], places: list[Place], layout: Layout, chunk_bytes: int, order: Literal["model", "file"]
) -> tuple[tuple[int, ...], tuple[ByteRange, ...]]:
    """Return the places that lie in mapped files, and their ranges, of about a chunk's size each."""
    if not layout.num_given:
        return (), ()
    given = tuple(filter(layout.is_given, range(len(places))))
    ranges: list[tuple[int, ByteRange]] = []
    for place in given:
        spec, position = specs[place], places[place].position
        if ranges:
            earliest, last = ranges[-1]
            if last.shard == spec.shard and last.end == spec.begin and spec.end - last.begin <= chunk_bytes:
                ranges[-1] = min(earliest, position), ByteRange(spec.shard, last.begin, spec.end)
                continue
        ranges.append((position, ByteRange(spec.shard, spec.begin, spec.end)))
    if order == "model":
        ranges.sort(key=lambda found: found[0])
    return given, tuple(wanted for _, wanted in ranges)


@dataclass(slots=True)
class _Cut:
    """Bytes `begin` to `end` of a shard: places `first` to `stop`, of which the first has `head` bytes before."""

    shard: int
    begin: int
    end: int
    first: int
    stop: int
    head: int


class _Cutter:
    def __init__(self, specs: list[TensorSpec], layout: Layout, chunk_bytes: int, *, isolate_large: bool) -> None:
        self._specs = specs
        self._layout = layout
        self._chunk_bytes = chunk_bytes
        self._isolate_large = isolate_large
        self.num_extents = 0
        self.empty: list[int] = []

    def cut(self) -> Iterator[_Cut]:  # noqa: C901, PLR0912 (one loop over all tensors, without calls)
        own_bytes, chunk_bytes = self._layout.own_bytes, self._chunk_bytes
        has_given = self._layout.num_given > 0
        current: _Cut | None = None
        used = 0
        shard = position = -1
        for index, spec in enumerate(self._specs):
            begin, end = spec.begin, spec.end
            size = end - begin
            if size == 0:
                self.empty.append(index)
                continue
            if has_given and self._layout.is_given(index):
                continue
            small = size < own_bytes
            if begin != position or spec.shard != shard:
                self.num_extents += 1
                shard = spec.shard
                if current is not None:
                    yield current
                    current = None
            position = end
            if current is not None:
                if small and used + padded(size) <= chunk_bytes:  # most tensors of most checkpoints
                    used += padded(size)
                    current.end, current.stop = end, index + 1
                    continue
                if small or self._isolate_large or chunk_bytes - used < min(size, _MIN_CUT_BYTES):
                    yield current
                    current = None
            done = 0
            while done < size:
                if current is None:
                    current = _Cut(shard, begin + done, begin + done, index, index, done)
                    used = 0
                count = min(size - done, chunk_bytes - used)
                if count < size - done:
                    count -= count % ALIGNMENT_BYTES
                done += count
                used += padded(count)
                current.end += count
                current.stop = index + 1
                if done < size or (self._isolate_large and not small):
                    yield current
                    current = None
        if current is not None:
            yield current
