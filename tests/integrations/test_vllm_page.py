"""docs/integrations/vllm.md, with a stand-in for vLLM: options, JSON, and tensors that arrive. test_vllm.py has the real one."""

from __future__ import annotations

import argparse
import json
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.documents import ROOT, blocks, commands_in
from tests.fakes import vllm

COMMANDS = [words for block in blocks("docs/integrations/vllm.md", "console") for words in commands_in(block)]


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin is the one in pyproject.toml: what is installed in a checkout may be older."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    ((name, value),) = points["vllm.general_plugins"].items()
    vllm.install(monkeypatch, EntryPoint(name, value, "vllm.general_plugins"))


def test_program_loads_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEIGHTSTREAM_DEVICE__TARGET", "cpu")
    (block,) = blocks("docs/integrations/vllm.md", "python")
    exec(compile(block.text, str(block), "exec", dont_inherit=True), {"__name__": "__main__"})
    (engine,) = vllm.LLM.made
    expected = load_file(tmp_path / "small-qwen3" / "model.safetensors")
    assert engine.weights.keys() == expected.keys()
    assert all(torch.equal(engine.weights[name], tensor) for name, tensor in expected.items())
    assert capsys.readouterr().out == f"{[0] * 8}\n"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_name_a_format_and_options_that_exist(words: list[str]) -> None:
    parser = argparse.ArgumentParser("vllm", exit_on_error=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--load-format", required=True)
    parser.add_argument("--model-loader-extra-config", type=json.loads, default={})
    assert words[0] == "vllm"
    options = parser.parse_args(words[1:])
    loader = vllm.loader_of(vllm.LoadConfig(options.load_format, options.model_loader_extra_config))
    assert loader._config.model_fields_set == set(options.model_loader_extra_config)
