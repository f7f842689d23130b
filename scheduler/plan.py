"""The plan of a load: frozen data that says what is read, in which order, and where it goes. No I/O, no device.

Tensors that lie next to each other in a shard and go to one device form an *extent*; extents are cut into *chunks* that fit a slot. A small
tensor (one without a block of its own) is never cut, unless it is larger than a chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, NamedTuple

from weightstream.device.layout import ALIGNMENT_BYTES, Given, Layout, Transfer, padded
from weightstream.device.placement import Place
from weightstream.device.turns import Turns
from weightstream.errors import UnsupportedFormatError
from weightstream.prefetch.header import TensorSpec
from weightstream.prefetch.source import ByteRange

__all__ = ["Chunk", "LoadPlan", "Whole", "make_plan"]

#: A chunk is closed rather than filled up with less than this much of a large tensor.
_MIN_CUT_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one read fetches, and what becomes of it. `is_mapped`: it is in memory already, as a part of a mapped file."""

    index: int
    source: ByteRange
    transfer: Transfer
    is_mapped: bool = False

    @property
    def num_bytes(self) -> int:
        return self.source.end - self.source.begin


class Whole(NamedTuple):
    """Shards are read in whole, each in the order of its bytes, because their digests are compared.

    Attributes:
        bodies: of each shard: where the bytes begin that have not been seen yet, and where they end.
        lanes: so many shards are read side by side, so that so many threads can hash. 1: one after the other, as a
            consumer in the order of the files needs it.
    """

    bodies: Sequence[tuple[int, int]]
    lanes: int


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """All chunks of a load, in the order in which they are read.

    Attributes:
        chunks: `chunks[i].index == i`.
        layout: the blocks that the chunks fill.
        num_bytes: bytes of all tensors.
        num_extents: contiguous byte ranges, each for one device and of one turn, that the chunks were cut from.
        parts: place -> number of chunks, for places that are in more than one.
        empty: places without bytes.
        given: places whose bytes are where they belong: they are read by nobody.
        given_bytes: how many bytes these have.
        given_ranges: where these lie in the shards, in the order in which they should be brought in.
        num_mapped: how many places stay in mapped files, whether they are given or, to be verified, in chunks.
        verified: shards that are read in whole, and verified.
        unwanted_bytes: how much of these no place wants.
        turns: what is read and placed turn by turn. The chunks of each lie one behind the other.
    """

    chunks: tuple[Chunk, ...]
    layout: Layout
    num_bytes: int
    num_extents: int
    parts: dict[int, int]
    empty: tuple[int, ...]
    given: tuple[int, ...] = ()
    given_bytes: int = 0
    given_ranges: tuple[ByteRange, ...] = ()
    num_mapped: int = 0
    verified: tuple[int, ...] = ()
    unwanted_bytes: int = 0
    turns: Turns | None = None

    @property
    def total_bytes(self) -> int:
        """How much is read in all, or is there already."""
        return self.num_bytes + self.unwanted_bytes

    @property
    def mapped_bytes(self) -> int:
        """How much of the tensors stays in mapped files, whether it is given or, to be verified, in chunks."""
        layout = self.layout
        if not layout.num_given:
            return 0
        return sum(place.num_bytes for index, place in enumerate(layout.places) if layout.is_given(index))

    def bytes_on(self, device: int) -> int:
        """How much memory the blocks on a device take that are there at a time."""
        dropped_bytes = 0 if self.turns is None else self.turns.dropped_bytes(self.layout.places, {device})
        return self.layout.bytes_on(device) - dropped_bytes


