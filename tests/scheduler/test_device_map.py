"""One load onto several devices: each tensor lands on its own, and all of them succeed or none does."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.builders import assert_same, leaves_nothing, write_in_order
from tests.documents import blocks
from tests.fakes.accelerator import FakeAccelerator
from tests.fakes.rig import KIB, Rig
from tests.models import SmallNet, tensors_of
from weightstream.device.backend import Backend
from weightstream.errors import LoadCancelledError, MemoryBudgetError, PlacementError

MakeRig = Callable[..., Rig]
Saved = tuple[dict[str, torch.Tensor], Path]

ONE, TWO = "cpu:1", "cpu:2"
#: Neighbours in the file go to different devices, a tensor and its module too.
MAP = {"": ONE, "layers": TWO, "layers.1": "cpu", "layers.2.bias": ONE, "large": TWO, "steps": "cpu"}


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    tensors = tensors_of(SmallNet())
    return tensors, write_in_order(tmp_path / "checkpoint", tensors, num_shards=2)


def on_meta(**options: Any) -> SmallNet:
    with torch.device("meta"):
        return SmallNet(**options)


def assert_loaded(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name].to(tensor.dtype))


def assert_untouched(model: nn.Module, rig: Rig) -> None:
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert rig.ring.num_free == rig.ring.num_slots
    assert rig.disk.num_open == 0


def num_submitted(fake: FakeAccelerator) -> int:
    return fake.num_copies + fake.num_spreads


@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["same-dtype", "cast"])
@pytest.mark.parametrize("num_slots", [2, 5], ids=["2-slots", "5-slots"])
@pytest.mark.parametrize("strategy", ["stream", "preload"])
async def test_every_tensor_lands_on_its_device(
    make_rig: MakeRig, tmp_path: Path, io: str, stored: torch.dtype, num_slots: int, strategy: str
) -> None:
    """With slow copies and few slots: `make_rig` fails if one is used again before a device has copied it."""
    rig = make_rig("host", io=io, several=[ONE, TWO], read_bytes_per_s=1000 * KIB, copy_bytes_per_s=500 * KIB)
    model = on_meta()
    path = write_in_order(tmp_path, tensors_of(SmallNet(), dtype=stored), num_shards=2)
    tensors = tensors_of(SmallNet(), dtype=stored)
    slots = num_slots if strategy == "stream" else None
    async with rig.loader(num_slots=slots, strategy=strategy, device_map=MAP) as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert report.device == f"{ONE}, {TWO}, cpu"
    assert report.unloaded_keys == ()
    one, two = rig.several[ONE], rig.several[TWO]
    assert num_submitted(one) > 0 < num_submitted(two)
    on_host = report.num_copies - num_submitted(one) - num_submitted(two)
    # What is neither cast nor read past the page cache is read to where it belongs in host memory.
    assert (on_host > 0) == (stored is torch.bfloat16 or io == "direct")


@pytest.mark.parametrize("num_slots", [2, 5])
async def test_devices_share_one_ring_and_keep_their_streams(make_rig: MakeRig, saved: Saved, num_slots: int) -> None:
    """A backend has one copy stream, and the loader one backend for each device, however many loads there are."""
    rig = make_rig("host", io="direct", several=[ONE, TWO])
    opened: list[str] = []
    open_backend = rig.machine.open_backend

    def count(device: torch.device) -> Backend:
        opened.append(str(device))
        return open_backend(device)

    rig.machine = dataclasses.replace(rig.machine, open_backend=count)
    tensors, path = saved
    async with rig.loader(num_slots=num_slots, device_map=MAP) as loader:
        for _ in range(3):
            model = on_meta()
            report = await loader.load(model, path)
            assert_loaded(model, tensors)
            assert report.host_peak_bytes <= rig.ring.num_bytes + sum(
                tensor.nbytes + 256 for tensor in tensors.values()
            )
        assert len(rig.rings) == 1
        assert 1 <= rig.ring.num_slots <= num_slots
    assert sorted(opened) == ["cpu", ONE, TWO]


async def test_blocks_of_each_device_are_as_large_as_what_goes_there(make_rig: MakeRig, saved: Saved) -> None:
    rig = make_rig("host", several=[ONE, TWO])
    tensors, path = saved
    model = on_meta()
    async with rig.loader(device_map=MAP) as loader:
        report = await loader.load(model, path)
    assert rig.several[ONE].num_allocations == 1  # all are small
    assert rig.several[TWO].num_allocations == 2  # `large` has one of its own
    on_cpu = {"layers.1.weight", "layers.1.bias", "steps"}
    elsewhere = sum(tensor.nbytes for name, tensor in tensors.items() if name not in on_cpu)
    assert elsewhere <= report.device_peak_bytes <= elsewhere + 256 * len(tensors)


async def test_module_is_ready_when_its_own_device_is(make_rig: MakeRig, saved: Saved) -> None:
    rig = make_rig("host", several=[ONE, TWO])
    tensors, path = saved
    model = on_meta()
    rig.several[TWO].hold()
    async with rig.loader(scheduler={"order": "file"}, device_map={"": ONE, "large": TWO}) as loader:
        handle = await loader.start(model, path)
        await handle.ready("embed")
        assert_same(model.embed.weight, tensors["embed.weight"])
        rig.several[TWO].wait_submitted(1)
        assert model.large.weight.is_meta
        rig.several[TWO].release()
        await handle.wait()
    assert_loaded(model, tensors)


@pytest.mark.parametrize("held", [ONE, TWO])
async def test_cancelled_while_one_device_copies(make_rig: MakeRig, saved: Saved, held: str) -> None:
    rig = make_rig("host", several=[ONE, TWO])
    tensors, path = saved
    model = on_meta()
    fake = rig.several[held]
    fake.hold()
    with leaves_nothing():
        async with rig.loader(device_map=MAP) as loader:
            handle = await loader.start(model, path)
            fake.wait_submitted(1)
            handle._job.stop()
            fake.release()
            with pytest.raises(LoadCancelledError):
                await handle.wait()
            assert_untouched(model, rig)
            await loader.load(model, path)
            assert_loaded(model, tensors)
        rig.close()


async def test_device_without_memory_rolls_all_of_them_back(
    make_rig: MakeRig, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig("host", several=[ONE, TWO])
    tensors, path = saved
    model = on_meta()

    def refuse(num_bytes: int, stream: object) -> Any:
        raise torch.OutOfMemoryError("no memory")

    async with rig.loader(workers=1, device_map=MAP) as loader:
        with monkeypatch.context() as patch:
            patch.setattr(rig.several[TWO], "allocate", refuse)
            with pytest.raises(MemoryBudgetError, match="no memory"):
                await loader.load(model, path)
        assert rig.several[ONE].num_allocations == 1
        assert_untouched(model, rig)
        await loader.load(model, path)
    assert_loaded(model, tensors)


async def test_meta_is_left_unread_and_reported(make_rig: MakeRig, saved: Saved) -> None:
    rig = make_rig("host", several=[ONE])
    tensors, path = saved
    model = on_meta()
    async with rig.loader(device_map={"": ONE, "large": "meta", "layers.0": "meta"}) as loader:
        report = await loader.load(model, path)
    assert report.unloaded_keys == ("layers.0.weight", "layers.0.bias", "large.weight")
    assert report.missing_keys == report.unexpected_keys == ()
    assert report.device == ONE
    assert {name for name, tensor in model.state_dict().items() if tensor.is_meta} == set(report.unloaded_keys)
    assert report.num_bytes == sum(
        tensor.nbytes for name, tensor in tensors.items() if name not in report.unloaded_keys
    )


async def test_argument_goes_before_the_settings_and_takes_devices_as_torch_has_them(
    make_rig: MakeRig, saved: Saved
) -> None:
    rig = make_rig("host", several=[ONE, TWO])
    tensors, path = saved
    model = on_meta()
    async with rig.loader(device_map={"": TWO}) as loader:
        report = await loader.load(model, path, device_map={"": torch.device(ONE), "embed": "cpu"})
    assert report.device == f"{ONE}, cpu"
    assert_loaded(model, tensors)


async def test_map_may_leave_tensors_of_host_memory_in_the_files(make_rig: MakeRig, saved: Saved) -> None:
    rig = make_rig("host", several=[ONE])
    tensors, path = saved
    model = on_meta()
    async with rig.loader(strategy="map") as loader:
        report = await loader.load(model, path, device_map={"": "cpu", "large": "meta"})
        assert (report.strategy, report.unloaded_keys) == ("map", ("large.weight",))
        with pytest.raises(PlacementError, match="mapped file") as caught:
            await loader.load(on_meta(), path, device_map=MAP | {"layers": "cpu", "large": "cpu"})
    assert caught.value.actual == ONE
    assert_same(model.embed.weight, tensors["embed.weight"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
async def test_tied_tensor_is_one_tensor_where_its_first_name_is(make_rig: MakeRig, tmp_path: Path, name: str) -> None:
    rig = make_rig("host", several=[ONE, TWO])
    with torch.device("meta"):
        model = Tied()
    weight = torch.randn(6, 4)
    path = write_in_order(tmp_path, {name: weight})
    async with rig.loader(device_map={"embed": ONE, "head": TWO}) as loader:
        report = await loader.load(model, path)
    assert model.head.weight is model.embed.weight
    assert_same(model.head.weight, weight)
    assert (num_submitted(rig.several[ONE]), num_submitted(rig.several[TWO])) == (1, 0)
    assert any("tied tensors are where their first name is: embed.weight" in said for said in report.decisions)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)


async def test_module_that_loads_itself_goes_to_its_device_or_stays_on_meta(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("host", several=[ONE, TWO])
    tensors = tensors_of(Norm())
    path = write_in_order(tmp_path, tensors)
    async with rig.loader(device_map={"linear": ONE, "norm": TWO}) as loader:
        with torch.device("meta"):
            loaded, left, part = Norm(), Norm(), Norm()
        await loader.load(loaded, path)
        assert num_submitted(rig.several[TWO]) > 0
        assert_loaded(loaded, tensors)
        report = await loader.load(left, path, device_map={"": ONE, "norm": "meta"})
        assert set(report.unloaded_keys) == {name for name in tensors if name.startswith("norm.")}
        assert all(tensor.is_meta for tensor in left.norm.state_dict().values())
        with pytest.raises(PlacementError, match="norm loads all its tensors itself") as caught:
            await loader.load(part, path, device_map={"": ONE, "norm.bias": "meta"})
    assert caught.value.tensor == "norm.bias"


async def test_materialised_parameter_must_be_where_the_map_says(make_rig: MakeRig, saved: Saved) -> None:
    rig = make_rig("host", several=[ONE])
    tensors, path = saved
    model = on_meta()
    model.large.to_empty(device="cpu")
    async with rig.loader() as loader:
        with pytest.raises(PlacementError, match="another device than the device map says") as caught:
            await loader.load(model, path, device_map={"": ONE})
        assert (caught.value.tensor, caught.value.expected, caught.value.actual) == ("large.weight", ONE, "cpu")
        with pytest.raises(PlacementError, match="another device than the device map says"):
            await loader.load(model, path, device_map={"": ONE, "large": "meta"})
        assert model.embed.weight.is_meta
        await loader.load(model, path, device_map={"": ONE, "large": "cpu"})
    assert_loaded(model, tensors)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"embed": "cpu", "layers": "cpu"}, "gives this tensor no device"),
        ({"": "cpu", "layer": "cpu"}, "names 'layer', and the model has no such"),
        ({"": "xla:7"}, "device.device_map: there is no xla:7 here"),
        ({"": 4096}, "device.device_map: there is no accelerator 4096 here|there is no [a-z]+:4096 here"),
    ],
    ids=["missing", "unknown-module", "unknown-device", "number-without-accelerator"],
)
async def test_map_that_does_not_fit_is_told_before_anything_changes(
    make_rig: MakeRig, saved: Saved, device_map: dict[str, object], message: str
) -> None:
    rig = make_rig("host")
    _, path = saved
    model = on_meta()
    async with rig.loader() as loader:
        with pytest.raises(PlacementError, match=message):
            await loader.load(model, path, device_map=device_map)
        assert all(tensor.is_meta for tensor in model.state_dict().values())


async def test_tensor_without_a_device_is_named(make_rig: MakeRig, saved: Saved) -> None:
    rig = make_rig("host")
    _, path = saved
    async with rig.loader(device_map={"embed": "cpu", "layers": "cpu", "large": "cpu"}) as loader:
        with pytest.raises(PlacementError) as caught:
            await loader.load(on_meta(), path)
    assert caught.value.tensor == "flag"


class Decoder(nn.Module):
    """With the names of large language models."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(21))
        self.lm_head = nn.Linear(4, 8, bias=False)


async def test_map_of_the_documentation_is_followed(make_rig: MakeRig, tmp_path: Path) -> None:
    """Accelerators 0 and 1 of the page are fakes."""
    (block,) = blocks("docs/device_map.md", "python")
    rig = make_rig("host", several=[ONE, TWO])
    tensors = tensors_of(Decoder())
    write_in_order(tmp_path / "path/to/checkpoint", tensors)
    with torch.device("meta"):
        model = Decoder()

    async def load(model: nn.Module, path: str, device_map: dict[str, int | str]) -> object:
        fakes: dict[int | str, str] = {0: ONE, 1: TWO}
        found = {name: fakes.get(device, str(device)) for name, device in device_map.items()}
        async with rig.loader(device_map=found) as loader:
            return await loader.load(model, tmp_path / path)

    names: dict[str, Any] = {"ws": SimpleNamespace(load=load), "model": model}
    await eval(compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
    assert_loaded(model, tensors)
    assert names["report"].device == f"{ONE}, {TWO}, cpu"
    assert num_submitted(rig.several[ONE]) > 0 < num_submitted(rig.several[TWO])
