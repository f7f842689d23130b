"""The devices that real models are filled on: the host, the fake accelerator, and CUDA where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.fakes.accelerator import FakeAccelerator
from weightstream.api import Loader
from weightstream.config import LoaderConfig
from weightstream.device.config import DeviceConfig
from weightstream.scheduler.machine import Machine
from weightstream.scheduler.report import LoadReport


@dataclass
class Target:
    """A device, and how to load onto it."""

    device: torch.device
    machine: Machine = field(default_factory=Machine)

    async def fill(self, model: nn.Module, checkpoint: Path) -> LoadReport:
        """Load with chunks small enough that even small models take several."""
        config = LoaderConfig(
            device=DeviceConfig(target=str(self.device)),
            prefetch={"chunk": "64KiB", "host_memory": "1MiB"},  # type: ignore[arg-type]  # as in YAML
        )
        async with Loader(config, machine=self.machine) as loader:
            return await loader.load(model, checkpoint)


@pytest.fixture(params=["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    if request.param != "fake":
        yield Target(torch.device(request.param))
        return
    fake = FakeAccelerator()
    yield Target(torch.device("cpu"), Machine(open_backend=lambda device: fake))
    fake.close()
    assert fake.num_copies > 0
    assert fake.hazards == []
