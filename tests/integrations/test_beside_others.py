"""README's table of what others do: each of their cells, tried, so that an upgrade of theirs that changes one is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.documents import ROOT

accelerate: Any = pytest.importorskip("accelerate", reason="accelerate is not installed")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

CPU = {"": "cpu"}
UP, HEAD, EMBED = "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"


def configuration(*, tied: bool = False) -> Any:
    return transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=20,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
    )


def new(*, tied: bool = False) -> Any:
    return transformers.LlamaForCausalLM(configuration(tied=tied))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in new().state_dict().items()}


def write(folder: Path, state: dict[str, torch.Tensor], name: str = "model.safetensors", *, tied: bool = False) -> Path:
    configuration(tied=tied).save_pretrained(folder)
    if name.endswith(".safetensors"):
        save_file(state, folder / name, {"format": "pt"})
    else:
        torch.save(state, folder / name)
    return folder


def in_shards(folder: Path, state: dict[str, torch.Tensor], *, pickled: bool) -> Path:
    model = new()
    model.load_state_dict(state)
    model.save_pretrained(folder, max_shard_size="4KB")
    index = folder / "model.safetensors.index.json"
    if pickled:
        weight_map = json.loads(index.read_text())["weight_map"]
        for file in set(weight_map.values()):
            torch.save(load_file(folder / file), folder / f"{file}.bin")
            (folder / file).unlink()
        index.unlink()
        pickles = {name: f"{file}.bin" for name, file in weight_map.items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": pickles}))
    return folder


def by_accelerate(path: Path, **options: Any) -> Any:
    model = new(tied=options.pop("tied", False))
    accelerate.load_checkpoint_in_model(model, str(path), device_map=CPU, **options)
    return model


def by_transformers(path: Path, **options: Any) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(path, **options)


BOTH = pytest.mark.parametrize("load", [by_accelerate, by_transformers], ids=lambda load: load.__name__)
Load = Callable[..., Any]


def assert_holds(model: Any, state: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_versions_are_those_that_the_readme_names() -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"accelerate {accelerate.__version__}" in readme
    assert f"transformers {transformers.__version__}" in readme


@BOTH
def test_formats(tmp_path: Path, state: dict[str, torch.Tensor], load: Load) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        assert_holds(load(write(tmp_path / name, state, name)), state)
    for pickled in (False, True):
        assert_holds(load(in_shards(tmp_path / f"shards-{pickled}", state, pickled=pickled)), state)
    with pytest.raises((ValueError, OSError)):
        load(write(tmp_path / "pt", state, "model.pt"))


def test_file_by_its_path(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    file = write(tmp_path, state) / "model.safetensors"
    assert_holds(by_accelerate(file), state)
    with pytest.raises(OSError, match=r"Repo id|valid JSON"):
        by_transformers(file, config=configuration())


def test_missing_and_unexpected(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    del state[UP]
    path = write(tmp_path / "missing", state)
    by_accelerate(path, strict=True)
    more = write(tmp_path / "more", {**state, "stranger": torch.zeros(2)})
    by_accelerate(more)
    with pytest.raises(ValueError, match="stranger"):
        by_accelerate(more, strict=True)
    model, found = by_transformers(more, output_loading_info=True)
    assert (found["missing_keys"], found["unexpected_keys"]) == ({UP}, {"stranger"})
    assert not model.get_parameter(UP).is_meta


def test_rename(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = write(tmp_path, {name.replace("model.", "net."): tensor for name, tensor in state.items()})
    assert_holds(by_transformers(path, key_mapping={"^net": "model"}), state)


@BOTH
def test_float8_into_float32_is_cast(tmp_path: Path, state: dict[str, torch.Tensor], load: Load) -> None:
    state[UP] = state[UP].to(torch.float8_e4m3fn)
    options = {"dtype": torch.float32} if load is by_transformers else {}
    model = load(write(tmp_path, state), **options)
    assert torch.equal(model.get_parameter(UP), state[UP].float())


def test_ties_that_differ_in_the_file(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = write(tmp_path, state, tied=True)
    model = by_accelerate(path, tied=True)
    assert model.get_parameter(HEAD) is model.get_parameter(EMBED)
    assert any(torch.equal(model.get_parameter(HEAD), state[name]) for name in (HEAD, EMBED))
    model = by_transformers(path)
    assert model.get_parameter(HEAD) is not model.get_parameter(EMBED)
    assert_holds(model, state)


def test_hooks_of_a_model_on_meta_are_not_called(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    called: list[object] = []

    class Hooked(transformers.LlamaForCausalLM):  # type: ignore[misc]  # there are no types of it here
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers[0].register_load_state_dict_pre_hook(lambda *_: called.append(1))

    path = write(tmp_path, state)
    Hooked.from_pretrained(path)
    with accelerate.init_empty_weights():
        model = Hooked(configuration())
    accelerate.load_checkpoint_in_model(model, str(path), device_map=CPU)
    assert called == []


def test_disk(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = write(tmp_path / "c", state)
    device_map = {"model": "cpu", "lm_head": "disk"}
    model = by_transformers(path, device_map=device_map, offload_folder=tmp_path / "by-transformers")
    assert model.hf_device_map == device_map
    model = new()
    accelerate.load_checkpoint_in_model(model, str(path), device_map, offload_folder=tmp_path / "by-accelerate")
    assert model.get_parameter(HEAD).is_meta


def test_accelerate_leaves_a_model_partly_written(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = write(tmp_path, {**state, UP: torch.zeros(2, 2)})
    model = new()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="shape"):
        accelerate.load_checkpoint_in_model(model, str(path), device_map=CPU)
    written = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert 0 < len(written) < len(before)
    with pytest.raises(RuntimeError, match="mismatched"):
        by_transformers(path)