def make_plan(  # noqa: PLR0913 (sizes and switches that have nothing in common)
    specs: list[TensorSpec],
    places: list[Place],
    *,
    lands: Sequence[bool],
    chunk_bytes: int,
    own_bytes: int,
    block_bytes: int,
    order: Literal["model", "file"],
    isolate_large: bool = False,
    fills_land: bool = False,
    mapped: Sequence[int] | None = None,
    whole: Whole | None = None,
    turns: Turns | None = None,
) -> LoadPlan:
    """Cut the wanted tensors into chunks and lay them out.

    Args:
        specs: what is wanted, sorted by shard and by `begin`.
        places: what becomes of each; parallel to `specs`.
        lands: of each device, whether its blocks can be read into directly.
        chunk_bytes: the most that one chunk may need of a slot.
        own_bytes: tensors of this size or more get a block of their own.
        block_bytes: size of the blocks that smaller ones share.
        order: of the chunks; by `Place.position` of the earliest tensor in each, or as they lie in the files.
        isolate_large: never put a large tensor and another into one chunk, nor tensors on either side of it into one
            block (a consumer that takes tensors one by one could otherwise wait for a chunk that waits for it).
        fills_land: whether readers may write to parameters that have storage, where blocks can be read into directly.
        mapped: the sizes of the shards, if they are mapped and tensors may stay in them.
        whole: read every shard that something is wanted from in whole, `order` or not.
        turns: what is to be read and placed turn by turn: all chunks of one together, behind those of none. Not with
            `whole`.
    """
    layout = Layout(
        places,
        lands=lands,
        own_bytes=own_bytes,
        block_bytes=block_bytes,
        alone=None if turns is None else turns.of,
        share_across_large=not isolate_large,
        fills_land=fills_land,
        given=None if mapped is None else Given(list(mapped), [(spec.shard, spec.begin) for spec in specs]),
    )
    cutter = _Cutter(specs, layout, chunk_bytes, turns, isolate_large=isolate_large)
    cuts = list(cutter.cut())
    given = _given(specs, places, layout, chunk_bytes)
    num_mapped = len(given.places)
    verified: tuple[int, ...] = ()
    if whole is not None:
        verified = tuple(sorted({spec.shard for spec in specs}))
        cuts = _whole_shards([*cuts, *given.cuts], whole, verified, chunk_bytes, is_mapped=mapped is not None)
        given = _Given((), [])
    parts: dict[int, int] = {}
    for cut in cuts:
        if cut.stop > cut.first:
            for place in {cut.first, cut.stop - 1}:
                parts[place] = parts.get(place, 0) + 1
    if whole is not None:
        cuts = list(_side_by_side(cuts, places, whole.lanes, order))
    elif order == "model":
        for part in (cuts, given.cuts):
            part.sort(key=_earliest(places))
    if turns is not None:
        cuts = _gathered(cuts, turns)
    chunks = tuple(
        Chunk(
            index,
            ByteRange(cut.shard, cut.begin, cut.end),
            layout.transfer(cut.first, cut.stop, cut.head, cut.end - cut.begin)
            if cut.stop > cut.first
            else layout.unwanted(cut.shard, cut.begin, cut.end - cut.begin),
            cut.is_mapped,
        )
        for index, cut in enumerate(cuts)
    )
    unwanted_bytes = sum(cut.end - cut.begin for cut in cuts if cut.stop == cut.first)
    given_bytes = sum(specs[place].num_bytes for place in given.places)
    return LoadPlan(
        chunks,
        layout,
        sum(chunk.num_bytes for chunk in chunks) - unwanted_bytes + given_bytes,
        cutter.num_extents,
        {place: count for place, count in parts.items() if count > 1},
        tuple(cutter.empty),
        given.places,
        given_bytes,
        tuple(ByteRange(cut.shard, cut.begin, cut.end) for cut in given.cuts),
        num_mapped,
        verified,
        unwanted_bytes,
        turns,
    )


@dataclass(slots=True)
class _Cut:
    """Bytes `begin` to `end` of a shard: places `first` to `stop`, of which the first has `head` bytes before.

    Where there is no place, nobody wants the bytes.
    """

    shard: int
    begin: int
    end: int
    first: int
    stop: int
    head: int
    is_mapped: bool = False


class _Given(NamedTuple):
    """Places that lie in mapped files, and cuts of about a chunk's size that hold all their bytes, in file order."""

    places: tuple[int, ...]
    cuts: list[_Cut]


def _given(specs: list[TensorSpec], places: list[Place], layout: Layout, chunk_bytes: int) -> _Given:
    if not layout.num_given:
        return _Given((), [])
    given = tuple(filter(layout.is_given, range(len(places))))
    cuts: list[_Cut] = []
    for place in given:
        spec = specs[place]
        if cuts:
            last = cuts[-1]
            if last.shard == spec.shard and last.end == spec.begin and spec.end - last.begin <= chunk_bytes:
                last.end, last.stop = spec.end, place + 1
                continue
        cuts.append(_Cut(spec.shard, spec.begin, spec.end, place, place + 1, 0, is_mapped=True))
    return _Given(given, cuts)


