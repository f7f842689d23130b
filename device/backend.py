"""The seam between the device stage and a device's driver, and the driver of host memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch

from weightstream.device.dtypes import CASTABLE

__all__ = ["Backend", "Event", "HostBackend", "NowhereBackend", "Spread", "cast_or_copy"]


class Event(Protocol):
    """A point on a copy stream."""

    def synchronize(self) -> None:
        """Block the calling thread, without the GIL, until everything submitted before the event has happened."""
        ...

    def query(self) -> bool:
        """Return whether it has happened already."""
        ...


class Spread(NamedTuple):
    """`num_bytes` at `offset` of a source, of `dtype`, that become the flat tensor `destination`, cast if need be."""

    offset: int
    num_bytes: int
    dtype: torch.dtype
    destination: torch.Tensor


class Backend(Protocol):
    """What the device stage asks of a device. All tensors of bytes are flat, contiguous uint8.

    One backend serves all loads of a `Loader` onto one device. `copy` and `spread` only submit: their sources must
    stay untouched until an event recorded afterwards has been seen complete.

    Attributes:
        device: where `allocate` makes tensors.
        lands: whether reader threads may write into what `allocate` returns (host memory).
        pinnable: whether slots should be page-locked for this device.
        numa_node: the node of the machine's memory that is closest to the device; None: unknown, or all are alike.
    """

    device: torch.device
    lands: bool
    pinnable: bool
    numa_node: int | None

    def pin(self, memory: mmap.mmap) -> Callable[[], None] | None:
        """Page-lock host memory for this device's copies; return what undoes it, or None where it is refused."""
        ...

    def allocate(self, num_bytes: int, stream: object) -> tuple[torch.Tensor, memoryview | None]:
        """Make a block that the user's `stream` may use, and let what is submitted from now on wait for it.

        Returns:
            The block, and, where readers may write to it, its memory, which keeps it alive as the tensor does.
        """
        ...

    def follow(self, stream: object) -> None:
        """Let what is submitted from now on wait for all work that `stream` has been given."""
        ...

    def submitting(self) -> AbstractContextManager[None]:
        """Return a context in which the calling thread submits: not needed, but faster for many copies at a time."""
        ...

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Submit a copy of bytes from a slot."""
        ...

    def spread(self, source: torch.Tensor, parts: Sequence[Spread]) -> None:
        """Submit one copy from a slot and the distribution of its bytes over many tensors."""
        ...

    def record(self) -> Event | None:
        """Return an event behind everything submitted so far, or None where it has happened already."""
        ...

    def run(self, action: Callable[[], None], stream: object) -> None:
        """Call `action` with the user's `stream` current, and return when its work on the device is done."""
        ...


#: torch divides larger work on the host among threads that wait for one another (at::internal::GRAIN_SIZE is 32,768).
_ALONE = 32_767
#: Tensors of fewer elements are cast by the calling thread alone. Beside two busy processes on two cores, 3,187 tensors of
#: 87,000 elements on average took torch 42 s, more than 10 ms each, and take 8.5 s this way (2026-11-28); alone, 0.2 s.
_SHARED = 2**20


def cast_or_copy(destination: torch.Tensor, source: torch.Tensor, dtype: torch.dtype) -> None:
    """Write bytes of `dtype` into a flat tensor, cast if it has another dtype. Runs where the tensors are."""
    if destination.dtype is dtype or dtype not in CASTABLE:
        destination.view(torch.uint8).copy_(source)
        return
    if source.data_ptr() % dtype.itemsize:  # bytes read in the file's layout lie anywhere; a typed view may not
        source = source.clone()
    typed = source.view(dtype)
    if destination.device.type != "cpu" or not _ALONE < destination.numel() < _SHARED:
        destination.copy_(typed)
        return
    for part, values in zip(torch.split(destination, _ALONE), torch.split(typed, _ALONE), strict=True):
        part.copy_(values)


class HostBackend:
    """Host memory as a device: blocks are anonymous memory in huge pages, and copies happen at once."""

    device = torch.device("cpu")
    lands = True
    pinnable = False
    numa_node: int | None = None

    def __init__(self, allocate: Callable[[int], mmap.mmap | memoryview]) -> None:
        self._allocate = allocate

    def pin(self, memory: mmap.mmap) -> Callable[[], None] | None:
        return None

    def allocate(self, num_bytes: int, stream: object) -> tuple[torch.Tensor, memoryview | None]:
        memory = self._allocate(num_bytes)
        return torch.frombuffer(memory, dtype=torch.uint8), memoryview(memory)

    def follow(self, stream: object) -> None:
        """Nothing to wait for: the caller's work on the host is done when it calls."""

    def submitting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source)

    def spread(self, source: torch.Tensor, parts: Sequence[Spread]) -> None:
        for part in parts:
            cast_or_copy(part.destination, source[part.offset : part.offset + part.num_bytes], part.dtype)

    def record(self) -> Event | None:
        return None

    def run(self, action: Callable[[], None], stream: object) -> None:
        action()


class NowhereBackend:
    """Meta as a device: bytes are read and dropped. What is left of such a load is a warm page cache."""

    device = torch.device("meta")
    lands = False
    pinnable = False
    numa_node: int | None = None

    def pin(self, memory: mmap.mmap) -> Callable[[], None] | None:
        return None

    def allocate(self, num_bytes: int, stream: object) -> tuple[torch.Tensor, memoryview | None]:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device), None

    def follow(self, stream: object) -> None:
        """There is no stream."""

    def submitting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Drop the bytes."""

    def spread(self, source: torch.Tensor, parts: Sequence[Spread]) -> None:
        """Drop the bytes."""

    def record(self) -> Event | None:
        return None

    def run(self, action: Callable[[], None], stream: object) -> None:
        action()
