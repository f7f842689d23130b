"""`build_on_meta`: which model, in which dtype, what is real and what is on meta, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import write_checkpoint
from tests.real.families import FAMILIES, save_small, transformers
from weightstream.api import load_sync
from weightstream.config import LoaderConfig
from weightstream.device.config import DeviceConfig
from weightstream.errors import CheckpointError, MissingKeysError, UnsupportedFormatError
from weightstream.integrations.transformers import build_on_meta

CPU = LoaderConfig(device=DeviceConfig(target="cpu"))


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture(name="llama")
def fixture_llama(tmp_path: Path) -> Path:
    save_small("llama", tmp_path, dtype=torch.bfloat16)
    return tmp_path


def test_package_of_bridges_imports_none_of_the_libraries() -> None:
    program = "import sys, weightstream.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_no_checkpoint_holds_has_memory(family: str, tmp_path: Path) -> None:
    kind = save_small(family, tmp_path, dtype=torch.float32)
    model, reference = build_on_meta(tmp_path), kind.from_pretrained(tmp_path)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    buffers, expected = dict(model.named_buffers()), dict(reference.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == expected[name].dtype
        assert torch.equal(buffer, expected[name]), name
    assert not model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_same_names_share_a_parameter_as_after_from_pretrained(family: str, tmp_path: Path) -> None:
    def ties(model: torch.nn.Module) -> set[frozenset[str]]:
        names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), set()).add(name)
        return {frozenset(group) for group in names.values() if len(group) > 1}

    kind = save_small(family, tmp_path, dtype=torch.float32)
    model = build_on_meta(tmp_path)
    load_sync(model, tmp_path, config=CPU)
    assert ties(model) == ties(kind.from_pretrained(tmp_path))
    assert bool(ties(model)) == (family != "llama")


def test_dtype_is_that_of_the_configuration(llama: Path) -> None:
    assert build_on_meta(llama).get_parameter("lm_head.weight").dtype == torch.bfloat16


def test_dtype_that_is_given_goes_before_the_configuration(llama: Path) -> None:
    assert build_on_meta(llama, dtype=torch.float16).get_parameter("lm_head.weight").dtype == torch.float16


def test_dtype_comes_from_the_checkpoint_where_the_configuration_has_none(llama: Path) -> None:
    edit_config(llama, dtype=None)
    assert build_on_meta(llama).get_parameter("lm_head.weight").dtype == torch.bfloat16


def test_parameters_that_stay_in_float32_do_so(tmp_path: Path) -> None:
    kind = save_small("t5", tmp_path, dtype=torch.float32)
    model = build_on_meta(tmp_path, dtype=torch.float16)
    load_sync(model, tmp_path, config=CPU)
    expected = kind.from_pretrained(tmp_path, dtype=torch.float16).state_dict()
    dtypes = set()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
        dtypes.add(tensor.dtype)
    assert dtypes == {torch.float16, torch.float32}


def test_class_is_the_architecture_that_the_configuration_names(llama: Path) -> None:
    assert type(build_on_meta(llama)) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("architectures", [None, ["SomethingOfTheirOwn"]], ids=["none", "unknown"])
def test_class_is_the_bare_model_without_a_known_architecture(llama: Path, architectures: list[str] | None) -> None:
    edit_config(llama, architectures=architectures)
    assert type(build_on_meta(llama)) is transformers.LlamaModel


@pytest.mark.parametrize(
    "auto_class", [transformers.AutoModelForSequenceClassification, transformers.LlamaForSequenceClassification]
)
def test_class_that_is_given_goes_before_the_architecture(llama: Path, auto_class: type) -> None:
    model = build_on_meta(llama, auto_class=auto_class)
    assert type(model) is transformers.LlamaForSequenceClassification
    with pytest.raises(MissingKeysError, match=r"score\.weight"):
        load_sync(model, llama, config=CPU)


def test_path_may_be_a_file_of_the_checkpoint(llama: Path) -> None:
    assert type(build_on_meta(llama / "model.safetensors.index.json")) is transformers.LlamaForCausalLM


def test_loaded_weights_survive_a_later_initialisation(llama: Path) -> None:
    model: Any = build_on_meta(llama)
    load_sync(model, llama, config=CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.initialize_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_missing_configuration_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"config\.json.*no such file"):
        build_on_meta(tmp_path)


def test_missing_folder_is_refused_and_not_taken_for_a_name_on_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        build_on_meta("somebody/some-model")


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "nobody_knows"}, {"model_type": None}, {"num_attention_heads": "four"}],
    ids=["unknown type", "no type", "wrong value"],
)
def test_configuration_that_transformers_refuses_is_refused(llama: Path, changes: dict[str, object]) -> None:
    edit_config(llama, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json: transformers cannot"):
        build_on_meta(llama)


def test_configuration_that_is_no_json_is_refused(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: transformers cannot"):
        build_on_meta(llama)


def test_code_that_comes_with_a_checkpoint_is_not_run(llama: Path) -> None:
    marker = llama / "ran"
    (llama / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')")
    auto_map = {"AutoConfig": "modeling_own.Config", "AutoModel": "modeling_own.Model"}
    edit_config(llama, model_type="own", auto_map=auto_map)
    with pytest.raises(CheckpointError):
        build_on_meta(llama)
    assert not marker.exists()


def test_quantised_checkpoint_is_refused(llama: Path) -> None:
    edit_config(llama, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedFormatError, match="quantised"):
        build_on_meta(llama)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_kernels_that_a_checkpoint_names_are_not_used(tmp_path: Path, family: str, key: str) -> None:
    """With the package `kernels`, transformers would fetch them and run them."""
    save_small(family, tmp_path, dtype=torch.float32)
    edit_config(tmp_path, **{key: "kernels-community/none"})
    config: Any = build_on_meta(tmp_path).config
    assert config._attn_implementation in ("eager", "sdpa")


@pytest.mark.parametrize("architectures", [[1], [None], [["x"]], 5, {"a": 1}, "LlamaModel"])
def test_architectures_that_are_no_names_are_passed_over(llama: Path, architectures: object) -> None:
    edit_config(llama, architectures=architectures)
    assert type(build_on_meta(llama)).__name__ == "LlamaModel"


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_checkpoint_that_transformers_converts_is_refused_with_the_way_to_load_it(family: str, tmp_path: Path) -> None:
    save_small(family, tmp_path / "model", dtype=torch.float32)
    with pytest.raises(
        UnsupportedFormatError, match=r"transformers makes other tensors .* Load it with .*from_pretrained"
    ):
        build_on_meta(tmp_path / "model")
