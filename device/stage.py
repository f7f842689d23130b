# pyright: reportPrivateUsage=false
# Dispatching below autograd has no public name.
"""The device stage of one load: from filled buffers to finished tensors.

Owns the load's blocks until the tensors in them have been taken. Its methods are called by two kinds of threads:
`buffers` by readers, everything else by the load's own thread, in the order: `open`, then `submit` for each chunk that
was filled, `take` for each tensor whose bytes are all there, `close`.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, cast

import torch
from torch.autograd.graph import increment_version

from weightstream.device.backend import Backend, Event, Spread
from weightstream.device.layout import IN_SLOT, Layout, Piece, Transfer
from weightstream.device.placement import Place, tensor_of

__all__ = ["Destination", "DeviceStage"]

_below_autograd = cast(
    "Callable[[], AbstractContextManager[None]]",
    torch._C._AutoDispatchBelowADInplaceOrView,  # pyright: ignore[reportUnknownMemberType]  # as torch's custom operators do
)


class Destination(NamedTuple):
    """One device of a load.

    Attributes:
        backend: its driver.
        stream: the user's current stream there when the load was asked for.
        on_block: told the size of every block that is made there (positive) and let go (negative), by any thread, but one
            at a time: with the stage's lock held. Tensors that were taken from it may live on.
        on_free: told, likewise, how much of what was let go is nobody's memory any more, if that is known.
    """

    backend: Backend
    stream: object
    on_block: Callable[[int], None]
    on_free: Callable[[int], None]


class DeviceStage:
    """Carries bytes to their blocks and hands out the tensors in them.

    Args:
        destinations: the load's devices, in the order that `Place.device` counts in.
        layout: where everything lies.
        given: the memory of the layout's given blocks, which is only ever read from here.
    """

    def __init__(
        self,
        destinations: Sequence[Destination],
        layout: Layout,
        *,
        given: Sequence[memoryview] = (),
    ) -> None:
        self.num_copies = 0
        #: Places of materialised parameters that a copy has been submitted into, or that readers were given to write to.
        self.touched: set[int] = set()
        self._destinations = tuple(destinations)
        self._layout = layout
        self._lock = threading.Lock()
        self._blocks: dict[int, torch.Tensor] = {
            index: torch.frombuffer(memory, dtype=torch.uint8) for index, memory in enumerate(given)
        }
        self._views: dict[int, memoryview] = dict(enumerate(given))
        self._members = list(layout.members)

    def open(self) -> None:
        """Make each device wait for what the user's stream there has been given: parameters may still be in use."""
        for to in self._destinations:
            to.backend.follow(to.stream)

    @property
    def copies(self) -> bool:
        """Whether bytes go anywhere from their slots; else they are dropped there, and nothing is submitted."""
        return any(to.backend.device.type != "meta" for to in self._destinations)

    def lands(self, transfer: Transfer) -> bool:
        """Say whether readers may write to a chunk's blocks themselves."""
        return self._destinations[transfer.device].backend.lands

    def buffers(self, transfer: Transfer, slot: memoryview | None, begin: int, end: int) -> list[memoryview]:
        """Return the host memory that bytes `begin` to `end` of a chunk go to, in order. Called on reader threads."""
        result: list[memoryview] = []
        position = 0
        for landing in transfer.landings:
            first, last = max(begin - position, 0), min(end - position, landing.num_bytes)
            position += landing.num_bytes
            if first >= last:
                continue
            if landing.place >= 0:
                memory = self._parameter_memory(landing.place)
            elif landing.block == IN_SLOT:
                assert slot is not None
                memory = slot
            else:
                memory = self._host_view(landing.block)
            result.append(memory[landing.offset + first : landing.offset + last])
        return result

    def submitting(self, transfer: Transfer) -> AbstractContextManager[None]:
        """Return a context in which chunks for the device of this one are submitted."""
        return self._destinations[transfer.device].backend.submitting()

    def submit(self, transfer: Transfer, slot: memoryview | None, shift: int | None) -> Event | None:
        """Submit the copies of one filled chunk.

        Args:
            transfer: the chunk.
            slot: its slot, which stays untouched until the event; None if everything landed in its block.
            shift: None if the slot has the packed layout; else it has the file's, and begins at this offset.

        Returns:
            The event behind the copies, or None if they have happened already.

        Raises:
            RuntimeError: whatever torch or the driver raises. No copy of this chunk is under way then.
        """
        if slot is None:
            return None
        backend = self._destinations[transfer.device].backend
        try:
            self._submit(transfer, torch.frombuffer(slot, dtype=torch.uint8), shift, backend)
        except BaseException:
            event = backend.record()
            if event is not None:  # copies that were submitted before the error still read from the slot
                event.synchronize()
            raise
        return backend.record()

    def _submit(self, transfer: Transfer, source: torch.Tensor, shift: int | None, backend: Backend) -> None:
        loose: Sequence[Piece] = transfer.loose
        if shift is None:
            for run in transfer.runs:
                whole = self._parameter_bytes(run.place) if run.block == IN_SLOT else self._block(run.block)
                self._copy(backend, whole, run.block_offset, source, run.slot_offset, run.num_bytes)
        else:
            loose = self._submit_large(transfer, source, shift, backend)
        for group in _neighbours(loose):
            self._spread(source, group, backend)

    def filled(self, places: Iterable[int]) -> None:
        """Let autograd see that parameters have been written to, by readers too: whoever saved one meanwhile is told."""
        increment_version([tensor_of(self._layout.places[place]) for place in places])

    def take(self, places: Sequence[int]) -> list[torch.Tensor]:
        """Return finished tensors, in their final dtype and shape, and let go of blocks of which these were the last.

        Those whose bytes are not in the order of their elements are views with strides.

        Views are made in bulk: tensors of one shape that lie at equal distances are one call.
        """
        described, block_of, offset_of = self._layout.places, self._layout.block_of, self._layout.offset_of
        alike: dict[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...] | None], tuple[list[int], list[int]]] = {}
        for rank, index in enumerate(places):
            place = described[index]
            key = block_of[index], place.dtype, place.shape, place.stride
            found = alike.get(key)
            if found is None:
                alike[key] = [rank], [offset_of[index]]
            else:
                found[0].append(rank)
                found[1].append(offset_of[index])
        nothing = torch.empty(0)
        taken = [nothing] * len(places)
        for (block, dtype, shape, stride), (ranks, offsets) in alike.items():
            if block == IN_SLOT:  # tensors without bytes
                devices = [self._destinations[described[places[rank]].device].backend.device for rank in ranks]
                views = [torch.empty(shape, dtype=dtype, device=device) for device in devices]
            else:
                views = _views(
                    _elements(self._block(block), dtype), shape, stride or _contiguous_strides(shape), offsets
                )
                self._members[block] -= len(ranks)
                if not self._members[block] and block >= self._layout.num_given:
                    self._drop(block)
            for rank, view in zip(ranks, views, strict=True):
                taken[rank] = view
        return taken

    def free(self, places: Iterable[int]) -> None:
        """Note that nobody has these tensors any more, which were taken, and each of which had a block of its own."""
        with self._lock:
            for place in places:
                block = self._layout.block_of[place]
                if block != IN_SLOT:
                    self._destinations[self._layout.device_of[block]].on_free(self._layout.blocks[block])

    def made(self, num_bytes: int, device: int) -> None:
        """Note that a tensor has been made on a device that parameters keep, beside the blocks."""
        with self._lock:
            self._destinations[device].on_block(num_bytes)

    def run(self, action: Callable[[], None]) -> None:
        """Call `action` with the user's streams current, and return when its work on the devices is done."""
        for to in self._destinations:
            action = functools.partial(to.backend.run, action, to.stream)
        action()

    def close(self) -> None:
        """Let go of all blocks. Copies must have completed; tensors that were taken keep their memory."""
        for block in list(self._blocks):
            self._drop(block)

    def _submit_large(self, transfer: Transfer, source: torch.Tensor, shift: int, backend: Backend) -> list[Piece]:
        """Copy the large tensors of a chunk that has the file's layout; return the pieces that are left."""
        loose: list[Piece] = []
        layout = self._layout
        for place, offset, position, count in layout.pieces(
            transfer.first, transfer.stop, transfer.head, transfer.num_bytes
        ):
            if layout.is_small(place) or layout.places[place].is_cast:
                loose.append(Piece(place, offset, shift + position, count))
                continue
            block = layout.block_of[place]
            whole = self._parameter_bytes(place) if block == IN_SLOT else self._block(block)
            self._copy(backend, whole, offset, source, shift + position, count)
        return loose

    def _copy(
        self,
        backend: Backend,
        destination: torch.Tensor,
        offset: int,
        source: torch.Tensor,
        source_offset: int,
        num_bytes: int,
    ) -> None:
        backend.copy(destination[offset : offset + num_bytes], source[source_offset : source_offset + num_bytes])
        self.num_copies += 1

    def _spread(self, source: torch.Tensor, pieces: list[Piece], backend: Backend) -> None:
        begin = pieces[0].slot_offset
        end = pieces[-1].slot_offset + pieces[-1].num_bytes
        parts = [
            Spread(piece.slot_offset - begin, piece.num_bytes, self._layout.places[piece.place].stored_dtype, flat)
            for piece in pieces
            for flat in (self._flat(piece),)
        ]
        backend.spread(source[begin:end], parts)
        self.num_copies += 1

    def _flat(self, piece: Piece) -> torch.Tensor:
        """Return the elements of the destination that a piece becomes."""
        described = self._layout.places[piece.place]
        block = self._layout.block_of[piece.place]
        first = piece.offset // described.stored_dtype.itemsize
        count = piece.num_bytes // described.stored_dtype.itemsize
        if block == IN_SLOT:
            self.touched.add(piece.place)
            return _storage_of(described)[first : first + count]
        itemsize = described.dtype.itemsize
        start = self._layout.offset_of[piece.place] + first * itemsize
        return self._block(block)[start : start + count * itemsize].view(described.dtype)

    def _parameter_bytes(self, place: int) -> torch.Tensor:
        self.touched.add(place)
        return _storage_of(self._layout.places[place]).view(torch.uint8)

    def _parameter_memory(self, place: int) -> memoryview:
        """Return a parameter's own storage, which stays as long as the view of it does, whatever becomes of the model.

        Autograd sees that it was written to, as after `copy_`: from now on, and once more in `filled`.
        """
        self.touched.add(place)
        tensor = tensor_of(self._layout.places[place])
        increment_version(tensor)
        memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
        memory.storage = tensor.untyped_storage()  # type: ignore[attr-defined]  # instances of ctypes take attributes
        return memoryview(memory).cast("B")

    def _block(self, index: int) -> torch.Tensor:
        with self._lock:
            block = self._blocks.get(index)
            if block is None:
                num_bytes = self._layout.blocks[index]
                to = self._destinations[self._layout.device_of[index]]
                block, memory = to.backend.allocate(num_bytes, to.stream)
                self._blocks[index] = block
                if memory is not None:
                    self._views[index] = memory
                to.on_block(num_bytes)
            return block

    def _host_view(self, index: int) -> memoryview:
        self._block(index)
        return self._views[index]

    def _drop(self, index: int) -> None:
        with self._lock:
            block = self._blocks.pop(index, None)  # its memory goes when this returns, without the lock
            self._views.pop(index, None)
            if block is not None and index >= self._layout.num_given:
                self._destinations[self._layout.device_of[index]].on_block(-self._layout.blocks[index])


