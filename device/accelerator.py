"""The driver of an accelerator: one copy stream, asynchronous copies from page-locked slots, events.

Written against torch's generic accelerator interface, which carries CUDA, ROCm and XPU alike; page-locking memory that
torch did not allocate, and waiting for an event without spinning, exist for CUDA and ROCm alone and are done through
`torch.cuda` there.

Stream rules. The user's stream S is read in the user's thread (`caller_streams`). Blocks are allocated on S, because
the caching allocator orders reuse of freed memory on the stream it was allocated on; before the copy stream writes to
a block it waits for what S had been given by then. Temporaries are allocated, used and freed on the copy stream alone.
The host sees the event behind the last copy complete before a tensor is handed to anybody, so every stream may use it.
Who takes tensors one by one may let them go while a stream still uses them: the one that is current when a tensor is
taken is noted with it (`used_here`).
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from weightstream.device.backend import Event, Spread, cast_or_copy
from weightstream.errors import PlacementError

__all__ = [
    "AcceleratorBackend",
    "caller_streams",
    "default_device",
    "find_device",
    "foreach_copy",
    "free_bytes",
    "on_callers_device",
    "on_callers_streams",
    "used_here",
]

T = TypeVar("T")

#: cudaHostRegisterPortable: page-locked for all devices of the process, not the current one alone.
_PORTABLE = 1


#: One fused kernel for many small copies; what `torch.optim` uses, under the only name it has.
foreach_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def default_device() -> torch.device:
    """Return the thread's current accelerator, or the CPU. May start the driver: not for the event loop's thread."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        if kind is not None:
            return torch.device(kind.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def find_device(target: str | int, setting: str = "device.target") -> torch.device:
    """Return the device that a setting stands for. May start a driver: not for the event loop's thread.

    Args:
        target: as torch writes it, or `auto`, or the number of an accelerator.
        setting: where it was found, for the message.

    Raises:
        PlacementError: this machine has no such device, or torch cannot use it. Its `expected` names those there are.
    """
    if target == "auto":
        return default_device()
    if target in ("cpu", "cpu:0"):
        return torch.device("cpu")
    names = ["cpu"]
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None:
        names += [kind.type, *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()))]
    if isinstance(target, int):
        target = f"{kind.type}:{target}" if kind is not None else f"accelerator {target}"
    if target not in names:
        raise PlacementError(
            f"{setting}: there is no {target} here",
            expected=", ".join(names),
            actual=target,
            hint="Set it to one of these" + (", or to auto" if setting == "device.target" else ""),
        )
    return torch.device(target) if ":" in target else default_device()


def _running() -> torch.device | None:
    """Return the kind of accelerator whose driver runs. Where none does, nobody can have chosen a device or a stream."""
    kind = torch.accelerator.current_accelerator()
    return None if kind is None or not torch.get_device_module(kind).is_initialized() else kind


def on_callers_device(action: Callable[[], T]) -> Callable[[], T]:
    """Return what does `action` on another thread, with the device current there that is current here and now.

    Each thread has a current device of its own, the first one to begin with; `auto` and `cuda` stand for the current one,
    which a program with a process for each device has set in the thread that asks for a load.
    """
    if _running() is None:
        return action
    index = torch.accelerator.current_device_index()

    def act() -> T:
        torch.accelerator.set_device_index(index)
        return action()

    return act


def on_callers_streams(action: Callable[[], T]) -> Callable[[], T]:
    """Return what does `action` on another thread, with the device and the streams current there that are so here and now.

    For work on the device that is not ours, and goes to whatever stream is current: who asked for it goes on with what
    comes of it on its own stream, which would not wait for another one.
    """
    streams = caller_streams()
    on_device = on_callers_device(action)

    def act() -> T:
        for device, stream in streams.items():
            # Making a stream current makes its device current, and takes memory there: not where nobody has chosen one.
            if stream != torch.accelerator.current_stream(device):
                torch.accelerator.set_stream(cast("torch.Stream", stream))
        return on_device()

    return act


def caller_streams() -> dict[torch.device, object]:
    """Return the calling thread's current stream on every device, without starting a driver that is not running.

    Where the driver does not run yet, loads use the device's default one.
    """
    kind = _running()
    if kind is None:
        return {}
    return {
        torch.device(kind.type, index): torch.accelerator.current_stream(index)
        for index in range(torch.accelerator.device_count())
    }


