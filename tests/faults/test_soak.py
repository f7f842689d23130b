"""Many loads in one process: memory and threads stay what they were after the first few."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest
import torch

import weightstream as ws
from tests.builders import assert_same, open_files, write_in_order
from tests.fakes.accelerator import FakeAccelerator
from tests.fakes.ring import PoisonedRing
from tests.models import SmallNet, tensors_of
from weightstream.api import Loader
from weightstream.scheduler.engine import Machine, open_backend

KIB = 2**10

#: Memory and threads are compared with what they are after so many loads.
NUM_FIRST = 10
MOST_GROWTH = 0.01

TENSORS = tensors_of(SmallNet())


@pytest.fixture(name="path", scope="module")
def fixture_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_in_order(tmp_path_factory.mktemp("soak"), TENSORS, num_shards=2)


@pytest.fixture(name="machine", params=["host", "fake"])
def fixture_machine(request: pytest.FixtureRequest) -> Generator[Machine, None, None]:
    accelerator = FakeAccelerator()
    yield Machine(open_backend=open_backend if request.param == "host" else lambda _: accelerator, ring=PoisonedRing)
    accelerator.close()
    assert accelerator.hazards == []


async def load_many(machine: Machine, path: Path, count: int, *, per_loader: int) -> tuple[int, int]:
    """Load so many times; return resident bytes after the first few, and at the end."""
    sections = {"prefetch": {"chunk": 64 * KIB, "workers": 3, "host_memory": 2**20}, "device": {"target": "cpu"}}
    config = ws.LoaderConfig.model_validate(sections)
    process = psutil.Process()
    seen: list[tuple[int, int, int]] = []
    for begin in range(0, count, per_loader):
        async with Loader(config, machine=machine) as loader:
            for number in range(begin, min(begin + per_loader, count)):
                with torch.device("meta"):
                    model = SmallNet()
                await loader.load(model, path)
                if number in (NUM_FIRST, count - 1):
                    assert_same(model.large.weight.detach(), TENSORS["large.weight"])
                    del model
                    gc.collect()
                    seen.append((process.memory_info().rss, threading.active_count(), len(open_files())))
    (first_bytes, *first), (last_bytes, *last) = seen
    assert last == first
    return first_bytes, last_bytes


def check(machine: Machine, path: Path, count: int, per_loader: int) -> None:
    first_bytes, last_bytes = asyncio.run(load_many(machine, path, count, per_loader=per_loader))
    growth = (last_bytes - first_bytes) / first_bytes
    print(f"{count} loads, {per_loader} by each Loader: {first_bytes} bytes resident, {growth:+.2%} in the end")  # noqa: T201
    assert growth < MOST_GROWTH


@pytest.mark.parametrize("per_loader", [7, 1000], ids=["new loaders", "one loader"])
def test_loads_leave_no_memory_behind(machine: Machine, path: Path, per_loader: int) -> None:
    check(machine, path, 42, per_loader)


@pytest.mark.soak
@pytest.mark.parametrize("per_loader", [7, 1000], ids=["new loaders", "one loader"])
def test_five_hundred_loads_leave_no_memory_behind(machine: Machine, path: Path, per_loader: int) -> None:
    check(machine, path, 500, per_loader)
