"""Tensors without a model: all of them, in order, and no further ahead of the consumer than memory allows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.builders import assert_same, leaves_nothing, write_in_order
from tests.fakes.rig import KIB, Rig
from tests.models import SmallNet, tensors_of
from weightstream import api
from weightstream.api import iter_tensors
from weightstream.config import LoaderConfig
from weightstream.errors import MemoryBudgetError, PlacementError, ReadError
from weightstream.scheduler.report import Progress
from weightstream.scheduler.timeline import Recorder

MakeRig = Callable[..., Rig]
CHUNK = 64 * KIB


def mixed(folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """Small and large tensors, a scalar and an empty one, aligned to nothing, in two shards."""
    tensors = tensors_of(SmallNet())
    return tensors, write_in_order(folder, tensors, num_shards=2)


def equal(folder: Path, count: int = 40) -> tuple[dict[str, torch.Tensor], Path]:
    """Tensors of one chunk each."""
    tensors = {f"t{i}": torch.randint(256, (CHUNK,), dtype=torch.uint8) for i in range(count)}
    return tensors, write_in_order(folder, tensors)


def assert_stream(found: list[tuple[str, torch.Tensor]], tensors: dict[str, torch.Tensor]) -> None:
    assert [name for name, _ in found] == list(tensors)
    for name, tensor in found:
        assert_same(tensor, tensors[name])


@pytest.mark.parametrize("workers", [1, 4], ids=["1-worker", "4-workers"])
async def test_every_tensor_comes_in_the_order_of_the_files(rig: Rig, tmp_path: Path, workers: int) -> None:
    tensors, path = mixed(tmp_path)
    async with rig.loader(workers=workers) as loader, loader.stream(path) as stream:
        found = [item async for item in stream]
        report = await stream.report()
    assert_stream(found, tensors)
    assert report.num_tensors == len(tensors)


async def test_order_holds_where_reads_overtake_each_other(rig: Rig, tmp_path: Path) -> None:
    tensors, path = equal(tmp_path)
    gate = rig.disk.stop_at(0, is_stuck=True)
    async with rig.loader(workers=3) as loader, loader.stream(path) as stream:
        gate.wait_reached()
        rig.clock.wait_idle()  # until everything else has been read
        gate.open()
        assert_stream([item async for item in stream], tensors)


async def test_tensors_are_cast_where_asked(rig: Rig, tmp_path: Path) -> None:
    tensors, path = mixed(tmp_path)
    async with rig.loader(dtype="bfloat16") as loader, loader.stream(path) as stream:
        async for name, tensor in stream:
            expected = tensors[name]
            assert_same(tensor, expected.bfloat16() if expected.is_floating_point() else expected)


async def test_readers_stay_within_the_window(rig: Rig, tmp_path: Path) -> None:
    """8 chunks fit; nobody takes anything, so no more is read, and more is as soon as somebody does."""
    tensors, path = equal(tmp_path)
    window = 8 * (CHUNK + 8192)
    async with rig.loader(workers=2, host_memory=window) as loader, loader.stream(path) as stream:
        rig.clock.wait_idle()
        most = rig.disk.num_bytes_begun
        assert CHUNK <= most <= window

        found = [await anext(stream)]
        rig.clock.wait_idle()
        assert most < rig.disk.num_bytes_begun <= most + CHUNK
        found += [item async for item in stream]
        assert_stream(found, tensors)
        report = await stream.report()
    assert report.host_peak_bytes <= window
    assert rig.disk.num_bytes_begun == report.num_bytes > 4 * window


async def test_closed_early_stops_reading_and_cleans_up(rig: Rig, tmp_path: Path) -> None:
    tensors, path = equal(tmp_path)
    with leaves_nothing():
        async with rig.loader(workers=2, host_memory=8 * (CHUNK + 8192)) as loader:
            stream = loader.stream(path)
            kept = [await anext(stream) for _ in range(3)]
            await stream.aclose()
            await stream.aclose()  # as often as you like
            assert rig.disk.num_open == 0
            assert rig.ring.num_free == rig.ring.num_slots
            assert rig.disk.num_begun < len(tensors)
            for name, tensor in kept:  # the consumer's memory
                assert_same(tensor, tensors[name])
            async with loader.stream(path) as again:  # with all of the window
                assert_stream([item async for item in again], tensors)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_error_on_the_way_comes_out_of_the_iteration(rig: Rig, tmp_path: Path) -> None:
    _, path = equal(tmp_path)
    error = ReadError("the disk is broken")
    rig.disk.fail_at(20, error)
    async with rig.loader(workers=1, host_memory=8 * (CHUNK + 8192)) as loader:
        stream = loader.stream(path)
        with pytest.raises(ReadError) as caught:
            async for _ in stream:
                pass
        assert caught.value is error
        with pytest.raises(ReadError):
            await stream.report()
        assert rig.ring.num_free == rig.ring.num_slots


async def test_cancelled_step_loses_no_tensor(rig: Rig, tmp_path: Path) -> None:
    tensors, path = equal(tmp_path, count=5)
    gate = rig.disk.stop_at(0)
    async with rig.loader(workers=1) as loader, loader.stream(path) as stream:
        step = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        gate.open()
        assert_stream([item async for item in stream], tensors)


async def test_second_consumer_is_refused_and_the_first_gets_everything(rig: Rig, tmp_path: Path) -> None:
    """Only one is told when there is more: the other would wait for ever."""
    tensors, path = equal(tmp_path)
    gate = rig.disk.stop_at(0)
    async with rig.loader(workers=1) as loader, loader.stream(path) as stream:

        async def consume() -> list[tuple[str, torch.Tensor]]:
            return [item async for item in stream]

        first = asyncio.create_task(consume())
        await asyncio.sleep(0)  # it waits: nothing has been read
        with pytest.raises(RuntimeError, match="another task"):
            await anext(stream)
        gate.open()
        assert_stream(await first, tensors)


async def test_tensor_larger_than_host_memory_names_what_it_needs(make_rig: MakeRig, tmp_path: Path) -> None:
    tensors = {"small": torch.zeros(8), "large": torch.rand(100 * KIB)}
    path = write_in_order(tmp_path, tensors)
    async with make_rig("host").loader(num_slots=2) as loader:
        with pytest.raises(MemoryBudgetError, match=r"prefetch\.host_memory to 409600 bytes") as caught:
            async for _ in loader.stream(path):
                pass
    assert caught.value.expected == "409600 bytes"
    async with make_rig("host").loader(host_memory=409600) as loader:
        assert_stream([item async for item in loader.stream(path)], tensors)


@pytest.mark.parametrize("room", [409600, 409600 + 512], ids=["for-one", "for-two"])
async def test_small_tensors_around_a_large_one_do_not_wait_for_it(
    make_rig: MakeRig, tmp_path: Path, room: int
) -> None:
    """They must not share a block across it: it would be held until the last has come, which comes after it."""
    tensors = {"small": torch.zeros(8), "large": torch.rand(100 * KIB), "last": torch.rand(8)}
    path = write_in_order(tmp_path, tensors)
    async with make_rig("host").loader(host_memory=room) as loader, loader.stream(path) as stream:
        assert_stream([item async for item in stream], tensors)


@pytest.mark.parametrize("io", ["buffered", "direct"])
async def test_tensor_larger_than_host_memory_fits_onto_a_device(make_rig: MakeRig, tmp_path: Path, io: str) -> None:
    tensors = {"small": torch.zeros(8), "large": torch.rand(100 * KIB), "last": torch.rand(8)}
    path = write_in_order(tmp_path, tensors)
    async with make_rig("fake", io=io).loader(num_slots=2) as loader, loader.stream(path) as stream:
        assert_stream([item async for item in stream], tensors)


async def test_device_map_is_refused(rig: Rig, tmp_path: Path) -> None:
    _, path = mixed(tmp_path)
    async with rig.loader(device_map={"": "cpu"}) as loader, loader.stream(path) as stream:
        with pytest.raises(PlacementError, match="device_map is for models"):
            await anext(stream)


async def test_two_streams_at_once(rig: Rig, tmp_path: Path) -> None:
    tensors, path = equal(tmp_path, count=6)
    async with rig.loader() as loader, loader.stream(path) as one, loader.stream(path) as other:
        found: list[tuple[str, torch.Tensor]] = []
        async for item in one:
            found.append(item)
            assert_same((await anext(other))[1], item[1])
        assert_stream(found, tensors)


class TestIterTensors:
    """The blocking twin, on the real clock."""

    CONFIG = LoaderConfig(prefetch={"chunk": CHUNK, "host_memory": 1 << 21}, device={"target": "cpu"})  # type: ignore[arg-type]  # pydantic takes mappings

    def test_yields_all_in_order(self, tmp_path: Path) -> None:
        tensors, path = mixed(tmp_path)
        with leaves_nothing():
            assert_stream(list(iter_tensors(path, self.CONFIG)), tensors)

    def test_closed_early_stops_reading(self, tmp_path: Path) -> None:
        tensors, path = equal(tmp_path, count=60)
        with leaves_nothing():
            iterator = iter_tensors(path, self.CONFIG)
            name, tensor = next(iterator)
            iterator.close()  # type: ignore[attr-defined]  # it is a generator
        assert_same(tensor, tensors[name])

    def test_raises_what_went_wrong(self, tmp_path: Path) -> None:
        path = write_in_order(tmp_path, {"large": torch.zeros(1 << 20)})
        with leaves_nothing(), pytest.raises(MemoryBudgetError):
            list(iter_tensors(path, self.CONFIG))

    def test_tells_how_far_it_is_and_records_what_happened(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors, path = equal(tmp_path, count=60)
        monkeypatch.setattr(api, "EVENT_INTERVAL_S", 0.0)
        told: list[Progress] = []
        recorder = Recorder()
        names = [name for name, _ in iter_tensors(path, self.CONFIG, on_progress=told.append, recorder=recorder)]
        assert len(told) > len(names)  # between any two, and at the end
        assert [one.tensors_ready for one in told] == sorted(one.tensors_ready for one in told)
        assert (told[-1].state, told[-1].bytes_read) == ("done", told[-1].total_bytes)
        timeline = recorder.timeline()
        assert timeline.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert {"preflight", "read"} <= {span.kind for span in timeline.spans}
