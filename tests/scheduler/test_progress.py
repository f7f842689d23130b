"""Progress is a snapshot that only ever grows, and its last one is the end."""

from __future__ import annotations

import asyncio
import itertools
import threading
from pathlib import Path

import pytest
import torch

from tests.builders import write_in_order
from tests.fakes.rig import Rig
from tests.models import SmallNet, tensors_of
from weightstream.api import load_sync
from weightstream.config import LoaderConfig
from weightstream.errors import ReadError
from weightstream.scheduler.report import Progress, State


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_in_order(tmp_path, tensors_of(SmallNet()))


def on_meta() -> SmallNet:
    with torch.device("meta"):
        return SmallNet()


STATES = ["preflight", "loading", "finishing", "done", "failed"]


def assert_grows(snapshots: list[Progress]) -> None:
    for one, other in itertools.pairwise(snapshots):
        assert one.bytes_read <= other.bytes_read
        assert one.bytes_placed <= other.bytes_placed
        assert one.tensors_ready <= other.tensors_ready
        assert one.elapsed_s <= other.elapsed_s
        assert STATES.index(one.state) <= STATES.index(other.state)


async def test_events_grow_and_end_with_everything_done(rig: Rig, path: Path) -> None:
    model = on_meta()
    gate = rig.disk.stop_at(3)
    async with rig.loader(workers=1) as loader:
        handle = await loader.start(model, path)
        events = handle.events()
        snapshots = [await anext(events)]  # at once, whatever the load does
        gate.wait_reached()
        snapshots.append(handle.progress)
        gate.open()
        snapshots += [event async for event in events]
        report = await handle.wait()
    assert_grows(snapshots)
    last = snapshots[-1]
    assert last == handle.progress
    assert last.state == "done"
    assert last.bytes_read == last.bytes_placed == last.total_bytes == report.num_bytes
    assert last.tensors_ready == last.total_tensors == report.num_tensors
    assert last.elapsed_s == report.wall_s


async def test_events_of_a_failed_load_end_with_how_far_it_came(rig: Rig, path: Path) -> None:
    rig.disk.fail_at(4, ReadError("broken"))
    async with rig.loader(workers=1) as loader:
        handle = await loader.start(on_meta(), path)
        snapshots = [event async for event in handle.events()]
        with pytest.raises(ReadError):
            await handle.wait()
    assert_grows(snapshots)
    assert snapshots[-1].state == "failed"
    assert 0 < snapshots[-1].bytes_read < snapshots[-1].total_bytes


async def test_two_who_watch_see_the_same_end(rig: Rig, path: Path) -> None:
    async with rig.loader() as loader:
        handle = await loader.start(on_meta(), path)

        async def last() -> Progress:
            return [event async for event in handle.events()][-1]

        one, other = await asyncio.gather(last(), last())
    assert one == other


async def test_progress_of_a_stream(rig: Rig, path: Path) -> None:
    async with rig.loader() as loader, loader.stream(path) as stream:
        assert [name async for name, _ in stream]
        report = await stream.report()
        assert stream.progress.bytes_placed == report.num_bytes


async def test_module_and_time_left_are_told(rig: Rig, path: Path) -> None:
    async with rig.loader(workers=1) as loader:
        handle = await loader.start(on_meta(), path)
        await handle.wait()
        assert handle.progress.current_module in dict(on_meta().named_modules())
        assert handle.progress.eta_s == 0.0


@pytest.mark.parametrize(
    ("placed", "state", "eta_s"), [(0, "loading", None), (25, "loading", 6.0), (100, "done", 0.0), (0, "done", 0.0)]
)
def test_time_left_goes_on_at_the_average_rate(placed: int, state: State, eta_s: float | None) -> None:
    assert Progress(state, placed, placed, 100, 0, 1, 2.0).eta_s == eta_s


async def test_callback_sees_what_events_yield(rig: Rig, path: Path) -> None:
    snapshots: list[Progress] = []
    async with rig.loader() as loader:
        report = await loader.load(on_meta(), path, on_progress=snapshots.append)
    assert_grows(snapshots)
    assert snapshots[-1].state == "done"
    assert snapshots[-1].bytes_placed == report.num_bytes


async def test_error_of_the_callback_cancels_the_load(rig: Rig, path: Path) -> None:
    model, gate = on_meta(), rig.disk.stop_at(3)

    def fail(_: Progress) -> None:
        asyncio.get_running_loop().call_soon(gate.open)  # runs once the load has been stopped
        raise ArithmeticError("two and two")

    async with rig.loader(workers=1) as loader:
        with pytest.raises(ArithmeticError):
            await loader.load(model, path, on_progress=fail)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_callback_of_a_blocking_load_runs_in_its_thread(path: Path) -> None:
    threads: set[int] = set()
    states: list[str] = []

    def note(progress: Progress) -> None:
        threads.add(threading.get_ident())
        states.append(progress.state)

    load_sync(on_meta(), path, config=LoaderConfig(device={"target": "cpu"}), on_progress=note)  # type: ignore[arg-type]  # pydantic takes mappings
    assert threads == {threading.get_ident()}
    assert states[-1] == "done"