def used_here(tensor: torch.Tensor) -> None:
    """Note that the calling thread's current stream uses a tensor, which may have been allocated on another one.

    When the tensor is let go, the caching allocator then waits for what that stream has been given, before it hands the
    memory out again: to the blocks that follow, for one. On the stream of its allocation this does nothing.
    """
    if tensor.device.type not in ("cpu", "meta"):
        tensor.record_stream(torch.accelerator.current_stream(tensor.device))


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes this process can still allocate on a device, or None where that is not known.

    What the caching allocator holds without using it counts as free.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, _ = module.mem_get_info(device)
    return int(free) + int(module.memory_reserved(device)) - int(module.memory_allocated(device))


def numa_node_of(device: torch.device, *, devices: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """Return the memory node that a device's PCI slot belongs to, as the kernel knows it, or None."""
    found = torch.get_device_module(device).get_device_properties(device)
    try:
        slot = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        node = int((devices / slot / "numa_node").read_text())
    except (AttributeError, OSError, ValueError):  # an older torch, or a container without /sys
        return None
    return node if node >= 0 else None


@contextmanager
def _current(stream: torch.Stream) -> Generator[None, None, None]:
    """Make a stream the calling thread's current one. A stream as a context itself would serve one thread at a time."""
    before = torch.accelerator.current_stream(stream.device)
    if before == stream:
        yield
        return
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


class _PolledEvent:
    """Waits by asking: `torch.Event` has no wait that lets the thread sleep."""

    def __init__(self, event: torch.Event) -> None:
        self._event = event

    def synchronize(self) -> None:
        while not self.query():
            time.sleep(0.0002)

    def query(self) -> bool:
        return self._event.query()


class AcceleratorBackend:
    """See `Backend`. Copies go over one stream of this object's own.

    Args:
        device: with an index.
    """

    lands = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pinnable = device.type == "cuda"
        self.numa_node = numa_node_of(device)
        self._copies = torch.Stream(device)

    def pin(self, memory: mmap.mmap) -> Callable[[], None] | None:
        """Page-lock memory in place, with cudaHostRegister.

        torch's own pinned pool rounds sizes up to powers of two and keeps the memory after its user is gone.
        """
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        runtime = cast("Any", torch.cuda.cudart())  # type: ignore[no-untyped-call]  # torch has no types here
        with torch.cuda.device(self.device):
            if int(runtime.cudaHostRegister(address, len(memory), _PORTABLE)) != 0:
                return None

        def unpin() -> None:
            runtime.cudaHostUnregister(address)

        return unpin

    def allocate(self, num_bytes: int, stream: object) -> tuple[torch.Tensor, memoryview | None]:
        with _current(self._stream(stream)):
            block = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        self.follow(stream)
        return block, None

    def follow(self, stream: object) -> None:
        self._copies.wait_stream(self._stream(stream))

    def submitting(self) -> AbstractContextManager[None]:
        return _current(self._copies)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        with _current(self._copies):
            destination.copy_(source, non_blocking=True)

    def spread(self, source: torch.Tensor, parts: Sequence[Spread]) -> None:
        with _current(self._copies):
            bounce = source.to(self.device, non_blocking=True)  # freed below, for reuse behind it on this stream
            same = [part for part in parts if part.destination.dtype is part.dtype]
            if same:
                foreach_copy(
                    [part.destination.view(torch.uint8) for part in same],
                    [bounce[part.offset : part.offset + part.num_bytes] for part in same],
                )
            for part in parts:
                if part.destination.dtype is not part.dtype:
                    cast_or_copy(part.destination, bounce[part.offset : part.offset + part.num_bytes], part.dtype)

    def record(self) -> Event | None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # nor here
            with _current(self._copies):
                event.record(torch.cuda.current_stream(self.device))
            return event
        generic = torch.Event(self.device)
        generic.record(self._copies)
        return _PolledEvent(generic)

    def run(self, action: Callable[[], None], stream: object) -> None:
        user = self._stream(stream)
        with _current(user):
            action()
        user.synchronize()

    def _stream(self, stream: object) -> torch.Stream:
        if isinstance(stream, torch.Stream):
            return stream
        module = torch.get_device_module(self.device)
        default = module.default_stream(self.device) if hasattr(module, "default_stream") else None
        return default if default is not None else torch.accelerator.current_stream(self.device)
