"""What a Loader survives: failed copies, impatient cancellation, forgotten streams, several users of one budget."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightstream as ws
from tests.builders import leaves_nothing, write_sums
from tests.fakes.accelerator import FakeAccelerator
from tests.fakes.clock import VirtualClock
from tests.fakes.rig import Rig
from weightstream.api import Loader
from weightstream.errors import LoadTimeoutError
from weightstream.prefetch.readers import Thread
from weightstream.scheduler import pinning
from weightstream.scheduler.clock import SystemClock
from weightstream.scheduler.loader import Loader as SchedulerLoader
from weightstream.scheduler.machine import Machine

MIB = 2**20

MakeRig = Callable[..., Rig]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Eight tensors of 1 MiB."""
    target = tmp_path / "model.safetensors"
    save_file({f"t{i}": torch.full((256, 1024), float(i)) for i in range(8)}, target)
    return target


def config(**prefetch: Any) -> ws.LoaderConfig:
    given = {"host_memory": 8 * MIB, "chunk": MIB} | prefetch
    return ws.LoaderConfig(prefetch=given, device={"target": "cpu"})  # type: ignore[arg-type]  # pydantic makes them


def model_of(path: Path, *, device: str) -> nn.ParameterDict:
    return nn.ParameterDict({f"t{i}": nn.Parameter(torch.zeros(256, 1024, device=device)) for i in range(8)})


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("weightstream-")]


class Failing(FakeAccelerator):
    """Has no memory left for its first so many blocks."""

    num_failures = 0

    def allocate(self, num_bytes: int, stream: object) -> tuple[torch.Tensor, memoryview | None]:
        if self.num_failures:
            self.num_failures -= 1
            raise torch.OutOfMemoryError("no memory")
        return super().allocate(num_bytes, stream)


async def test_copies_that_cannot_be_submitted_cost_no_slot(path: Path) -> None:
    clock = SystemClock()
    device = Failing(clock)
    device.num_failures = 3
    machine = Machine(clock=clock, open_backend=lambda _: device)
    async with Loader(config(), machine=machine) as loader:
        model = model_of(path, device="meta")
        for _ in range(3):
            with pytest.raises(ws.MemoryBudgetError, match="no memory left"):
                await loader.load(model, path)
            assert all(parameter.is_meta for parameter in model.values())
        assert loader._engine is not None
        found = loader._engine.staging.ring.statistics()
        assert found.num_free == found.num_slots
        await loader.load(model, path)
    assert not device.hazards


class Exhausted(SystemClock):
    """Has no more threads for what begins with a name, as a container that may have so many and no more."""

    name: str | None = None

    def spawn(self, target: Callable[[], None], name: str) -> Thread:
        if self.name is not None and name.startswith(self.name):
            raise RuntimeError("can't start new thread")
        return super().spawn(target, name)


@pytest.mark.parametrize(
    "name", ["weightstream-load", "weightstream-copies", "weightstream-hash", "weightstream-files"]
)
async def test_thread_that_cannot_be_had_ends_the_load_and_no_more(path: Path, name: str) -> None:
    write_sums(path.parent)
    clock = Exhausted()
    device = FakeAccelerator(clock)
    machine = Machine(clock=clock, open_backend=lambda _: device)
    async with Loader(config(verify="sha256"), machine=machine) as loader:
        model = model_of(path, device="meta")
        clock.name = name
        with pytest.raises(RuntimeError, match="new thread"):
            await loader.load(model, path)
        assert all(parameter.is_meta for parameter in model.values())
        assert loader._engine is not None
        found = loader._engine.staging.ring.statistics()
        assert found.num_free == found.num_slots
        clock.name = None
        await loader.load(model, path)
    assert not device.hazards


