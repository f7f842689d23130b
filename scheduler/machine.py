"""The parts of the machine that an engine works with, which tests replace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from weightstream.device.accelerator import AcceleratorBackend, find_device
from weightstream.device.backend import Backend, HostBackend, NowhereBackend
from weightstream.prefetch.arena import Arena
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.ring import Ring
from weightstream.prefetch.source import FileSource, Source
from weightstream.scheduler.clock import Clock, SystemClock

__all__ = ["Machine", "OpenSource", "open_backend"]


class OpenSource(Protocol):
    """Makes the source of one load; see `FileSource`."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        config: PrefetchConfig,
        *,
        pause: Callable[[float], bool],
        on_retry: Callable[[], None],
        on_fallback: Callable[[str], None],
    ) -> Source: ...


def open_backend(device: torch.device) -> Backend:
    """Make the backend of a device."""
    if device.type == "cpu":
        return HostBackend(Arena().allocate)
    if device.type == "meta":
        return NowhereBackend()
    return AcceleratorBackend(device)


@dataclass(frozen=True)
class Machine:
    """The parts of the machine that an engine works with. Tests replace them; users have no need to.

    Attributes:
        clock: time, conditions and threads.
        open_source: where bytes come from.
        open_backend: where they go.
        find_device: which device a setting stands for.
        ring: makes the ring.
    """

    clock: Clock = field(default_factory=SystemClock)
    open_source: OpenSource = FileSource
    open_backend: Callable[[torch.device], Backend] = open_backend
    find_device: Callable[..., torch.device] = find_device
    ring: type[Ring] = Ring
