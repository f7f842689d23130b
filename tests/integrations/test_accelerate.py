"""Both functions, accelerate's and ours, leave the same model."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.builders import assert_same, write_checkpoint
from tests.models import tensors_of
from weightstream.errors import PlacementError
from weightstream.integrations.accelerate import load_checkpoint_in_model

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
Load = Callable[..., None]

both = pytest.mark.parametrize(
    "load", [accelerate.load_checkpoint_in_model, load_checkpoint_in_model], ids=["accelerate", "weightstream"]
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.linear2 = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear2(self.norm(self.linear1(x)))
        return result


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def assert_holds(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


MAPS: list[dict[str, Any] | None] = [None, {"": "cpu"}, {"linear1": "cpu", "norm": "cpu", "linear2": "cpu"}]


def test_signature_is_accelerates() -> None:
    theirs = inspect.signature(accelerate.load_checkpoint_in_model).parameters.values()
    ours = inspect.signature(load_checkpoint_in_model).parameters.values()
    assert [(one.name, one.default, one.kind) for one in ours] == [(one.name, one.default, one.kind) for one in theirs]


@both
@pytest.mark.parametrize("device_map", MAPS, ids=["no-map", "whole", "by-module"])
@pytest.mark.parametrize("make", [Net, on_meta], ids=["materialised", "meta"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_whole_model(tmp_path: Path, load: Load, device_map: Any, make: Callable[[], Net], num_shards: int) -> None:
    if load is not load_checkpoint_in_model and device_map is None and make is on_meta:
        pytest.skip("accelerate's needs a map, or a process group, for a model on meta")
    tensors = tensors_of(Net())
    model = make()
    load(model, write_checkpoint(tmp_path, tensors, num_shards=num_shards), device_map=device_map)
    assert_holds(model, tensors)


@both
@pytest.mark.parametrize("dtype", [torch.float16, "float16", "torch.bfloat16"])
def test_dtype_with_a_map(tmp_path: Path, load: Load, dtype: Any) -> None:
    tensors = tensors_of(Net())
    model = on_meta()
    load(model, write_checkpoint(tmp_path, tensors), device_map={"": "cpu"}, dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert_holds(
        model, {name: tensor.to(wanted) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    )


@both
def test_missing_and_unexpected_names_pass_unless_strict(tmp_path: Path, load: Load) -> None:
    tensors = tensors_of(Net())
    del tensors["linear2.bias"]
    path = write_checkpoint(tmp_path, {**tensors, "extra": torch.zeros(2)})
    model = on_meta()
    load(model, path, device_map={"": "cpu"})
    assert model.linear2.bias.is_meta
    assert_same(model.linear1.weight, tensors["linear1.weight"])
    with pytest.raises(Exception, match="extra"):
        load(on_meta(), path, device_map={"": "cpu"}, strict=True)


def test_module_on_meta_stays_there_and_devices_may_be_objects(tmp_path: Path) -> None:
    """Accelerate's function hands both to safetensors, which takes neither."""
    tensors = tensors_of(Net())
    model = on_meta()
    path = write_checkpoint(tmp_path, tensors)
    load_checkpoint_in_model(model, path, device_map={"": torch.device("cpu"), "linear2": "meta"})
    assert model.linear2.weight.is_meta
    assert_same(model.linear1.weight, tensors["linear1.weight"])


@both
def test_map_without_a_module_is_an_error(tmp_path: Path, load: Load) -> None:
    path = write_checkpoint(tmp_path, tensors_of(Net()))
    with pytest.raises((ValueError, PlacementError), match=r"device"):
        load(on_meta(), path, device_map={"linear1": "cpu", "norm": "cpu"})


@both
def test_inferred_map_and_dispatch(tmp_path: Path, load: Load) -> None:
    tensors = tensors_of(Net())
    tensors["norm.running_var"].abs_()
    path = write_checkpoint(tmp_path, tensors)
    model = on_meta()
    device_map = accelerate.infer_auto_device_map(model, max_memory={"cpu": 10**9})
    load(model, path, device_map=device_map)
    model.eval()
    reference = Net().eval()
    reference.load_state_dict(tensors)
    x = torch.randn(2, 3)
    dispatched = accelerate.dispatch_model(model, device_map=device_map, main_device="cpu")
    assert torch.equal(dispatched(x), reference(x))


PROGRAM = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate import load_checkpoint_in_model

def build(folder):
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.tie_weights()
    device_map = infer_auto_device_map(model, max_memory={"cpu": 10**9})
    load_checkpoint_in_model(model, folder, device_map=device_map, dtype=torch.bfloat16, full_state_dict=True)
    return dispatch_model(model.eval(), device_map=device_map, main_device="cpu")
"""


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("module", ["accelerate", "weightstream.integrations.accelerate"])
def test_program_that_changes_one_import_builds_the_same_model(tmp_path: Path, module: str, *, tied: bool) -> None:
    """As an inference server builds its model: empty, a map inferred, filled from shards, and put to use."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=tied,
    )
    reference = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16
    ).eval()  # `to` would cast the rotary table
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    scope: dict[str, Any] = {}
    exec(PROGRAM.replace("from accelerate import load_checkpoint", f"from {module} import load_checkpoint"), scope)
    model = scope["build"](tmp_path)
    for name, tensor in reference.state_dict().items():
        assert_same(model.state_dict()[name], tensor)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    x = torch.arange(10).reshape(1, 10)
    with torch.inference_mode():
        assert torch.equal(model(x).logits, reference(x).logits)


async def test_inside_a_running_event_loop(tmp_path: Path) -> None:
    assert asyncio.get_running_loop().is_running()
    tensors = tensors_of(Net())
    model = on_meta()
    load_checkpoint_in_model(model, write_checkpoint(tmp_path, tensors), device_map={"": "cpu"})
    assert_holds(model, tensors)


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": {"": "disk"}, "offload_folder": "somewhere"},
        {"offload_8bit_bnb": True},
        {"full_state_dict": False},
        {"broadcast_from_rank0": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, options: dict[str, Any]) -> None:
    model = on_meta()
    with pytest.raises(PlacementError, match=f"{next(iter(options))}.* is not supported here"):
        load_checkpoint_in_model(model, tmp_path, **options)
