"""With `device.commit: atomic` a model is as it was, bit for bit, until everything is there; then all of it changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.builders import assert_same, bytes_of, flip, leaves_nothing, random_tensors, write_in_order, write_sums
from tests.fakes.rig import KIB, Rig
from tests.models import SmallNet, tensors_of
from weightstream.device.binding import Binder
from weightstream.device.layout import padded
from weightstream.errors import IntegrityError, LoadCancelledError, MemoryBudgetError, PlacementError, ReadError
from weightstream.scheduler import staging

MakeRig = Callable[..., Rig]
Saved = tuple[dict[str, torch.Tensor], Path]

places = pytest.mark.parametrize("where", ["meta", "cpu"], ids=["adopt", "in-place"])


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    tensors = tensors_of(SmallNet())
    path = write_in_order(tmp_path / "checkpoint", tensors, num_shards=3)
    write_sums(path)
    return tensors, path


def small_net(where: str) -> SmallNet:
    with torch.device(where):
        return SmallNet()


class Before:
    """What a model was: the very tensors, and their bytes where they have some."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors = dict(model.state_dict(keep_vars=True))
        self._bytes = {name: None if tensor.is_meta else bytes_of(tensor) for name, tensor in self._tensors.items()}

    def assert_same(self) -> None:
        now = self._model.state_dict(keep_vars=True)
        assert now.keys() == self._tensors.keys()
        for name, tensor in self._tensors.items():
            assert now[name] is tensor
            assert (None if tensor.is_meta else bytes_of(tensor)) == self._bytes[name], name


def assert_loaded(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


@places
async def test_nothing_changes_before_the_last_byte_is_there(rig: Rig, saved: Saved, where: str) -> None:
    tensors, path = saved
    async with rig.loader(workers=1) as loader:
        await loader.load(small_net("meta"), path)
    gate = rig.disk.stop_at(2 * rig.disk.num_begun - 1, is_stuck=True)
    model = small_net(where)
    identities = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items() if not tensor.is_meta}
    before = Before(model)
    async with rig.loader(workers=1, commit="atomic") as loader:
        handle = await loader.start(model, path)
        waiting = asyncio.create_task(handle.ready("layers.0"))
        gate.wait_reached()
        rig.clock.wait_idle()  # all but the last chunk are on the device
        assert handle.progress.bytes_placed > 0
        assert handle.progress.tensors_ready == 0
        assert not waiting.done()
        before.assert_same()
        gate.open()
        report = await handle.wait()
        await waiting
        assert handle.progress.tensors_ready == handle.progress.total_tensors > 0
    assert_loaded(model, tensors)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == identities
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items() if name in pointers} == pointers
    assert report.fallbacks == ()
    assert sum(report.phases.values()) == pytest.approx(report.wall_s)


@places
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
async def test_read_that_fails_leaves_the_model_as_it_was(rig: Rig, saved: Saved, where: str, part: float) -> None:
    tensors, path = saved
    async with rig.loader(workers=1) as loader:
        await loader.load(small_net("meta"), path)
    count = rig.disk.num_begun
    rig.disk.fail_at(count + int(part * (count - 1)), ReadError("gone"))
    model = small_net(where)
    before = Before(model)
    with leaves_nothing():
        async with rig.loader(workers=1, commit="atomic") as loader:
            with pytest.raises(ReadError, match="gone") as caught:
                await loader.load(model, path)
            assert caught.value.partly_written == ()
            before.assert_same()
            await loader.load(model, path)
    assert_loaded(model, tensors)


@places
async def test_wrong_digest_leaves_the_model_as_it_was(rig: Rig, saved: Saved, where: str) -> None:
    _, path = saved
    last = max(path.glob("*.safetensors"))
    flip(last, last.stat().st_size - 1)
    model = small_net(where)
    before = Before(model)
    async with rig.loader(verify="sha256", commit="atomic") as loader:
        with pytest.raises(IntegrityError) as caught:
            await loader.load(model, path)
    assert caught.value.partly_written == ()
    before.assert_same()


@places
async def test_cancelled_load_leaves_the_model_as_it_was(rig: Rig, saved: Saved, where: str) -> None:
    _, path = saved
    gate = rig.disk.stop_at(3)
    model = small_net(where)
    before = Before(model)
    with leaves_nothing():
        async with rig.loader(workers=1, commit="atomic") as loader:
            handle = await loader.start(model, path)
            gate.wait_reached()
            cancelling = asyncio.create_task(handle.cancel())
            while handle._job._stop is None:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0)
            gate.open()
            await cancelling
            with pytest.raises(LoadCancelledError) as caught:
                await handle.wait()
            assert caught.value.partly_written == ()
            before.assert_same()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["same-dtype", "cast"])
