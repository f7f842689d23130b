"""Files of `torch.save` load as `torch.load` loads them, bit for bit, by every strategy, onto meta and onto storage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.builders import assert_same, write_index
from tests.fakes.rig import KIB, Rig
from tests.models import SmallNet, tensors_of
from weightstream.errors import PlacementError

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


def save(path: Path, value: object, *, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


class Holder(nn.Module):
    """A buffer for each tensor, of its shape and dtype."""

    def __init__(self, tensors: dict[str, torch.Tensor], device: str) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, torch.zeros(tensor.shape, dtype=tensor.dtype, device=device))


def odd_tensors() -> dict[str, torch.Tensor]:
    """What safetensors would not hold: views with strides, tensors that share bytes, a large one transposed."""
    base = torch.randn(40, 50)
    large = torch.randn(700, 500)  # more than a megabyte
    return {
        "whole": base,
        "part": base[3:9],
        "column": base[:, 7],
        "window": base[5:30, 10:20],
        "transposed": base.t(),
        "steps": torch.arange(100, dtype=torch.int32)[1::3],
        "expanded": torch.randn(1, 5).expand(4, 5),
        "large": large.t(),
        "permuted": torch.randn(3, 4, 5).bfloat16().permute(2, 0, 1),
        "scalar": base[3, 4],
        "nothing": base[:0],
        "ones": torch.randn(4, 1, 3)[:, :, :1],
    }


@LAYOUTS
@pytest.mark.parametrize("where", ["meta", "cpu"])
@pytest.mark.parametrize("strategy", ["stream", "preload", "direct", "map"])
async def test_state_dict_is_loaded(rig: Rig, tmp_path: Path, strategy: str, where: str, *, zipped: bool) -> None:
    if strategy == "map" and rig.device != "host":
        pytest.skip("tensors in mapped files are on the host")
    tensors = tensors_of(SmallNet())
    with torch.device(where):
        model = SmallNet()
    path = save(tmp_path / "pytorch_model.bin", tensors, zipped=zipped)
    async with rig.loader(strategy=strategy) as loader:
        report = await loader.load(model, tmp_path)
    expected = torch.load(path, weights_only=True)
    assert set(model.state_dict()) == set(expected)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, expected[name])
    assert (report.num_tensors, report.checkpoint) == (len(tensors), str(path))


@LAYOUTS
@pytest.mark.parametrize("where", ["meta", "cpu"])
@pytest.mark.parametrize("strategy", ["stream", "preload", "direct", "map"])
async def test_views_and_shared_bytes_are_loaded(
    rig: Rig, tmp_path: Path, strategy: str, where: str, *, zipped: bool
) -> None:
    if strategy == "map" and rig.device != "host":
        pytest.skip("tensors in mapped files are on the host")
    tensors = odd_tensors()
    path = save(tmp_path / "model.pt", tensors, zipped=zipped)
    model = Holder(tensors, where)
    async with rig.loader(strategy=strategy) as loader:
        await loader.load(model, path)
    for name, tensor in torch.load(path, weights_only=True).items():
        found = model.get_buffer(name)
        assert_same(found, tensor)
        assert found.is_contiguous()


@LAYOUTS
async def test_stream_yields_every_tensor(rig: Rig, tmp_path: Path, *, zipped: bool) -> None:
    tensors = odd_tensors()
    path = save(tmp_path / "model.pth", tensors, zipped=zipped)
    expected = torch.load(path, weights_only=True)
    seen: set[str] = set()
    async with rig.loader(host_memory=8 * 1024 * KIB) as loader:
        async for name, tensor in loader.stream(path):
            assert_same(tensor, expected[name])
            seen.add(name)
    assert seen == set(tensors)


async def test_views_are_cast(rig: Rig, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in odd_tensors().items() if tensor.is_floating_point()}
    path = save(tmp_path / "model.bin", tensors)
    for where in ("meta", "cpu"):
        model = Holder({name: tensor.to(torch.float16) for name, tensor in tensors.items()}, where)
        async with rig.loader() as loader:
            await loader.load(model, path)
        for name, tensor in tensors.items():
            assert_same(model.get_buffer(name), tensor.to(torch.float16).contiguous())


@pytest.mark.parametrize("where", ["meta", "cpu"])
async def test_ties_may_share_one_storage_in_the_file(rig: Rig, tmp_path: Path, where: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4, bias=False, device=where)
            self.b = nn.Linear(6, 4, bias=False, device=where)
            self.b.weight = self.a.weight

    shared = torch.randn(6, 4).t()  # strided, and under both names
    path = save(tmp_path / "model.bin", {"a.weight": shared, "b.weight": shared})
    model = Tied()
    async with rig.loader() as loader:
        await loader.load(model, path)
    assert model.a.weight is model.b.weight
    assert_same(model.a.weight, shared.contiguous())


async def test_module_that_loads_itself_is_given_views(rig: Rig, tmp_path: Path) -> None:
    reference = nn.BatchNorm1d(8)
    state = dict(reference.state_dict())
    state["weight"] = torch.randn(8, 3)[:, 1]
    path = save(tmp_path / "model.bin", state)
    with torch.device("meta"):
        model = nn.BatchNorm1d(8)
    async with rig.loader() as loader:
        await loader.load(model, path)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, state[name].contiguous())


async def test_index_of_pickles_is_loaded(rig: Rig, tmp_path: Path) -> None:
    tensors = tensors_of(SmallNet())
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        save(tmp_path / file, {name: tensors[name] for name in part}, zipped=number == 0)
        weight_map |= dict.fromkeys(part, file)
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    save(tmp_path / "training_args.bin", {"x": 1})
    with torch.device("meta"):
        model = SmallNet()
    async with rig.loader() as loader:
        report = await loader.load(model, tmp_path)
    assert report.num_shards == 2
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


async def test_report_says_what_was_left_out(rig: Rig, tmp_path: Path) -> None:
    tensors = tensors_of(SmallNet())
    path = save(tmp_path / "last.pt", {"epoch": 3, "state_dict": tensors, "optimizer": {"state": {0: torch.zeros(2)}}})
    with torch.device("meta"):
        model = SmallNet()
    async with rig.loader() as loader:
        report = await loader.load(model, path)
    assert f"format: taken from under 'state_dict' in {path}; left out, as they are no tensors: epoch, optimizer" in (
        report.decisions
    )


async def test_failed_load_of_views_leaves_the_model_on_meta(rig: Rig, tmp_path: Path) -> None:
    tied = torch.randn(6, 4)
    path = save(tmp_path / "model.bin", {"a": tied.t(), "b": tied.t() + 1})
    with torch.device("meta"):
        model = nn.Module()
        model.a = model.b = nn.Parameter(torch.zeros(4, 6))
    async with rig.loader() as loader:
        with pytest.raises(PlacementError, match="the model ties this tensor"):
            await loader.load(model, path)
    assert model.a.is_meta
    assert model.a is model.b
