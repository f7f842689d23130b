"""`weightstream inspect`: what is in a checkpoint, and the same checks as before a load."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.builders import shard_name, write_checkpoint
from tests.cli.conftest import Run
from tests.contract import INSPECT_KEYS


def test_inspect_shows_shards_dtypes_and_the_largest_tensors(weightstream: Run, tmp_path: Path) -> None:
    tensors = {
        "small": torch.zeros(3, dtype=torch.int64),
        "scalar": torch.zeros(()),
        "large": torch.zeros(100, 20, dtype=torch.bfloat16),
        "larger": torch.zeros(1000, 3),
    }
    write_checkpoint(tmp_path, tensors, num_shards=2)
    result = weightstream("inspect", tmp_path)
    assert (result.code, result.err) == (0, "")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[0] == "16.0 kB, 4 tensors in 2 shards"
    assert f"{shard_name(1, 2)} 2 tensors {os.stat(tmp_path / shard_name(1, 2)).st_size / 1000:.1f} kB" in lines
    assert lines[lines.index("Dtypes") + 1 :][:3] == [
        "F32 2 tensors 12.0 kB",
        "BF16 1 tensor 4.00 kB",
        "I64 1 tensor 24 B",
    ]
    assert lines[lines.index("Largest tensors") + 1 :] == [
        "larger 1000 x 3 F32 12.0 kB",
        "large 100 x 20 BF16 4.00 kB",
        "small 3 I64 24 B",
        "scalar scalar F32 4 B",
    ]


def test_inspect_tells_everything_as_json(weightstream: Run, checkpoint: Path) -> None:
    result = weightstream("inspect", checkpoint, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert list(found) == INSPECT_KEYS
    assert (found["num_bytes"], found["num_tensors"], found["num_shards"]) == (4 * (64 + 8) * 4, 8, 3)
    assert found["shards"][0].keys() == {"name", "num_bytes"}
    assert {tensor["name"]: tensor["shape"] for tensor in found["tensors"]}["layers.3.bias"] == [8]
    assert found["tensors"][0].keys() == {"name", "dtype", "shape", "num_bytes", "shard"}


def test_inspect_takes_one_file(weightstream: Run, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.zeros(2)})
    result = weightstream("inspect", tmp_path / "model.safetensors")
    assert result.code == 0
    assert result.out.startswith("8 B, 1 tensor in 1 shard")


def test_inspect_takes_a_folder_in_a_package(
    weightstream: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package_with_weights").mkdir()
    (tmp_path / "package_with_weights" / "__init__.py").touch()
    write_checkpoint(tmp_path / "package_with_weights" / "model", {"a": torch.zeros(2)})
    monkeypatch.syspath_prepend(tmp_path)
    assert weightstream("inspect", "pkg://package_with_weights/model").code == 0
    result = weightstream("inspect", "pkg://package_with_weights/nothing")
    assert result.code == 2
    assert result.err.startswith("error: checkpoint: pkg://package_with_weights/nothing: package")


def test_inspect_does_the_checks_of_a_load(weightstream: Run, checkpoint: Path) -> None:
    (checkpoint / shard_name(1, 3)).unlink()
    result = weightstream("inspect", checkpoint)
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        f"error: {checkpoint / shard_name(1, 3)}: the shard does not exist. model.safetensors.index.json names it:"
        " fetch it again\n"
    )


def test_inspect_shows_where_an_error_comes_from_if_asked(weightstream: Run, tmp_path: Path) -> None:
    result = weightstream("inspect", tmp_path / "nothing", "-v")
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err
    assert result.err.splitlines()[-1] == f"error: {tmp_path / 'nothing'}: no such file or folder"


def test_settings_of_the_environment_hold_for_inspect(
    weightstream: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = checkpoint / shard_name(0, 3)
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert "outside" in weightstream("inspect", checkpoint).err
    monkeypatch.setenv("WEIGHTSTREAM_PREFETCH__ALLOW_OUTSIDE_LINKS", "true")
    assert weightstream("inspect", checkpoint).code == 0


def test_names_do_nothing_to_the_terminal(weightstream: Run, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a\x1b]0;owned\x07": torch.zeros(2)})
    result = weightstream("inspect", tmp_path)
    assert result.code == 0
    assert "\x1b" not in result.out
    assert r"a\x1b]0;owned\x07" in result.out


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_inspect_shows_files_of_torch_save(weightstream: Run, tmp_path: Path, *, zipped: bool) -> None:
    whole = torch.zeros(100, 20, dtype=torch.bfloat16)
    path = tmp_path / "pytorch_model.bin"
    state = {"whole": whole, "turned": whole[:50].t(), "steps": torch.tensor(3)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    result = weightstream("inspect", tmp_path, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["checkpoint"] == str(path)
    assert found["shards"] == [{"name": path.name, "num_bytes": path.stat().st_size}]
    assert {tensor["name"]: (tensor["dtype"], tensor["shape"]) for tensor in found["tensors"]} == {
        "whole": ("BF16", [100, 20]),
        "turned": ("BF16", [20, 50]),
        "steps": ("I64", []),
    }


def test_inspect_names_what_a_pickle_asks_for(weightstream: Run, tmp_path: Path) -> None:
    torch.save({"net": torch.nn.Linear(2, 2)}, tmp_path / "a.pt")
    result = weightstream("inspect", tmp_path / "a.pt")
    assert result.code == 1
    assert "torch.nn.modules.linear.Linear" in result.err