@pytest.mark.parametrize("verify", ["none", "sha256"])
async def test_strided_tied_and_cast_tensors_work_as_ever(
    rig: Rig, tmp_path: Path, stored: torch.dtype, verify: str
) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strided = nn.Parameter(torch.zeros(6, 4).t())
            self.plain = nn.Parameter(torch.zeros(5, 3))
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.scalar = nn.Parameter(torch.zeros(()))
            self.meta = nn.Parameter(torch.zeros(7, 2, device="meta"))
            self.tied = self.meta
            self.tied_in_place = self.plain

    model = Odd()
    tensors = tensors_of(model, dtype=stored) if stored != torch.float32 else random_tensors(
        {name: tensor.shape for name, tensor in model.state_dict().items()}
    )  # fmt: skip
    tensors["tied"], tensors["tied_in_place"] = tensors["meta"], tensors["plain"]
    write_in_order(tmp_path, tensors, num_shards=2)
    write_sums(tmp_path)
    async with rig.loader(commit="atomic", verify=verify) as loader:
        await loader.load(model, tmp_path)
        for name, tensor in model.state_dict().items():
            assert_same(tensor, tensors[name].to(torch.float32))
        assert model.tied is model.meta
        assert model.strided.stride() == (1, 4)

        tensors["tied_in_place"] = tensors["plain"] + 1
        write_in_order(tmp_path, tensors, num_shards=2)
        write_sums(tmp_path)
        before = Before(model)
        with pytest.raises(PlacementError, match="ties this tensor") as caught:
            await loader.load(model, tmp_path)
        assert caught.value.partly_written == ()
        before.assert_same()


class Hooked(nn.Module):
    """Loads itself, and can be made to fail after it has written to its first parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(4))
        self.b = nn.Parameter(torch.zeros(4))
        self.fails = False

    def _load_from_state_dict(self, state: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        with torch.no_grad():
            if not self.a.is_meta:
                self.a.copy_(state[f"{prefix}a"])
        if self.fails:
            raise RuntimeError("half-way")
        super()._load_from_state_dict(state, prefix, *args)


def hooked(where: str) -> nn.ModuleDict:
    with torch.device(where):
        return nn.ModuleDict(
            {"first": nn.BatchNorm1d(3), "second": Hooked(), "third": nn.Linear(3, 3), "last": Hooked()}
        )


@places
async def test_module_that_fails_half_way_is_put_back_with_all_others(
    rig: Rig, tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tensors_of(hooked("cpu"))
    write_in_order(tmp_path, tensors, num_shards=2)
    model = hooked(where)
    before = Before(model)
    last = model["last"]
    assert isinstance(last, Hooked)
    async with rig.loader(commit="atomic") as loader:
        last.fails = True
        with pytest.raises(PlacementError, match="half-way") as caught:
            await loader.load(model, tmp_path)
        assert caught.value.partly_written == ()
        before.assert_same()

        last.fails = False
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            report = await loader.load(model, tmp_path)
    assert_loaded(model, tensors)
    (sentence,) = [said for said in report.fallbacks if "not what else their hooks may change" in said]
    assert caplog.text.count(sentence) == 1


async def test_what_cannot_be_put_back_is_named(
    make_rig: MakeRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig("host")
    write_in_order(tmp_path, tensors_of(hooked("cpu")))
    model = hooked("cpu")
    last = model["last"]
    assert isinstance(last, Hooked)
    last.fails = True

    def broken(self: Binder) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Binder, "_put_back", broken)
    async with rig.loader(commit="atomic") as loader:
        with pytest.raises(PlacementError) as caught:
            await loader.load(model, tmp_path)
    assert {"second.a", "last.a"} <= set(caught.value.partly_written)
    assert "cannot be put back" in caplog.text


async def test_memory_is_checked_before_anything_moves(
    make_rig: MakeRig, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place it takes the model's size again: host memory out of the budget, or the device's."""
    rig = make_rig("host")
    _, path = saved
    model = SmallNet()
    before = Before(model)
    size = sum(padded(tensor.nbytes) for tensor in model.state_dict().values())
    async with rig.loader(commit="atomic", host_memory=1024 * KIB) as loader:
        with pytest.raises(MemoryBudgetError, match="host_memory") as caught:
            await loader.start(model, path)
        assert caught.value.expected == f"{size} bytes"
    monkeypatch.setattr(staging, "available_bytes", lambda: size - 1)
    async with rig.loader(commit="atomic") as loader:
        with pytest.raises(MemoryBudgetError, match="do not fit into"):
            await loader.start(model, path)
    async with rig.loader() as loader:  # in place, progressively, nothing more is needed
        await loader.load(model, path)
    assert rig.disk.num_open == 0
    del before


async def test_memory_that_several_tensors_have_is_put_back(rig: Rig, tmp_path: Path) -> None:
    memory = torch.zeros(8)
    model = nn.Module()
    model.first = nn.Parameter(memory[:6])
    model.second = nn.Parameter(memory[2:])
    model.other = nn.Parameter(torch.zeros(5))
    tensors = {"first": torch.rand(6), "second": torch.rand(6), "other": torch.rand(5)}
    write_in_order(tmp_path, tensors)
    before = Before(model)
    async with rig.loader(commit="atomic") as loader:
        with pytest.raises(PlacementError, match="in the memory of another one") as caught:
            await loader.load(model, tmp_path)
        assert caught.value.partly_written == ()
        before.assert_same()
        tensors["second"][:4] = tensors["first"][2:]
        write_in_order(tmp_path, tensors)
        await loader.load(model, tmp_path)
    assert_loaded(model, tensors)
