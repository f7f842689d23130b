"""Many loads in one process: memory and threads stay what they were after the first few."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
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
from weightstream.scheduler.machine import Machine, open_backend

#: Memory and threads are compared with what they are after so many loads.
NUM_FIRST = 10
MOST_GROWTH = 0.01

TENSORS = tensors_of(SmallNet())


async def load_many(machine: Machine, target: str, path: str, count: int, per_loader: int) -> list[tuple[int, ...]]:
    """Load so many times.

    Return bytes resident, threads, descriptors and bytes on the device after the first few, and at the end.
    """
    sections = {"prefetch": {"chunk": "64KiB", "workers": 3, "host_memory": "1MiB"}, "device": {"target": target}}
    config = ws.LoaderConfig.model_validate(sections)
    seen: list[tuple[int, ...]] = []
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
                    on_device = torch.cuda.memory_allocated() if target == "cuda" else 0
                    resident = psutil.Process().memory_info().rss
                    seen.append((resident, threading.active_count(), len(open_files()), on_device))
    return seen


def main(device: str, path: str, count: str, per_loader: str) -> None:
    """Be the process that loads many times."""
    accelerator = FakeAccelerator()
    backend = (lambda _: accelerator) if device == "fake" else open_backend
    machine = Machine(open_backend=backend, ring=PoisonedRing)
    found = asyncio.run(load_many(machine, "cuda" if device == "cuda" else "cpu", path, int(count), int(per_loader)))
    accelerator.close()
    assert accelerator.hazards == []
    print(json.dumps(found))  # noqa: T201


@pytest.mark.parametrize("count", [42, pytest.param(500, marks=pytest.mark.soak)])
@pytest.mark.parametrize("per_loader", [7, 1000], ids=["new loaders", "one loader"])
@pytest.mark.parametrize("device", ["host", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_loads_leave_no_memory_behind(tmp_path: Path, device: str, per_loader: int, count: int) -> None:
    """In a process of their own, with the allocator as it is."""
    path = write_in_order(tmp_path, TENSORS, num_shards=2)
    program = "import sys; from tests.faults.test_soak import main; main(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, device, str(path), str(count), str(per_loader)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    (first_bytes, *first), (last_bytes, *last) = json.loads(done.stdout)
    growth = (last_bytes - first_bytes) / first_bytes
    print(f"{count} loads onto {device}, {per_loader} by each Loader: {first_bytes} bytes, {growth:+.2%} in the end")  # noqa: T201
    assert last == first
    assert growth < MOST_GROWTH
