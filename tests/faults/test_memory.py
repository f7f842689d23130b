"""Memory that is refused: less of it is used, and the report says so; or the load fails before anything has moved."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import SINGLE, assert_same, leaves_nothing, random_tensors, write_checkpoint, write_in_order
from tests.fakes.accelerator import FakeAccelerator
from tests.fakes.filesystem import mounted
from tests.fakes.fixtures import requires_fuse
from tests.fakes.rig import KIB, Rig
from tests.models import SmallNet, tensors_of
from weightstream.errors import CheckpointError, MemoryBudgetError
from weightstream.prefetch import ring as ring_module
from weightstream.prefetch.ring import slot_bytes_for
from weightstream.scheduler import staging

MakeRig = Callable[..., Rig]

SLOT_BYTES = slot_bytes_for(64 * KIB)


@pytest.fixture(name="tensors")
def fixture_tensors() -> dict[str, torch.Tensor]:
    return tensors_of(SmallNet())


@pytest.fixture(name="path")
def fixture_path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return write_checkpoint(tmp_path / "c", tensors)


def on_meta() -> SmallNet:
    with torch.device("meta"):
        return SmallNet()


class Limited(FakeAccelerator):
    """Page-locks so many segments and no more, as RLIMIT_MEMLOCK would have it."""

    most = 0

    def pin(self, memory: mmap.mmap) -> Callable[[], None] | None:
        return super().pin(memory) if self.num_pins < self.most else None


@pytest.mark.parametrize(("most", "num_slots"), [(3, 3), (2, 2), (1, 6), (0, 6)])
async def test_ring_is_as_small_as_what_can_be_locked_or_else_pageable(
    make_rig: MakeRig,
    path: Path,
    tensors: dict[str, torch.Tensor],
    most: int,
    num_slots: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ring_module, "_SEGMENT_BYTES", SLOT_BYTES)  # each slot is a segment
    rig = make_rig(accelerator=Limited, copy_bytes_per_s=1e6)
    assert isinstance(rig.accelerator, Limited)
    rig.accelerator.most = most
    said = "from some size on: the ring is as small as what was locked" if most >= 2 else "pageable and slower"
    async with rig.loader(num_slots=6) as loader:
        for _ in range(2):
            model = on_meta()
            report = await loader.load(model, path)
            for name, tensor in model.state_dict().items():
                assert_same(tensor, tensors[name])
            assert len(report.fallbacks) == 1
            assert said in report.fallbacks[0]
            assert report.pinned_bytes == most * SLOT_BYTES
            assert (rig.ring.num_slots, rig.ring.num_free) == (num_slots, num_slots)
            assert rig.ring.num_bytes == num_slots * SLOT_BYTES
        assert loader._engine is not None
        assert loader._engine.staging.budget.left_bytes == (6 - num_slots) * SLOT_BYTES
        assert loader._engine.staging.account.held_bytes == num_slots * SLOT_BYTES
    assert rig.accelerator.num_pins == rig.accelerator.num_unpins == most


@pytest.mark.parametrize("how", ["model", "stream"])
async def test_host_memory_that_is_not_to_be_had_is_not_taken(
    make_rig: MakeRig, path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "available_bytes", lambda: 4 * 2**20)
    rig = make_rig("fake" if how == "model" else "host")
    async with rig.loader() as loader:  # host_memory: 1 GiB
        if how == "model":
            report = await loader.load(on_meta(), path)
        else:
            stream = loader.stream(path)
            assert len([name async for name, _ in stream]) == len(tensors_of(SmallNet()))
            report = await stream.report()
        assert any("no more than 3670016 are to be had" in fallback for fallback in report.fallbacks)
        assert report.host_peak_bytes <= 3670016
        monkeypatch.undo()
        assert (await loader.load(on_meta(), path)).fallbacks == ()  # there is enough again


async def test_ranks_of_one_host_take_a_share_each(
    make_rig: MakeRig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "available_bytes", lambda: 4 * 2**20)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    async with make_rig("fake").loader() as loader:
        report = await loader.load(on_meta(), path)
    assert any("no more than 917504 are to be had for each of 4 ranks" in fallback for fallback in report.fallbacks)
    assert report.host_peak_bytes <= 917504


@pytest.mark.parametrize("num_ranks", [1, 4])
async def test_ranks_whose_weights_may_not_all_fit_are_told_and_not_refused(
    make_rig: MakeRig, path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    """They may not load at the same time, and those that have loaded have taken their part of what is free."""
    monkeypatch.setattr(staging, "available_bytes", lambda: 4 * 2**20)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_ranks))
    async with make_rig("host").loader() as loader:
        report = await loader.load(on_meta(), path)
    told = [fallback for fallback in report.fallbacks if "if all of them load at the same time" in fallback]
    assert len(told) == (num_ranks > 1)
    assert all("4194304 are free for 4 ranks" in fallback for fallback in told)


async def test_less_than_a_slot_of_the_ring_may_be_enough_for_auto(
    make_rig: MakeRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"t{i}": torch.rand(2000) for i in range(20)}
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, torch.empty_like(tensor, device="meta"))
    monkeypatch.setattr(staging, "available_bytes", lambda: 70 * KIB)
    async with make_rig("fake").loader() as loader:
        report = await loader.load(model, write_in_order(tmp_path / "small", tensors))
    assert report.strategy == "direct"
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


async def test_less_than_a_slot_is_an_error_before_anything_moves(
    make_rig: MakeRig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "available_bytes", lambda: 70 * KIB)
    rig = make_rig("fake")
    async with rig.loader(strategy="stream") as loader:
        with pytest.raises(MemoryBudgetError, match="no slot of the ring fits"):
            await loader.load(on_meta(), path)
    assert (rig.disk.num_begun, rig.accelerator.num_allocations) == (0, 0)


async def test_device_memory_is_compared_before_anything_moves(
    make_rig: MakeRig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "free_bytes", lambda device: 1000)
    rig = make_rig("fake")
    rig.accelerator.device = torch.device("cuda", 0)  # the fake's tensors are on the CPU all the same
    async with rig.loader() as loader:
        with pytest.raises(
            MemoryBudgetError, match=r"do not fit into memory of cuda:0: expected \d+ bytes free, found 1000"
        ):
            await loader.load(on_meta(), path)
    assert (rig.disk.num_begun, rig.accelerator.num_allocations) == (0, 0)


# Mapped files on file systems that can go away


def config(*, allow: bool) -> ws.LoaderConfig:
    sections = {"strategy": "map", "device": {"target": "cpu"}, "prefetch": {"allow_network_map": allow}}
    return ws.LoaderConfig.model_validate(sections)


@requires_fuse
def test_files_of_a_server_are_mapped_only_where_that_is_allowed(tmp_path: Path) -> None:
    tensors = random_tensors({"a": (30, 30)})
    write_checkpoint(tmp_path, tensors)
    with mounted(tmp_path) as mount:
        model = nn.ParameterDict({"a": nn.Parameter(torch.empty(30, 30, device="meta"))})
        with leaves_nothing(), pytest.raises(CheckpointError, match="on a network file system") as caught:
            ws.load_sync(model, mount.path, config=config(allow=False))
        assert caught.value.file == str(mount.path / SINGLE)
        assert "prefetch.allow_network_map" in str(caught.value)
        assert model["a"].is_meta
        with pytest.raises(CheckpointError, match="on a network file system"):
            list(ws.iter_tensors(mount.path, config(allow=False)))
        report = ws.load_sync(model, mount.path, config=config(allow=True))
        assert report.strategy == "map"
        assert_same(model["a"].detach(), tensors["a"])
        del model
