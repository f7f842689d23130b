"""A machine for one test: which of the fakes it is made of, and the loads that run on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from tests.fakes.accelerator import FakeAccelerator
from tests.fakes.clock import VirtualClock
from tests.fakes.ring import PoisonedRing
from tests.fakes.source import Disk
from weightstream.api import Loader
from weightstream.config import LoaderConfig
from weightstream.device.backend import Backend
from weightstream.prefetch.ring import Ring, RingStatistics, slot_bytes_for
from weightstream.scheduler import engine

__all__ = ["KIB", "Rig"]

KIB = 1024

DeviceKind = Literal["host", "fake"]


class Rig:
    """Put together from a virtual clock, a disk, a poisoned ring, and the real host or a fake accelerator.

    Args:
        device: `host`: the real backend of host memory. `fake`: an accelerator.
        io: layout of the chunks; see `Disk`.
        read_bytes_per_s, copy_bytes_per_s: speeds in virtual time.
        latency_s: of each read.
        accelerator: makes the fake.
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
    ) -> None:
        self.device = device
        self.io = io
        self.clock = VirtualClock()
        self.disk = Disk(self.clock, bytes_per_s=read_bytes_per_s, latency_s=latency_s, io=io)
        self.accelerator = accelerator(self.clock, bytes_per_s=copy_bytes_per_s)
        self.rings: list[Ring] = []
        rings = self.rings

        class WatchedRing(PoisonedRing):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                rings.append(self)

        self.machine = engine.Machine(
            clock=self.clock, open_source=self.disk.open, open_backend=self._open_backend, ring=WatchedRing
        )

    def loader(
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
            "stall_s": stall_s,
        }
        sections: dict[str, Any] = {
            "strategy": strategy,
            "prefetch": prefetch,
            "scheduler": scheduler or {},
            "device": {"target": "cpu", **device},
        }
        return Loader(LoaderConfig(**sections), machine=self.machine)

    @property
    def ring(self) -> RingStatistics:
        """Of the loader that was made last."""
        return self.rings[-1].statistics()

    def close(self) -> None:
        """End the fake, and fail if a slot was reused too early."""
        self.accelerator.close()
        assert self.accelerator.hazards == []

    def _open_backend(self, device: torch.device) -> Backend:
        if self.device == "host" or device.type == "meta":
            return engine.open_backend(device)
        return self.accelerator
