"""A machine for one test: which of the fakes it is made of, and the loads that run on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from tests.fakes.accelerator import FakeAccelerator
from tests.fakes.clock import VirtualClock
from tests.fakes.ring import PoisonedRing
from tests.fakes.source import Disk
from weightstream.api import Loader
from weightstream.config import LoaderConfig
from weightstream.device.accelerator import find_device
from weightstream.device.backend import Backend
from weightstream.prefetch.ring import Ring, RingStatistics, slot_bytes_for
from weightstream.scheduler import machine

__all__ = ["KIB", "Rig"]

KIB = 1024

DeviceKind = Literal["host", "fake", "cuda"]


class Rig:
    """Put together from a virtual clock, a disk, a poisoned ring, and the real host or a fake accelerator.

    Args:
        device: `host`: the real backend of host memory. `fake`: an accelerator. `cuda`: a real one, the first.
        io: layout of the chunks; see `Disk`.
        read_bytes_per_s, copy_bytes_per_s: speeds in virtual time.
        latency_s: of each read.
        accelerator: makes the fake.
        several: names of devices, each with a fake of its own, which a device map can have. They are indices of the
            CPU ("cpu:1"), which torch takes as devices of their own and puts into host memory.
    """

    def __init__(
        self,
        device: DeviceKind = "fake",
        *,
        io: Literal["buffered", "direct"] = "buffered",
        read_bytes_per_s: float | None = None,
        copy_bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        accelerator: Callable[..., FakeAccelerator] = FakeAccelerator,
        several: Sequence[str] = (),
    ) -> None:
        self.device = device
        #: Where parameters on meta go.
        self.target = "auto" if device == "cuda" else "cpu"
        self.io = io
        self.clock = VirtualClock()
        self.disk = Disk(self.clock, bytes_per_s=read_bytes_per_s, latency_s=latency_s, io=io)
        self.accelerator = accelerator(self.clock, bytes_per_s=copy_bytes_per_s)
        self.several = {name: accelerator(self.clock, bytes_per_s=copy_bytes_per_s) for name in several}
        for name, fake in self.several.items():
            fake.device = torch.device(name)
        self.rings: list[Ring] = []
        rings = self.rings

        class WatchedRing(PoisonedRing):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                rings.append(self)

        self.machine = machine.Machine(
            clock=self.clock,
            open_source=self.disk.open,
            open_backend=self._open_backend,
            find_device=self._find_device,
            ring=WatchedRing,
        )

    def loader(  # noqa: PLR0913 (settings, by name)
        self,
        *,
        chunk: int = 64 * KIB,
        num_slots: int | None = None,
        workers: int | Literal["auto"] = 2,
        host_memory: int | None = None,
        stall_s: float | None = None,
        scheduler: dict[str, Any] | None = None,
        strategy: str = "auto",
        verify: str = "none",
        page_cache: str = "keep",
        **device: Any,
    ) -> Loader:
        """Make a loader. `num_slots`: the ring has room for no more; `device`: settings of that section.

        `stall_s`: not the default, or virtual time would go on to it whenever a read waits at a gate.
        """
        if num_slots is not None:
            host_memory = num_slots * slot_bytes_for(chunk)
        prefetch: dict[str, Any] = {
            "workers": workers,
            "chunk": chunk,
            "host_memory": host_memory or 2**30,
            "io": self.io,
            "verify": verify,
            "page_cache": page_cache,
            "stall_s": stall_s,
        }
        sections: dict[str, Any] = {
            "strategy": strategy,
            "prefetch": prefetch,
            "scheduler": scheduler or {},
            "device": {"target": "auto" if "device_map" in device else self.target, **device},
        }
        return Loader(LoaderConfig(**sections), machine=self.machine)

    @property
    def ring(self) -> RingStatistics:
        """Of the loader that was made last."""
        return self.rings[-1].statistics()

    def close(self) -> None:
        """End the fakes, and fail if a slot was reused too early."""
        for accelerator in (self.accelerator, *self.several.values()):
            accelerator.close()
            assert accelerator.hazards == []

    def _find_device(self, target: str | int, setting: str = "device.target") -> torch.device:
        return torch.device(target) if target in self.several else find_device(target, setting)

    def _open_backend(self, device: torch.device) -> Backend:
        if str(device) in self.several:
            return self.several[str(device)]
        if self.device != "fake" or device.type == "meta":
            return machine.open_backend(device)
        return self.accelerator
