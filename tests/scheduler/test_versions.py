"""Modules are told which version of themselves a file of `torch.save` is of, as `load_state_dict` tells them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.builders import assert_same, write_checkpoint, write_index
from tests.fakes.rig import Rig
from weightstream.errors import MissingKeysError

STRATEGIES = pytest.mark.parametrize("strategy", ["stream", "preload", "direct"])


class Versioned(nn.Linear):
    """Was transposed in its first version, and remembers what it is told."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        self.told = dict(metadata)
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = state[prefix + "weight"].t()
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Net(nn.Module):
    def __init__(self, where: str = "cpu") -> None:
        super().__init__()
        with torch.device(where):
            self.top = Versioned(4, 4)
            self.inner = nn.Sequential(Versioned(4, 4), nn.BatchNorm1d(4))

    @property
    def told(self) -> list[dict[str, object]]:
        return [self.top.told, self.inner[0].told]  # type: ignore[list-item]  # Sequential has modules


def state_of(net: Net) -> OrderedDict[str, torch.Tensor]:
    state = net.state_dict()
    assert isinstance(state, OrderedDict)
    return state


def assert_as(model: Net, reference: Net) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, reference.state_dict()[name])
    assert model.told == reference.told


@STRATEGIES
@pytest.mark.parametrize("where", ["meta", "cpu"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
async def test_versions_are_those_of_the_file(
    rig: Rig, tmp_path: Path, strategy: str, where: str, *, zipped: bool
) -> None:
    path = tmp_path / "model.bin"
    torch.save(state_of(Net()), path, _use_new_zipfile_serialization=zipped)
    model, reference = Net(where), Net(where)
    reference.load_state_dict(torch.load(path, weights_only=True), assign=where == "meta")
    async with rig.loader(strategy=strategy) as loader:
        report = await loader.load(model, path)
    assert_as(model, reference)
    assert not any("_metadata" in said for said in report.decisions)


async def test_without_versions_modules_are_told_of_none(rig: Rig, tmp_path: Path) -> None:
    state = dict(state_of(Net()))
    reference = Net()
    reference.load_state_dict(state)
    write_checkpoint(tmp_path, state)
    torch.save(state, tmp_path / "plain.bin")
    async with rig.loader() as loader:
        for path in (tmp_path / "model.safetensors", tmp_path / "plain.bin"):
            model = Net()
            await loader.load(model, path)
            assert_as(model, reference)
            assert model.told == [{}, {}]


async def test_what_an_old_version_lacks_a_new_one_misses(rig: Rig, tmp_path: Path) -> None:
    state = nn.BatchNorm1d(4).state_dict()
    del state["num_batches_tracked"]  # which the first version did not have
    torch.save(state, tmp_path / "new.bin")
    torch.save(dict(state), tmp_path / "old.bin")
    async with rig.loader() as loader:
        await loader.load(nn.BatchNorm1d(4), tmp_path / "old.bin")
        with pytest.raises(MissingKeysError, match="num_batches_tracked"):
            await loader.load(nn.BatchNorm1d(4), tmp_path / "new.bin")


async def test_each_shard_speaks_for_its_own_modules(rig: Rig, tmp_path: Path) -> None:
    whole = state_of(Net())
    metadata: Any = whole._metadata  # type: ignore[attr-defined]  # torch puts it there
    parts: list[OrderedDict[str, torch.Tensor]] = [OrderedDict(), OrderedDict()]
    for name, tensor in whole.items():
        parts[name.startswith("inner.")][name] = tensor
    parts[0]._metadata = metadata  # type: ignore[attr-defined]  # and the other file, of version 1, says nothing
    parts[1]["inner.0.weight"] = whole["inner.0.weight"].t().contiguous()
    for number, part in enumerate(parts):
        torch.save(part, tmp_path / f"pytorch_model-{number}.bin")
    weight_map = {name: f"pytorch_model-{int(name.startswith('inner.'))}.bin" for name in whole}
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    model = Net()
    async with rig.loader() as loader:
        await loader.load(model, tmp_path)
    assert model.told == [{"version": 2}, {}]
    for name, tensor in model.state_dict().items():
        assert_same(tensor, whole[name])


@pytest.mark.parametrize(
    ("pattern", "to", "around"),
    [
        pytest.param(r"^old\.", "", lambda net: nn.ModuleDict({"old": net}), id="prefix dropped"),
        pytest.param("^", "model.", None, id="prefix added"),
        pytest.param("gamma", "weight", None, id="tensors"),
    ],
)
async def test_versions_follow_the_rules_for_names(
    rig: Rig, tmp_path: Path, pattern: str, to: str, around: Any
) -> None:
    saved = Net()
    state = (around(saved) if around else saved).state_dict()
    if pattern == "gamma":
        state["top.gamma"] = state.pop("top.weight")
    torch.save(state, tmp_path / "model.bin")
    net = Net()
    model = nn.ModuleDict({"model": net}) if to == "model." else net
    async with rig.loader(rename=[{"pattern": pattern, "to": to}]) as loader:
        await loader.load(model, tmp_path / "model.bin")
    assert net.told == [{"version": 2}, {"version": 2}]
    assert_same(net.top.weight, saved.top.weight)


async def test_metadata_that_is_not_plain_is_left_out_and_said_so(rig: Rig, tmp_path: Path) -> None:
    state = state_of(Net())
    metadata: Any = state._metadata  # type: ignore[attr-defined]  # torch puts it there
    metadata["top"] = {"version": 2, "more": ["in a list"]}
    path = tmp_path / "model.bin"
    torch.save(state, path)
    model = Net()
    async with rig.loader() as loader:
        report = await loader.load(model, path)
    assert model.told == [{"version": 2}, {"version": 2}]
    assert f"format: left out of {path}: what is not plain data in the _metadata of top" in report.decisions
    state._metadata = 7  # type: ignore[attr-defined]  # torch would fail
    torch.save(state, path)
    async with rig.loader() as loader:
        report = await loader.load(model, path)
    assert f"format: left out of {path}: its _metadata is not a dict" in report.decisions
