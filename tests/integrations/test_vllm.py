"""vLLM's own engine, on the CPU, with `load_format="weightstream"`. Run by `make test-vllm`, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.documents import blocks, commands_in
from tests.real.families import save_small

pytestmark = [
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="needs vLLM, which has an environment of its own: make test-vllm"
    ),
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(600),
]

#: One attention head of 32 elements: the smallest that vLLM's kernels for the CPU take.
SIZES: dict[str, object] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
SMALL_READS = {"prefetch": {"chunk": "64KiB", "host_memory": "1MiB"}}


def run_engine(folder: Path, load_format: str, extra: object, scratch: Path) -> subprocess.CompletedProcess[str]:
    """Load and generate in a process of its own."""
    program = Path(__file__).with_name("vllm_generate.py")
    return run_program([program, folder, load_format, json.dumps(extra)], scratch)


def run_program(arguments: list[str | Path], scratch: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with vLLM's settings for a small machine, and with our log lines printed."""
    log_config = {
        "version": 1,
        "handlers": {"all": {"class": "logging.StreamHandler"}},
        "loggers": {name: {"handlers": ["all"], "level": "INFO"} for name in ("weightstream", "vllm")},
    }
    (scratch / "logging.json").write_text(json.dumps(log_config))
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_CONFIG_PATH": str(scratch / "logging.json"),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=scratch,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def tokens_of(run: subprocess.CompletedProcess[str]) -> list[list[int]]:
    found = [line for line in run.stdout.splitlines() if line.startswith("tokens:")]
    assert found, run.stderr[-3000:]
    tokens: list[list[int]] = json.loads(found[0].removeprefix("tokens:"))
    return tokens


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_tokens_equal_those_of_vllm_s_own_loader(family: str, tmp_path: Path) -> None:
    save_small(family, tmp_path / "model", dtype=torch.bfloat16, **SIZES)
    theirs = run_engine(tmp_path / "model", "safetensors", {}, tmp_path)
    ours = run_engine(tmp_path / "model", "weightstream", SMALL_READS, tmp_path)
    assert tokens_of(ours) == tokens_of(theirs)
    assert len({token for tokens in tokens_of(ours) for token in tokens}) > 2, "constant tokens prove nothing"
    lines = [line for line in ours.stderr.splitlines() + ours.stdout.splitlines() if "GB, onto cpu" in line]
    assert len(lines) == 1, "the weights were read by weightstream, once"
    assert "GB, onto cpu" not in theirs.stderr + theirs.stdout


# The loader without an engine


@pytest.fixture(name="folder")
def fixture_folder(tmp_path: Path) -> Path:
    save_small("qwen3", tmp_path, dtype=torch.float32, **SIZES)
    return tmp_path


def make_loader(extra: object) -> Any:
    import_module("vllm.plugins").load_general_plugins()
    config = import_module("vllm.config.load").LoadConfig(load_format="weightstream", model_loader_extra_config=extra)
    return import_module("vllm.model_executor.model_loader").get_model_loader(config)


def source_of(loader: Any, folder: Path, **changes: object) -> Any:
    return type(loader).Source(str(folder), None, **changes)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_plugin_is_found_by_its_entry_point() -> None:
    loader = make_loader({})
    assert type(loader).__name__ == "WeightstreamLoader"
    assert loader.counter_before_loading_weights == 0.0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"prefetch": {"chunks": "1MiB"}}, "chunks"),
        ({"num_threads": 4}, "num_threads"),
        ({"prefetch": {"chunk": "many"}}, "chunk"),
        ({"checkpoint": "/models/x"}, "checkpoint: vLLM decides that"),
        ({"model": "a.b:c"}, "model: vLLM decides that"),
    ],
    ids=["unknown-key", "key-of-another-loader", "wrong-value", "checkpoint", "model"],
)
def test_options_that_are_none_are_errors(extra: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(extra)


def test_tensors_are_those_of_the_files_with_the_prefix(folder: Path) -> None:
    loader = make_loader(SMALL_READS)
    found = dict(loader._get_weights_iterator(source_of(loader, folder, prefix="language.")))
    expected = stored(folder)
    assert found.keys() == {f"language.{name}" for name in expected}
    assert all(torch.equal(found[f"language.{name}"], tensor) for name, tensor in expected.items())
    assert loader.counter_before_loading_weights > 0


def test_tensors_that_are_kept_stay_what_they_are(folder: Path) -> None:
    """The ring is small enough to have been round many times, and the files are gone."""
    expected = stored(folder)
    loader = make_loader(SMALL_READS)
    kept = dict(loader._get_weights_iterator(source_of(loader, folder)))
    for tensor in kept.values():
        tensor.add_(1)
    for name, tensor in kept.items():
        assert torch.equal(tensor, expected[name] + 1), f"{name} shares elements with another"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored(folder).items())


def test_iterator_that_is_left_early_leaves_no_thread(folder: Path) -> None:
    loader = make_loader(SMALL_READS)
    weights = loader._get_weights_iterator(source_of(loader, folder))
    name, tensor = next(weights)
    weights.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("weightstream-")] == []
    assert torch.equal(tensor, stored(folder)[name])


def test_files_without_an_index_are_all_read(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    loader = make_loader({})
    assert dict(loader._get_weights_iterator(source_of(loader, folder))).keys() == stored(folder).keys()


def test_folder_without_safetensors_is_an_error(tmp_path: Path) -> None:
    loader = make_loader({})
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        loader._get_weights_iterator(source_of(loader, tmp_path))


def test_example_in_the_documentation_runs(tmp_path: Path) -> None:
    (program,) = blocks("docs/integrations/vllm.md", "python")
    (tmp_path / "example.py").write_text(program.text)
    found = run_program([tmp_path / "example.py"], tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "GB, onto cpu" in found.stderr + found.stdout


def test_commands_of_the_documentation_are_understood() -> None:
    """By vLLM's own parser, as far as it is the engine's."""
    arguments = import_module("vllm.engine.arg_utils")
    parser = arguments.EngineArgs.add_cli_args(arguments.FlexibleArgumentParser())
    import_module("vllm.plugins").load_general_plugins()
    for block in blocks("docs/integrations/vllm.md", "console"):
        for words in commands_in(block):
            assert words[:2] == ["vllm", "serve"]
            options = parser.parse_args(["--model", *words[2:]])
            config = arguments.EngineArgs.from_cli_args(options).create_load_config()
            loader = import_module("vllm.model_executor.model_loader").get_model_loader(config)
            assert type(loader).__name__ == "WeightstreamLoader"
