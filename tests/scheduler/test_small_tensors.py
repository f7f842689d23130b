"""What a load of many small tensors costs besides work in Python: as much as one of a few, if it has as many bytes."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightstream as ws
from tests.builders import random_tensors, write_checkpoint
from tests.fakes.accelerator import FakeAccelerator
from weightstream.api import Loader
from weightstream.prefetch.readers import Condition, Thread
from weightstream.scheduler.clock import SystemClock
from weightstream.scheduler.machine import Machine

MIB = 2**20
NUM_BYTES = 8 * MIB


class Costs(NamedTuple):
    threads: int
    copies: int
    events: int
    locks: int
    lines: int


class Counting(FakeAccelerator):
    """Counts events, too."""

    num_events = 0

    def record(self) -> Any:
        self.num_events += 1
        return super().record()


class CountingClock(SystemClock):
    """Counts threads."""

    num_threads = 0

    def spawn(self, target: Callable[[], None], name: str) -> Thread:
        self.num_threads += 1
        return super().spawn(target, name)


class Lock:
    """Counts how often any of them is taken."""

    num_taken = 0

    def __init__(self, made: Callable[[], Any]) -> None:
        self._lock = made()

    def acquire(self, *args: Any, **options: Any) -> bool:
        Lock.num_taken += 1
        return bool(self._lock.acquire(*args, **options))

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *args: object) -> None:
        self._lock.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


async def costs_of(
    num_tensors: int, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Costs:
    path, shape = folder / f"{num_tensors}.safetensors", (NUM_BYTES // num_tensors // 4,)
    save_file({f"t{number}": torch.full(shape, float(number)) for number in range(num_tensors)}, path)
    model = nn.ParameterDict(
        {f"t{number}": nn.Parameter(torch.empty(shape, device="meta")) for number in range(num_tensors)}
    )
    clock = CountingClock()
    device = Counting()
    prefetch: Any = {"host_memory": NUM_BYTES, "chunk": MIB, "workers": 1, "io": "buffered"}
    settings = ws.LoaderConfig(prefetch=prefetch, strategy="stream")
    made = threading.Lock, threading.RLock
    caplog.clear()
    with monkeypatch.context() as patched:
        patched.setattr(threading, "Lock", lambda: Lock(made[0]))
        patched.setattr(threading, "RLock", lambda: Lock(made[1]))
        async with Loader(settings, machine=Machine(clock=clock, open_backend=lambda _: device)) as loader:
            before = Lock.num_taken
            report = await loader.load(model, path)
            taken = Lock.num_taken - before
    device.close()
    assert report.num_tensors == num_tensors
    assert all(float(model[f"t{number}"].detach()[0]) == number for number in range(num_tensors))
    return Costs(clock.num_threads, report.num_copies, device.num_events, taken, len(caplog.records))


async def test_threads_copies_events_locks_and_lines_do_not_grow_with_the_number_of_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="weightstream")
    few = await costs_of(64, tmp_path, monkeypatch, caplog)
    many = await costs_of(8192, tmp_path, monkeypatch, caplog)
    assert few.locks > 0
    assert few.events > 0
    assert many.threads == few.threads
    assert many.copies <= 2 * NUM_BYTES // MIB  # two for each chunk
    assert many.events <= 2 * NUM_BYTES // MIB
    assert many.lines == few.lines
    assert many.locks < few.locks + 1000  # they depend on who waits for whom; for each tensor it would be 8,192 more


class WatchedCondition(threading.Condition):
    """Notes whether garbage is collected whenever a load's own thread, which is who switches it off, begins to wait."""

    seen: ClassVar[list[bool]] = []

    def wait(self, timeout: float | None = None) -> bool:
        if threading.current_thread().name == "weightstream-load":
            self.seen.append(gc.isenabled())
        return super().wait(timeout)


class WatchedClock(SystemClock):
    def condition(self) -> Condition:
        return WatchedCondition()


async def test_garbage_is_collected_whenever_a_load_waits_and_after_it(tmp_path: Path) -> None:
    tensors = random_tensors({f"t{number}": (256, 1024) for number in range(8)})
    path = write_checkpoint(tmp_path / "c", tensors)
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.empty_like(one, device="meta")) for name, one in tensors.items()}
    )
    device = FakeAccelerator()
    device.hold()
    prefetch: Any = {"host_memory": 4 * MIB, "chunk": MIB}
    machine = Machine(clock=WatchedClock(), open_backend=lambda _: device)
    WatchedCondition.seen.clear()
    async with Loader(ws.LoaderConfig(prefetch=prefetch, strategy="stream"), machine=machine) as loader:
        handle = await loader.start(model, path)
        device.release()
        await handle.wait()
    device.close()
    assert WatchedCondition.seen
    assert all(WatchedCondition.seen)
    assert gc.isenabled()


class LoadsItself(nn.Module):
    """Many small parameters that have storage, all of which are loaded beside it."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(1000):
            self.register_parameter(f"t{number}", nn.Parameter(torch.ones(3)))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)


def test_small_tensors_beside_the_model_count_with_the_gaps_between_them(tmp_path: Path) -> None:
    held_bytes = 1000 * 256
    path = write_checkpoint(tmp_path / "c", {f"t{number}": torch.zeros(3) for number in range(1000)})

    def load(host_memory: int) -> ws.LoadReport:
        prefetch = {"chunk": 64 * 2**10, "host_memory": host_memory}
        config = ws.LoaderConfig.model_validate({"prefetch": prefetch, "device": {"target": "cpu"}})
        return ws.load_sync(LoadsItself(), path, config=config)

    with pytest.raises(ws.MemoryBudgetError, match=f"expected {held_bytes} bytes, found {held_bytes - 1} bytes"):
        load(held_bytes - 1)
    assert load(held_bytes).host_peak_bytes <= held_bytes