def _earliest(places: list[Place]) -> Callable[[_Cut], int]:
    """Return a key that sorts cuts by the position of the earliest tensor in each."""
    position_of = attrgetter("position")
    return lambda cut: min(map(position_of, places[cut.first : cut.stop]))


def _gathered(cuts: list[_Cut], turns: Turns) -> list[_Cut]:
    """Move the cuts of turns behind all others, turn by turn."""
    return sorted(cuts, key=lambda cut: turns.of.get(cut.first, -1))


def _whole_shards(
    cuts: list[_Cut], whole: Whole, shards: Sequence[int], chunk_bytes: int, *, is_mapped: bool
) -> list[_Cut]:
    """Return all cuts of some shards, in the order of their bytes, with what lies between and around them."""
    by_shard: dict[int, list[_Cut]] = {shard: [] for shard in shards}
    for cut in cuts:
        by_shard[cut.shard].append(cut)
    result: list[_Cut] = []
    for shard, wanted in by_shard.items():
        position, end = whole.bodies[shard]
        wanted.sort(key=attrgetter("begin"))
        for cut in (*wanted, _Cut(shard, end, end, 0, 0, 0)):
            if cut.begin < position:
                raise UnsupportedFormatError(
                    "tensors share bytes in a file, so its bytes cannot be hashed in their order while they are loaded",
                    hint="Set prefetch.verify to none, or convert the file to safetensors",
                )
            while position < cut.begin:
                stop = min(cut.begin, position + chunk_bytes)
                result.append(_Cut(shard, position, stop, 0, 0, 0, is_mapped))
                position = stop
            if cut.end > cut.begin:
                result.append(cut)
            position = cut.end
    return result


def _side_by_side(cuts: list[_Cut], places: list[Place], lanes: int, order: Literal["model", "file"]) -> Iterator[_Cut]:
    """Yield cuts so that each shard's come in the order of its bytes, those of up to `lanes` shards in turn.

    With `order: model` the shard with the model's earliest tensor is begun first.
    """
    by_shard: dict[int, deque[_Cut]] = {}
    for cut in cuts:
        by_shard.setdefault(cut.shard, deque()).append(cut)
    waiting = list(by_shard.values())
    if order == "model":
        earliest = _earliest(places)
        waiting.sort(key=lambda shard: min((earliest(cut) for cut in shard if cut.stop > cut.first), default=0))
    waiting.reverse()
    active: list[deque[_Cut]] = []
    while waiting or active:
        while waiting and len(active) < lanes:
            active.append(waiting.pop())
        for shard in active:
            yield shard.popleft()
        active = [shard for shard in active if shard]


class _Cutter:
    def __init__(
        self, specs: list[TensorSpec], layout: Layout, chunk_bytes: int, turns: Turns | None, *, isolate_large: bool
    ) -> None:
        self._specs = specs
        #: What no two places of one chunk may differ in; None: they do not.
        self._lots: list[tuple[int, int]] | None = None
        if turns is not None or len(layout.lands) > 1:
            of = {} if turns is None else turns.of
            self._lots = [(place.device, of.get(index, -1)) for index, place in enumerate(layout.places)]
        self._layout = layout
        self._chunk_bytes = chunk_bytes
        self._isolate_large = isolate_large
        self.num_extents = 0
        self.empty: list[int] = []

    def cut(self) -> Iterator[_Cut]:  # noqa: C901, PLR0912 (one loop over all tensors, without calls)
        own_bytes, chunk_bytes = self._layout.own_bytes, self._chunk_bytes
        has_given = self._layout.num_given > 0
        lots = self._lots
        current: _Cut | None = None
        used = 0
        shard = position = -1
        lot: tuple[int, int] | None = None
        for index, spec in enumerate(self._specs):
            begin, end = spec.begin, spec.end
            size = end - begin
            if size == 0:
                self.empty.append(index)
                continue
            if has_given and self._layout.is_given(index):
                continue
            small = size < own_bytes
            if begin != position or spec.shard != shard or (lots is not None and lots[index] != lot):
                self.num_extents += 1
                shard, lot = spec.shard, None if lots is None else lots[index]
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