@pytest.mark.parametrize("names", [("weightstream-load",), ("weightstream-load", "weightstream-call")], ids=len)
@pytest.mark.parametrize("how", ["load_sync", "iter_tensors"])
def test_blocking_function_raises_where_no_thread_can_be_had(
    path: Path, how: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, exhausted = threading.Thread.start, [True]

    def refuse(thread: threading.Thread) -> None:
        if exhausted[0] and thread.name in names:
            raise RuntimeError("can't start new thread")
        start(thread)

    def run() -> list[object]:
        if how == "load_sync":
            return [ws.load_sync(model_of(path, device="meta"), path, config=config())]
        return list(ws.iter_tensors(path, config()))

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with leaves_nothing():
        with pytest.raises(RuntimeError, match="new thread"):
            run()
        exhausted[0] = False
        assert run()


async def test_ring_is_page_locked_without_a_thread_of_its_own_where_none_can_be_had(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pinning, "threading", SimpleNamespace(Thread=Refused))
    device = FakeAccelerator()
    async with Loader(config(), machine=Machine(open_backend=lambda _: device)) as loader:
        report = await loader.load(model_of(path, device="meta"), path)
    assert report.pinned_bytes > 0


class Broken(logging.Handler):
    """A handler of the program's log that raises, whatever it is given."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ValueError("the disk is full")


@pytest.fixture(name="broken_log")
def fixture_broken_log() -> Generator[None, None, None]:
    logger, handler = logging.getLogger("weightstream"), Broken()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield
    logger.setLevel(before)
    logger.removeHandler(handler)


@pytest.mark.usefixtures("broken_log")
class TestLogThatCannotBeWritten:
    """Lines are written while things are on their way back, and all of them come back."""

    @pytest.mark.parametrize("strategy", ["stream", "map"])
    def test_loads_go_on(self, path: Path, strategy: str, capfd: pytest.CaptureFixture[str]) -> None:
        settings = config().model_copy(update={"strategy": strategy})
        with leaves_nothing():
            assert ws.load_sync(model_of(path, device="meta"), path, config=settings).num_tensors == 8
        assert "the disk is full" in capfd.readouterr().err

    async def test_slots_are_locked_or_settled_where_page_locking_is_refused(self, path: Path) -> None:
        """Who waits for a slot to settle would wait for ever."""
        device = FakeAccelerator(refuses_pinning=True)
        async with Loader(config(), machine=Machine(open_backend=lambda _: device)) as loader:
            for _ in range(2):  # the second finds that it was refused before
                report = await loader.load(model_of(path, device="meta"), path)
                assert report.pinned_bytes == 0
                assert any("page-locking" in one for one in report.fallbacks)
            engine = loader._engine
            assert engine is not None
            engine.staging.make_room(engine.staging.budget.limit_bytes)
            assert engine.staging.ring.statistics().num_slots == 0  # nobody is said to use it any more
        device.close()

    @pytest.mark.parametrize("is_cached", [True, False], ids=["into parameters", "into slots"])
    async def test_read_that_was_given_up_comes_back(
        self, make_rig: MakeRig, path: Path, monkeypatch: pytest.MonkeyPatch, *, is_cached: bool
    ) -> None:
        rig = make_rig("host")
        rig.disk.is_cached = is_cached
        gate = rig.disk.stop_at(0, is_stuck=True)
        with leaves_nothing():
            async with rig.loader(workers=1, num_slots=2, stall_s=7.0, strategy="stream") as loader:
                with pytest.raises(LoadTimeoutError, match="a read does not return") as caught:
                    await loader.load(model_of(path, device="cpu"), path)
                assert bool(caught.value.partly_written) == is_cached
                engine = loader._engine
                assert engine is not None
                stragglers, gone = engine.stragglers, threading.Event()
                discard = stragglers.discard

                def discard_and_tell(load: object) -> None:
                    discard(load)
                    gone.set()

                monkeypatch.setattr(stragglers, "discard", discard_and_tell)
                gate.open()
                assert gone.wait(30)  # all that it kept has come back before that
                assert stragglers.wait(0) == 0
                assert rig.ring.num_free == rig.ring.num_slots
                await loader.load(model_of(path, device="cpu"), path)


class Pageable(FakeAccelerator):
    """Takes a second for each copy and makes its caller wait, as copies from memory do that is not page-locked."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        assert isinstance(self._clock, VirtualClock)
        self._clock.sleep(1.0)
        super().copy(destination, source)


async def test_load_that_is_never_idle_still_has_its_time_limit(make_rig: Callable[..., Rig], path: Path) -> None:
    rig = make_rig(accelerator=Pageable)
    rig.accelerator.refuses_pinning = True
    async with rig.loader(chunk=MIB, scheduler={"timeout_s": 3.5}) as loader:
        with pytest.raises(ws.LoadTimeoutError, match="took too long"):
            await loader.load(model_of(path, device="meta"), path)
    assert rig.accelerator.num_copies == 4


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_load_that_is_cancelled_again_and_again_is_cleaned_up_before_it_returns(path: Path, times: int) -> None:
    gate = threading.Event()

    class Blocked(FakeAccelerator):
        def follow(self, stream: object) -> None:
            gate.wait(30)
            super().follow(stream)

    clock = SystemClock()
    device = Blocked(clock)
    model = model_of(path, device="meta")
    async with Loader(config(), machine=Machine(clock=clock, open_backend=lambda _: device)) as loader:
        handle = await loader.start(model, path)  # the preflight has passed, and the load's thread is at the gate
        task = asyncio.create_task(handle.cancel())
        for _ in range(times):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert handle.progress.state == "failed"
        assert all(parameter.is_meta for parameter in model.values())


async def test_loader_whose_opening_is_cancelled_leaves_nothing() -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with Loader(config()):
            pytest.fail("it was cancelled")
    assert scope.cancelled_caught
    assert own_threads() == []
    assert len(asyncio.all_tasks()) == 1


async def test_loader_that_is_closed_under_cancellation_ends_its_threads() -> None:
    loader = Loader(config())
    await loader.__aenter__()
    closing = asyncio.create_task(loader.__aexit__(None, None, None))
    for _ in range(3):
        await asyncio.sleep(0)
        closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert own_threads() == []


async def count(loader: SchedulerLoader, path: Path) -> int:
    return sum([1 async for _ in loader.stream(path)])


async def test_streams_share_the_budget(path: Path) -> None:
    async with Loader(config()) as loader:
        assert list(await asyncio.gather(count(loader, path), count(loader, path))) == [8, 8]


async def test_ring_of_a_load_that_has_ended_makes_room_for_a_stream(path: Path) -> None:
    async with Loader(config()) as loader:
        model = model_of(path, device="cpu").double()  # a cast takes slots
        await loader.load(model, path)
        assert loader._engine is not None
        assert loader._engine.staging.ring.statistics().num_slots > 0
        assert await count(loader, path) == 8


async def test_stream_leaves_room_for_a_load_into_memory_that_is_there(path: Path) -> None:
    model = model_of(path, device="cpu")
    async with Loader(config()) as loader, loader.stream(path) as stream:
        await anext(stream)
        await loader.load(model, path)
    assert [int(model[f"t{i}"][0, 0]) for i in range(8)] == list(range(8))


async def test_stream_that_is_forgotten_gives_its_budget_back(path: Path) -> None:
    async with Loader(config()) as loader:
        async for _ in loader.stream(path):
            break
        gc.collect()
        assert loader._engine is not None
        with anyio.fail_after(30):
            while loader._engine.staging.budget.left_bytes < 8 * MIB:  # noqa: ASYNC110 (nothing tells when)
                await asyncio.sleep(0.001)


async def test_tensors_that_have_not_been_delivered_count_after_the_load_too(path: Path) -> None:
    async with Loader(config(host_memory=64 * MIB)) as loader:
        engine = loader._engine
        assert engine is not None

        def counted() -> tuple[int, int]:
            """In the account, and of the budget; without the ring."""
            ring_bytes = engine.staging.ring.statistics().num_bytes
            return (
                engine.staging.account.held_bytes - ring_bytes,
                64 * MIB - engine.staging.budget.left_bytes - ring_bytes,
            )

        async with loader.stream(path) as stream:
            report = await stream.report()
            assert counted() == (8 * MIB, 8 * MIB)
            for _ in range(3):
                await anext(stream)
            assert counted() == (5 * MIB, 5 * MIB)
        assert counted() == (0, 0)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert 8 * MIB <= report.host_peak_bytes <= 64 * MIB

        stream = loader.stream(path)
        await stream.report()
        assert counted() == (8 * MIB, 8 * MIB)
        del stream
        gc.collect()
        assert counted() == (0, 0)


def test_iterator_that_the_collector_closes_on_a_thread_of_ours_does_not_wait_for_itself(path: Path) -> None:
    iterator = ws.iter_tensors(path, config())
    next(iterator)
    closer = threading.Thread(target=iterator.close, name="weightstream-load")  # type: ignore[attr-defined]
    closer.start()
    closer.join(30)
    assert not closer.is_alive()


def test_tensors_that_are_only_copied_at_the_end_count_towards_the_budget(tmp_path: Path) -> None:
    weight = torch.randn(1024, 4096)
    save_file({"a.weight": weight, "b.weight": weight.clone()}, tmp_path / "tied.safetensors")
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(4096, 1024, bias=False), "b": nn.Linear(4096, 1024, bias=False)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ws.MemoryBudgetError, match=f"host_memory to {16 * MIB} bytes"):
        ws.load_sync(model, tmp_path / "tied.safetensors", config=config())
    assert model["a"].weight.is_meta
    ws.load_sync(model, tmp_path / "tied.safetensors", config=config(host_memory=16 * MIB))
    assert model["b"].weight is model["a"].weight
    assert torch.equal(weight, model["a"].weight)  # type: ignore[arg-type]  # nn.ModuleDict knows no types


def test_page_cache_is_warmed_through_the_page_cache_whatever_io_says(path: Path) -> None:
    async def warm() -> ws.LoadReport:
        async with Loader(config(io="direct")) as loader:
            return await loader.warm(path)

    report = asyncio.run(warm())
    assert report.device == "page-cache"
    assert report.fallbacks == ()


def test_model_that_is_no_module_is_a_type_error(path: Path) -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, found dict"):
        ws.load_sync({}, path, config=config())  # type: ignore[arg-type]  # that is the point
