"""Layout: where in which block every tensor lies, and how the bytes of one chunk get there.

Pure arithmetic on sizes: no memory is touched and no device is called. A *block* is one allocation that the loader
makes. Large tensors have a block of their own, so that saving, freeing or quantising one of them does not drag others
along; small ones share blocks. The slot that a chunk is read into has the layout of the block it goes to, gaps
included, so that consecutive small tensors are one *run*: one copy.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import msgspec

from weightstream.device.placement import ALIGNMENT_BYTES, Place, padded

__all__ = ["ALIGNMENT_BYTES", "IN_SLOT", "Given", "Landing", "Layout", "Piece", "Run", "Transfer", "padded"]

#: In `Landing.block`: the bytes are read into the slot, not straight into a block.
IN_SLOT = -1


class Landing(msgspec.Struct, frozen=True, gc=False):
    """Where the next `num_bytes` of a chunk are read to: a block in host memory, the slot, or a parameter's own storage.

    `place` is the parameter's place for the last of these, where `block` is `IN_SLOT` too: there is no block.
    """

    block: int
    offset: int
    num_bytes: int
    place: int = -1


class Run(msgspec.Struct, frozen=True, gc=False):
    """Consecutive bytes that go from a slot to a block, or into a parameter's own storage, in one copy.

    `place` is the parameter's place where `block` is `IN_SLOT` (there is no block: the storage is the model's).
    """

    block: int
    block_offset: int
    slot_offset: int
    num_bytes: int
    place: int = -1


class Piece(msgspec.Struct, frozen=True, gc=False):
    """The part of one tensor that is in one chunk, at `offset` in the tensor and `slot_offset` in the slot."""

    place: int
    offset: int
    slot_offset: int
    num_bytes: int


class Transfer(msgspec.Struct, frozen=True, gc=False):
    """What the device stage does with one chunk.

    Attributes:
        first, stop: the places that the chunk holds bytes of: `first`, ..., `stop - 1`.
        head: how many bytes of place `first` lie before the chunk.
        num_bytes: length of the chunk.
        landings: where its bytes are read to, in order, in the packed layout.
        runs: the copies from the slot, in the packed layout.
        loose: pieces that must be copied one by one, because they are cast or their tensor shares no block.
        slot_bytes: how much of a slot the packed layout uses; 0: none is needed.
        device: which of the load's devices all of it goes to.
        in_place: whether any of it is read into a parameter's own storage.
    """

    first: int
    stop: int
    head: int
    num_bytes: int
    landings: tuple[Landing, ...]
    runs: tuple[Run, ...]
    loose: tuple[Piece, ...]
    slot_bytes: int
    device: int = 0
    in_place: bool = False


class Given(msgspec.Struct, frozen=True, gc=False):
    """Memory that is there already and holds the tensors' bytes: mapped files.

    Attributes:
        sizes: of each of them, in bytes.
        homes: place -> which of them it lies in, and at which offset.
    """

    sizes: list[int]
    homes: list[tuple[int, int]]


class Layout:
    """The blocks of one load.

    Args:
        places: in the order of their bytes in the checkpoint; places without bytes have no block.
        lands: of each device, whether readers may write to blocks themselves (blocks in host memory).
        own_bytes: tensors of this size or more have a block of their own.
        block_bytes: size of the blocks that smaller tensors share.
        alone: places that have a block of their own however small they are, because it is let go before others.
        share_across_large: whether small tensors before and after a large one may share a block.
        fills_land: whether readers may write to parameters that have storage in host memory, too.
        given: blocks that need not be made or filled. Tensors stay there if they can: those that are neither cast nor
            written to other storage, and begin at a multiple of their element's size.

    Attributes:
        blocks: the size of each block; the first `num_given` of them are given.
        block_of: place -> its block, or `IN_SLOT`.
        offset_of: place -> its offset in the block.
        members: block -> how many places lie in it.
        device_of: block -> its device, where there are several. No two devices share a block.
    """

    def __init__(
        self,
        places: list[Place],
        *,
        lands: Sequence[bool],
        own_bytes: int,
        block_bytes: int,
        alone: Container[int] | None = None,
        share_across_large: bool = True,
        fills_land: bool = False,
        given: Given | None = None,
    ) -> None:
        self.places = places
        self.lands = tuple(lands)
        self.fills_land = fills_land
        self.device_of: list[int] = [0] * (len(given.sizes) if given is not None else 0)
        self.own_bytes = own_bytes
        self.blocks: list[int] = list(given.sizes) if given is not None else []
        self.num_given = len(self.blocks)
        self.block_of: list[int] = []
        self.offset_of: list[int] = []
        self.members: list[int] = [0] * self.num_given
        #: How many places up to this one do not follow the one before in its block, byte by byte.
        self._breaks: list[int] = []
        #: Whether readers write everything to where it belongs, so that no slot is needed.
        self.slotless = all(lands) and not any(
            place.dtype is not place.stored_dtype or (place.mode == "fill" and not fills_land) for place in places
        )
        self._assign_blocks(block_bytes, alone, given, share_across_large=share_across_large)

    def _assign_blocks(  # noqa: C901, PLR0915 (one loop over all tensors, without calls)
        self, block_bytes: int, alone: Container[int] | None, given: Given | None, *, share_across_large: bool
    ) -> None:
        blocks, members, own_bytes = self.blocks, self.members, self.own_bytes
        add_block_of, add_offset_of = self.block_of.append, self.offset_of.append
        add_break, breaks = self._breaks.append, 0
        shared = -1
        used = count = 0  # of the block that small tensors share at present
        end = -1  # of the place before, in its block
        device, has_several = 0, len(self.lands) > 1
        others: dict[int, tuple[int, int, int]] = {}  # the same of the other devices
        add_device_of = self.device_of.append

        def close(block: int, used: int, count: int) -> None:
            if block >= 0:
                blocks[block], members[block] = used, count

        for index, place in enumerate(self.places):
            size = place.num_bytes
            num_bytes = size
            if has_several and place.device != device:
                others[device] = shared, used, count
                device = place.device
                shared, used, count = others.pop(device, (-1, 0, 0))
                end = -1
            if given is not None and size and place.mode != "fill" and place.dtype is place.stored_dtype:
                block, offset = given.homes[index]
                if offset % place.dtype.itemsize == 0:
                    add_block_of(block)
                    add_offset_of(offset)
                    members[block] += 1
                    add_break(breaks := breaks + 1)
                    end = -1
                    continue
            if place.dtype is not place.stored_dtype:
                num_bytes = size // place.stored_dtype.itemsize * place.dtype.itemsize
            if num_bytes == 0 or place.mode == "fill":
                add_block_of(IN_SLOT)
                add_offset_of(0)
                breaks += num_bytes > 0
                end = -1
            elif size >= own_bytes or (alone is not None and index in alone):
                add_block_of(len(blocks))
                add_offset_of(0)
                blocks.append(padded(num_bytes))
                members.append(1)
                add_device_of(device)
                breaks += 1
                end = -1
                if not share_across_large:
                    close(shared, used, count)
                    shared = -1
            else:
                if shared < 0 or used + num_bytes > block_bytes:
                    close(shared, used, count)
                    shared, used, count = len(blocks), 0, 0
                    blocks.append(0)
                    members.append(0)
                    add_device_of(device)
                    end = -1
                if used != end:
                    breaks += 1
                add_block_of(shared)
                add_offset_of(used)
                end = used + num_bytes
                used += padded(num_bytes)
                count += 1
            add_break(breaks)
        for state in ((shared, used, count), *others.values()):
            close(*state)

    def is_given(self, place: int) -> bool:
        """Tell whether a place's bytes are where they belong from the beginning."""
        return 0 <= self.block_of[place] < self.num_given

    def bytes_on(self, device: int) -> int:
        """Return how large the blocks that are made on a device are in all."""
        made = range(self.num_given, len(self.blocks))
        return sum(self.blocks[block] for block in made if self.device_of[block] == device)

    def is_small(self, place: int) -> bool:
        """Tell whether a place shares a block, or would if the loader made its storage."""
        return self.places[place].num_bytes < self.own_bytes

    def pieces(self, first: int, stop: int, head: int, num_bytes: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (place, offset in the tensor, offset in the chunk, bytes) for a chunk's tensors."""
        position = 0
        for place, described in enumerate(self.places[first:stop], first):
            count = min(described.num_bytes - head, num_bytes - position)
            if count:
                yield place, head, position, count
                position += count
                head = 0

    def transfer(self, first: int, stop: int, head: int, num_bytes: int) -> Transfer:
        """Lay one chunk out, all of whose tensors go to one device.

        Small tensors come first in the slot, as they lie in their block, whatever stands between them in the file:
        each block that the chunk touches then costs one copy. The rest follows, each piece on its own boundary.
        """
        if self.slotless:
            whole = self._as_one(first, stop, head, num_bytes)
            if whole is not None:
                device, in_place = self.places[first].device, whole.place >= 0
                return Transfer(first, stop, head, num_bytes, (whole,), (), (), 0, device, in_place)
        where: dict[int, int] = {}
        runs: list[Run] = []
        loose: list[Piece] = []
        used = 0 if self.slotless else self._assign_slot(first, stop, head, num_bytes, where, runs, loose)
        landings: list[Landing] = []
        block, start, end, own = IN_SLOT, 0, 0, -1
        in_place = False
        block_of, offset_of = self.block_of, self.offset_of
        for place, offset, _, count in self.pieces(first, stop, head, num_bytes):
            slot_offset = where.get(place) if where else None
            next_own = -1
            if slot_offset is None:
                next_block, begin = block_of[place], offset_of[place] + offset
                if next_block == IN_SLOT:
                    next_own, in_place = place, True
            else:
                next_block, begin = IN_SLOT, slot_offset
            if begin == end and next_block == block and next_own == own:
                end += count
                continue
            if end > start:
                landings.append(Landing(block, start, end - start, own))
            block, start, end, own = next_block, begin, begin + count, next_own
        landings.append(Landing(block, start, end - start, own))
        device = self.places[first].device
        return Transfer(
            *(first, stop, head, num_bytes, tuple(landings), tuple(runs), tuple(loose), used, device, in_place)
        )

    def unwanted(self, shard: int, begin: int, num_bytes: int) -> Transfer:
        """Lay a chunk out that holds no tensor: it stays in a mapped file, or is read into a slot and dropped."""
        if self.num_given:
            return Transfer(0, 0, 0, num_bytes, (Landing(shard, begin, num_bytes),), (), (), 0)
        return Transfer(0, 0, 0, num_bytes, (Landing(IN_SLOT, 0, num_bytes),), (), (), num_bytes)

    def _as_one(self, first: int, stop: int, head: int, num_bytes: int) -> Landing | None:
        """Return where a chunk lands if it does so in one piece, without a gap."""
        if self._breaks[first] != self._breaks[stop - 1]:
            return None
        block = self.block_of[first]
        return Landing(block, self.offset_of[first] + head, num_bytes, first if block == IN_SLOT else -1)

    def _assign_slot(
        self,
        first: int,
        stop: int,
        head: int,
        num_bytes: int,
        where: dict[int, int],
        runs: list[Run],
        loose: list[Piece],
    ) -> int:
        """Note the slot offset of every piece that is read into the slot, and the copies; return the bytes used."""
        large: list[tuple[int, int, int, int]] = []
        used = 0
        run_block, run_from, run_to, run_slot = IN_SLOT, 0, 0, 0
        lands = self.lands[self.places[first].device]
        # Where a slot is needed anyway, parameters are copied to from there: with a slot a chunk is not read in place.
        fills_land = lands and self.fills_land and not any(place.is_cast for place in self.places[first:stop])
        for piece in self.pieces(first, stop, head, num_bytes):
            place, offset, _, count = piece
            block = self.block_of[place]
            is_cast = self.places[place].is_cast
            if fills_land or (block != IN_SLOT and lands and not is_cast):
                continue
            if block == IN_SLOT or is_cast or not self.is_small(place):
                large.append(piece)
                continue
            begin = self.offset_of[place] + offset
            if block != run_block or begin != padded(run_to):
                if run_block != IN_SLOT:
                    runs.append(Run(run_block, run_from, run_slot, run_to - run_from))
                run_block, run_from, run_slot = block, begin, used
            run_to = begin + count
            where[place] = run_slot + begin - run_from
            used = run_slot + padded(run_to - run_from)
        if run_block != IN_SLOT:
            runs.append(Run(run_block, run_from, run_slot, run_to - run_from))
        for place, offset, _, count in large:
            where[place] = used
            if self.places[place].is_cast or self.is_small(place):
                loose.append(Piece(place, offset, used, count))
            else:
                block = self.block_of[place]
                runs.append(Run(block, offset, used, count, place if block == IN_SLOT else -1))
            used += padded(count)
        return used
