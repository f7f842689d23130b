"""Machines for loads, as fixtures; the conftest.py of a folder that wants them imports them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch

from tests.fakes.fuse import why_not
from tests.fakes.rig import Rig
from weightstream.device.accelerator import AcceleratorBackend
from weightstream.prefetch.memory import allocate

__all__ = ["device", "make_rig", "requires_fuse", "rig", "start_cuda"]

#: For tests that mount `filesystem.mounted`.
requires_fuse = pytest.mark.skipif(why_not() is not None, reason=f"no simulated file system: {why_not()}")


def start_cuda() -> None:
    """Make the driver open what it opens at the first copy, so that a test which counts descriptors counts ours."""
    backend = AcceleratorBackend(torch.device("cuda", 0))
    memory = allocate(4096)
    unpin = backend.pin(memory)
    assert unpin is not None
    block, _ = backend.allocate(4096, None)
    backend.copy(block, torch.frombuffer(memory, dtype=torch.uint8))
    event = backend.record()
    assert event is not None
    event.synchronize()
    unpin()


@pytest.fixture
def make_rig() -> Generator[Callable[..., Rig], None, None]:
    """Make rigs that are closed, and checked for hazards, at the end of the test."""
    rigs: list[Rig] = []

    def make(*args: Any, **options: Any) -> Rig:
        rigs.append(Rig(*args, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture(params=["host", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The real host, the fake accelerator, and CUDA where there is one."""
    return str(request.param)


@pytest.fixture(params=["buffered", "direct"])
def rig(request: pytest.FixtureRequest, device: str, make_rig: Callable[..., Rig]) -> Rig:
    """Both devices with both layouts of chunks."""
    return make_rig(device, io=request.param)