def _storage_of(place: Place) -> torch.Tensor:
    """Return a materialised parameter flat. It shares the version counter: autograd sees that it was written to."""
    return tensor_of(place).detach().view(-1)


def _elements(block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return bytes as elements, without those at the end that are not enough for one."""
    return block[: block.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _views(
    elements: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offsets: list[int]
) -> list[torch.Tensor]:
    """Return the tensors of one shape that begin at these offsets, in bytes, of a flat tensor.

    Made below autograd, where they are not views of anything, and each has a version counter of its own: if they shared
    one, an in-place change of one parameter would look, to autograd, like a change of its neighbours.
    """
    itemsize = elements.dtype.itemsize
    views: list[torch.Tensor] = []
    first = 0
    while first < len(offsets):
        stop = first + 1
        step = max(0, offsets[stop] - offsets[first]) if stop < len(offsets) else 0
        while step and stop < len(offsets) and offsets[stop] - offsets[stop - 1] == step:
            stop += 1
        count = stop - first
        with _below_autograd():
            views += elements.as_strided(
                (count, *shape), (step // itemsize, *strides), offsets[first] // itemsize
            ).unbind(0)
        first = stop
    return views


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(1, shape[dim + 1])
    return tuple(strides)


def _neighbours(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Group pieces that lie next to each other in the slot, up to alignment, so that each group is one copy."""
    groups: list[list[Piece]] = []
    end = -1
    for piece in pieces:
        if groups and 0 <= piece.slot_offset - end < 4096:
            groups[-1].append(piece)
        else:
            groups.append([piece])
        end = piece.slot_offset + piece.num_bytes
    return groups
