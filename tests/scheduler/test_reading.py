"""How a load reads: in parts, by as many workers as pay, from the page cache what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import assert_same, leaves_nothing, write_in_order
from tests.fakes.rig import KIB, Rig
from weightstream.prefetch.tuner import COPYING_WORKERS, FIRST_READ_BYTES, FIRST_WORKERS, MAX_WORKERS

MakeRig = Callable[..., Rig]
MIB = 2**20


def meta_model(tensors: dict[str, torch.Tensor]) -> nn.Module:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, torch.empty_like(tensor, device="meta"))
    return model


def assert_loaded(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


@pytest.fixture(scope="module", name="large")
def fixture_large(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Path]:
    """Tensors of odd sizes, one of them larger than a chunk of 8 MiB: 25 MiB in all."""
    sizes = {"small": 12_345, "middle": 3 * MIB + 1, "large": 20 * MIB + 7, "last": 2 * MIB}
    tensors = {name: torch.randint(256, (size,), dtype=torch.uint8) for name, size in sizes.items()}
    return tensors, write_in_order(tmp_path_factory.mktemp("large"), tensors)


@pytest.mark.parametrize("workers", [1, 3])
async def test_chunk_is_read_in_parts_by_several_workers(
    rig: Rig, large: tuple[dict[str, torch.Tensor], Path], workers: int
) -> None:
    tensors, path = large
    model = meta_model(tensors)
    with leaves_nothing():
        async with rig.loader(chunk=8 * MIB, workers=workers) as loader:
            await loader.load(model, path)
            assert rig.ring.num_free == rig.ring.num_slots
    assert_loaded(model, tensors)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert num_bytes / FIRST_READ_BYTES <= rig.disk.num_begun <= num_bytes / FIRST_READ_BYTES + 2 * 4
    assert rig.disk.num_bytes_begun == num_bytes


async def test_reads_that_may_not_adapt_fetch_whole_chunks(
    rig: Rig, large: tuple[dict[str, torch.Tensor], Path]
) -> None:
    tensors, path = large
    model = meta_model(tensors)
    async with rig.loader(chunk=8 * MIB, scheduler={"adaptive": False}) as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert rig.disk.num_begun == 4
    assert report.decisions[-1] == f"read in the end: {rig.io}, 2 workers, reads of 8 MiB"


@pytest.mark.parametrize(
    ("device", "io", "workers"),
    [
        pytest.param("host", "direct", FIRST_WORKERS + COPYING_WORKERS, id="copied by readers"),
        pytest.param("host", "buffered", FIRST_WORKERS, id="read to where it belongs"),
        pytest.param("fake", "direct", FIRST_WORKERS, id="copied by the device"),
    ],
)
async def test_where_readers_copy_there_are_more_of_them(
    make_rig: MakeRig, large: tuple[dict[str, torch.Tensor], Path], device: str, io: str, workers: int
) -> None:
    rig = make_rig(device, io=io)
    model = meta_model(large[0])
    async with rig.loader(chunk=8 * MIB, workers="auto") as loader:
        report = await loader.load(model, large[1])
    assert_loaded(model, large[0])
    assert report.decisions[-1] == f"read in the end: {io}, {workers} workers, reads of 4 MiB"


async def test_failed_part_ends_the_load_and_gives_every_slot_back(
    rig: Rig, large: tuple[dict[str, torch.Tensor], Path]
) -> None:
    tensors, path = large
    model = meta_model(tensors)
    rig.disk.fail_at(5, OSError("broken"))
    with leaves_nothing():
        async with rig.loader(chunk=8 * MIB, workers=3) as loader:
            with pytest.raises(OSError, match="broken"):
                await loader.load(model, path)
            assert rig.ring.num_free == rig.ring.num_slots
            assert all(buffer.is_meta for buffer in model.buffers())
            await loader.load(model, path)
    assert_loaded(model, tensors)


async def test_stuck_part_costs_the_slot_of_its_chunk_alone(
    make_rig: MakeRig, large: tuple[dict[str, torch.Tensor], Path]
) -> None:
    tensors, path = large
    rig = make_rig("fake")
    model = meta_model(tensors)
    gate = rig.disk.stop_at(2, is_stuck=True)
    async with rig.loader(chunk=8 * MIB, workers=3, scheduler={"timeout_s": 5}) as loader:
        with pytest.raises(ws.LoadTimeoutError):
            await loader.load(model, path)
        assert (rig.ring.num_written_off, rig.ring.num_free) == (1, rig.ring.num_slots - 1)
        await loader.load(model, path)
        assert_loaded(model, tensors)
        gate.open()


async def test_many_workers_are_taken_where_each_read_waits_long(make_rig: MakeRig, tmp_path: Path) -> None:
    """A read waits for a second, beside all others: 600 reads, which eight workers would take 75 s for."""
    rig = make_rig("host", latency_s=1.0)
    tensors = {f"t{i}": torch.randint(256, (64 * KIB,), dtype=torch.uint8) for i in range(600)}
    path = write_in_order(tmp_path, tensors)
    model = meta_model(tensors)
    async with rig.loader(workers="auto", chunk=64 * KIB) as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert f"{MAX_WORKERS} workers" in report.decisions[-1]
    assert report.wall_s < 35  # on a virtual clock: 19 s with 32 workers from the beginning


async def test_number_of_workers_that_was_asked_for_is_kept(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("host", latency_s=1.0)
    tensors = {f"t{i}": torch.randint(256, (64 * KIB,), dtype=torch.uint8) for i in range(60)}
    path = write_in_order(tmp_path, tensors)
    async with rig.loader(workers=3, chunk=64 * KIB) as loader:
        report = await loader.load(meta_model(tensors), path)
    assert report.wall_s == 20
    assert "3 workers" in report.decisions[-1]


def test_what_is_in_the_page_cache_is_read_from_there(large: tuple[dict[str, torch.Tensor], Path]) -> None:
    tensors, path = large
    model = meta_model(tensors)
    report = ws.load_sync(model, path, config=ws.LoaderConfig(strategy="stream", device={"target": "cpu"}))  # type: ignore[arg-type]
    assert_loaded(model, tensors)
    assert report.decisions[0] == "page cache: 2 of 2 chunks are in it and are read from there"
    assert report.fallbacks == ()
    assert report.host_peak_bytes < sum(tensor.nbytes for tensor in tensors.values()) + 64 * KIB  # there is no ring
