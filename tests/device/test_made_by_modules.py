"""What modules that load themselves put where tensors were on meta: values, ties and dtypes."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.builders import write_checkpoint
from weightstream import LoaderConfig, load_sync
from weightstream.errors import PlacementError, WeightstreamError


@pytest.mark.parametrize("commit", ["progressive", "atomic"])
@pytest.mark.parametrize("left_out", ["", "0.num_batches_tracked", "1.num_batches_tracked"])
@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_buffer_that_two_modules_with_hooks_share_gets_its_value(
    tmp_path: Path, where: str, left_out: str, commit: str
) -> None:
    """Each of them puts a new one there, where the tensor is on meta, and one of them is not given its value."""
    with torch.device(where):
        model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
        model[1].num_batches_tracked = model[0].num_batches_tracked
    stored = {name: torch.full(tensor.shape, 7).to(tensor.dtype) for name, tensor in model.state_dict().items()}
    path = write_checkpoint(tmp_path / "c", {name: tensor for name, tensor in stored.items() if name != left_out})
    load_sync(model, path, config=LoaderConfig.model_validate({"device": {"target": "cpu", "commit": commit}}))
    assert model[0].num_batches_tracked is model[1].num_batches_tracked
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("dtype", "expected"), [("model", torch.float32), ("bfloat16", torch.bfloat16), ("checkpoint", torch.float16)]
)
def test_what_a_hook_joins_on_meta_has_the_dtype_that_was_asked_for(
    tmp_path: Path, dtype: str, expected: torch.dtype
) -> None:
    def join(_: nn.Module, state: dict[str, torch.Tensor], prefix: str, *__: Any) -> None:
        state[f"{prefix}weight"] = torch.cat([state.pop(f"{prefix}{name}") for name in "qk"])

    model = nn.Linear(2, 4, device="meta", bias=False)
    register: Callable[..., object] = model.register_load_state_dict_pre_hook
    register(join)
    stored = {name: torch.rand(2, 2).half() for name in "qk"}
    path = write_checkpoint(tmp_path / "c", stored)
    load_sync(model, path, config=LoaderConfig.model_validate({"device": {"target": "cpu", "dtype": dtype}}))
    assert model.weight.dtype is expected
    assert torch.equal(model.weight, torch.cat([stored["q"], stored["k"]]).to(expected))


def repack(module: nn.Module, *_: Any) -> None:
    weight = module.get_parameter("weight").detach()
    del module.weight
    module.register_buffer("packed", weight.t().contiguous())


def drop_bias(module: nn.Module, *_: Any) -> None:
    module.register_parameter("bias", None)


def transpose(module: nn.Module, *_: Any) -> None:
    module.weight = nn.Parameter(module.get_parameter("weight").detach().t().contiguous())


@pytest.mark.parametrize("commit", ["progressive", "atomic"])
@pytest.mark.parametrize("where", ["meta", "cpu"])
@pytest.mark.parametrize("hook", [repack, drop_bias, transpose])
def test_hooks_may_take_parameters_away_but_give_no_storage_another_shape(
    tmp_path: Path, hook: Callable[..., None], where: str, commit: str
) -> None:
    def make() -> nn.Module:
        module = nn.Linear(2, 3, device=where)
        register: Callable[..., object] = module.register_load_state_dict_post_hook
        register(hook)
        return module

    stored = {"weight": torch.rand(3, 2), "bias": torch.rand(3)}
    path = write_checkpoint(tmp_path / "c", stored)
    model, expected = make(), make()
    expected.load_state_dict(stored, assign=where == "meta")
    config = LoaderConfig.model_validate({"device": {"target": "cpu", "commit": commit}})
    if hook is transpose and where == "cpu":
        with pytest.raises(PlacementError, match="gave this parameter another shape"):
            load_sync(model, path, config=config)
        return
    load_sync(model, path, config=config)
    found = model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.state_dict().items())


class WithExtraState(nn.Linear):
    """As modules of TransformerEngine: the extra state is a tensor."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def with_an_old_name(num_in: int, num_out: int) -> nn.Module:
    def rename(_: nn.Module, state: dict[str, torch.Tensor], prefix: str, *__: Any) -> None:
        if f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")

    module = nn.Linear(num_in, num_out)
    register: Callable[..., object] = module.register_load_state_dict_pre_hook
    register(rename)
    return module


@pytest.mark.parametrize("make", [WithExtraState, with_an_old_name])
@pytest.mark.parametrize("left", [{"1": "meta"}, {"1.weight": "meta", "1.bias": "meta"}])
def test_names_of_a_module_that_a_map_leaves_on_meta_are_not_unexpected(
    tmp_path: Path, make: Callable[[int, int], nn.Module], left: dict[str, int | str]
) -> None:
    stored = nn.Sequential(nn.Linear(2, 2), make(2, 2)).state_dict()
    if make is with_an_old_name:
        stored["1.kernel"] = stored.pop("1.weight")
    path = write_checkpoint(tmp_path / "c", dict(stored))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), make(2, 2))
    report = load_sync(model, path, device_map={"": "cpu", **left})
    assert set(report.unloaded_keys) == {"1.weight", "1.bias"}
    assert report.unexpected_keys == ()
    assert torch.equal(model.get_parameter("0.weight"), stored["0.weight"])


def fails_in_mid_load() -> nn.Module:
    def fail(*_: Any) -> None:
        raise RuntimeError("half-way")

    module = nn.Linear(3, 3)
    register: Callable[..., object] = module.register_load_state_dict_post_hook
    register(fail)
    return module


@pytest.mark.parametrize("commit", ["progressive", "atomic"])
@pytest.mark.parametrize("strategy", ["stream", "direct"])
@pytest.mark.parametrize("where", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("make", "left_out"),
    [
        (lambda: nn.Linear(3, 3), ""),
        (lambda: nn.BatchNorm1d(3), ""),
        (lambda: with_an_old_name(3, 3), ""),
        (lambda: WithExtraState(3, 3), ""),
        (lambda: nn.LSTM(3, 3), ""),
        (fails_in_mid_load, ""),
        (lambda: nn.BatchNorm1d(3), "2.bias"),
    ],
    ids=["plain", "batch norm", "hook", "extra state", "lstm", "fails in mid-load", "fails in the preflight"],
)
def test_model_goes_with_its_last_reference(
    tmp_path: Path, make: Callable[[], nn.Module], left_out: str, where: str, strategy: str, commit: str
) -> None:
    """Nothing that a load has known keeps the modules or their tensors."""
    with torch.device(where):
        model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4), make(), make())
        model[1].weight = model[0].weight
    stored = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    path = write_checkpoint(tmp_path / "c", {name: tensor for name, tensor in stored.items() if name != left_out})
    fails = bool(left_out) or make is fails_in_mid_load
    config = LoaderConfig.model_validate({"strategy": strategy, "device": {"target": "cpu", "commit": commit}})
    with pytest.raises(WeightstreamError) if fails else contextlib.nullcontext():
        load_sync(model, path, config=config)
    references = [weakref.ref(one) for one in (*model.modules(), *model.parameters())]
    del model
    gc.collect()
    assert not any(reference() is not None for reference in references)
