"""Loads that are cancelled at a random moment: everything comes back, every time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

import weightstream as ws
from tests.builders import assert_same, bytes_of, leaves_nothing, open_files, write_in_order
from tests.fakes.accelerator import FakeAccelerator
from tests.fakes.fixtures import start_cuda
from tests.fakes.ring import PoisonedRing
from tests.models import SmallNet, tensors_of
from weightstream.api import Loader
from weightstream.errors import LoadCancelledError
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.handle import in_own_thread, settle
from weightstream.scheduler.machine import Machine, open_backend

KIB = 2**10

TENSORS = tensors_of(SmallNet())


@pytest.fixture(name="path", scope="module")
def fixture_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_in_order(tmp_path_factory.mktemp("cancelled"), TENSORS, num_shards=2)


@pytest.fixture(name="device", params=["host", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def fixture_device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        start_cuda()
    return str(request.param)


@pytest.fixture(name="machine")
def fixture_machine(device: str) -> Generator[Machine, None, None]:
    accelerator = FakeAccelerator(bytes_per_s=2e9)
    yield Machine(open_backend=(lambda _: accelerator) if device == "fake" else open_backend, ring=PoisonedRing)
    accelerator.close()
    assert accelerator.hazards == []


def target_of(device: str) -> str:
    return "cuda" if device == "cuda" else "cpu"


def on_meta() -> SmallNet:
    with torch.device("meta"):
        return SmallNet()


async def cancel_handle(loader: Loader, path: Path, delay_s: float) -> None:
    handle = await loader.start(on_meta(), path)
    await asyncio.sleep(delay_s)
    await handle.cancel()
    assert handle.progress.state in ("done", "failed")


async def cancel_task(loader: Loader, path: Path, delay_s: float) -> None:
    model = on_meta()
    before = list(model.parameters())
    task = asyncio.create_task(loader.load(model, path))
    await asyncio.sleep(delay_s)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        if all(parameter.is_meta for parameter in model.parameters()):
            assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
            return
    assert_loaded(model)  # all of it: it had just come to its end


async def cancel_in_place(loader: Loader, path: Path, delay_s: float) -> None:
    """Into parameters that have storage: what was changed is named, and nothing is changed any more afterwards."""
    with torch.device(loader._config.device.target):
        model = SmallNet()
    before = contents(model)
    handle = await loader.start(model, path)
    await asyncio.sleep(delay_s)
    await handle.cancel()
    after = contents(model)
    engine = loader._engine
    assert engine is not None
    await until_back(engine)
    assert contents(model) == after
    try:
        await handle.wait()
    except LoadCancelledError as error:
        named = set(error.partly_written)
        assert {name for name in before if after[name] != before[name]} <= named
    else:
        assert_loaded(model)


def contents(model: SmallNet) -> dict[str, bytes]:
    return {name: bytes_of(tensor) for name, tensor in model.state_dict().items()}


async def leave_stream(loader: Loader, path: Path, delay_s: float) -> None:
    async with loader.stream(path) as stream:
        async with asyncio.timeout(delay_s):
            async for name, tensor in stream:
                assert_same(tensor, TENSORS[name])


async def cancel_warming(loader: Loader, path: Path, delay_s: float) -> None:
    task = asyncio.create_task(loader.warm(path))
    await asyncio.sleep(delay_s)
    task.cancel()
    await asyncio.wait([task])


def assert_loaded(model: SmallNet) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, TENSORS[name])


async def until_back(engine: Engine) -> None:
    """Wait for reads that took so long that they were given up: on a busy machine some do, and all come back."""
    waited, thread = in_own_thread(lambda: engine.stragglers.wait(30))
    assert await settle(waited) == 0
    thread.join()


async def cancel_many(machine: Machine, device: str, path: Path, choose: random.Random, count: int, io: str) -> None:
    """Cancel so many loads, several of them at a time now and then."""
    prefetch = {"chunk": 64 * KIB, "workers": 3, "io": io, "host_memory": 8 * 2**20}  # two streams at once
    config = ws.LoaderConfig.model_validate({"prefetch": prefetch, "device": {"target": target_of(device)}})
    async with Loader(config, machine=machine) as loader:
        loop = asyncio.get_running_loop()
        await loader.load(on_meta(), path)  # the first one imports and begins threads
        began_s = loop.time()
        await loader.load(on_meta(), path)
        usual_s = loop.time() - began_s
        engine = loader._engine
        assert engine is not None
        begun = len(open_files())
        num_cut = 0
        for left in range(count, 0, -1):
            ways = choose.choices(
                [cancel_task, cancel_handle, cancel_in_place, leave_stream, cancel_warming], k=choose.choice([1, 1, 2])
            )
            delays_s = [choose.uniform(0, 1.2 * usual_s) for _ in ways]
            done = await asyncio.gather(
                *(way(loader, path, delay_s) for way, delay_s in zip(ways, delays_s, strict=True)),
                return_exceptions=True,
            )
            for error in done:
                assert error is None or isinstance(error, TimeoutError), (left, ways, delays_s, error)
            num_cut += any(done)
            await until_back(engine)
            found = engine.staging.ring.statistics()
            files = len(open_files())
            assert (found.num_free, found.num_written_off, files) == (found.num_slots, 0, begun), (left, ways, delays_s)
        model = on_meta()
        await loader.load(model, path)
        assert_loaded(model)
        taken = engine.staging.budget.limit_bytes - engine.staging.budget.left_bytes
        assert taken == engine.staging.account.held_bytes == engine.staging.ring.statistics().num_bytes
        print(f"{num_cut} of {count} cut off, {engine.staging.ring.statistics().num_recovered} slots came back late")  # noqa: T201
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_loads_that_are_cancelled_at_any_moment_leave_nothing(
    machine: Machine, device: str, path: Path, choose: random.Random, io: str
) -> None:
    with leaves_nothing():
        asyncio.run(cancel_many(machine, device, path, choose, 15, io))


@pytest.mark.soak
@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_a_thousand_loads_that_are_cancelled_leave_nothing(
    machine: Machine, device: str, path: Path, choose: random.Random, io: str
) -> None:
    with leaves_nothing():
        asyncio.run(cancel_many(machine, device, path, choose, 1000, io))
