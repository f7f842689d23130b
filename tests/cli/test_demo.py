"""`weightstream demo`, with a small checkpoint: what it writes, when, where, and that its check would find an error."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.cli.conftest import Run
from weightstream import toy
from weightstream.display import format_bytes
from weightstream.prefetch.source import ByteRange, FileSource


@pytest.fixture(name="cache", autouse=True)
def fixture_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache folder, and a demo that is quick."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a b"))
    monkeypatch.setenv("WEIGHTSTREAM_DEVICE__TARGET", "cpu")
    for name, value in {"_HIDDEN": 64, "_VOCABULARY": 128, "_SHARD_BYTES": 2**21}.items():
        monkeypatch.setattr(toy, name, value)
    return tmp_path / "a b" / "weightstream"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_demo_writes_loads_and_checks(weightstream: Run, cache: Path) -> None:
    result = weightstream("demo")
    assert result.code == 0
    out = " ".join(result.out.split())
    assert "Loaded 26.0 MB, 3,187 tensors in 13 shards, onto cpu in" in out
    assert "checked every byte of all 3,187 tensors, against safetensors' own reader: equal" in out
    assert "files written now, and kept for the next run" in out
    assert f"delete rm -r '{cache}/demo'" in out
    assert names(cache) == ["demo", "demo.lock"]
    assert "Where the time went" in out
    assert "host memory" in out
    assert "weightstream: write" in result.err
    assert "weightstream: check" in result.err


def test_demo_uses_what_it_has_written_before(weightstream: Run, cache: Path) -> None:
    assert weightstream("demo").code == 0
    times = {file: file.stat().st_mtime_ns for file in (cache / "demo").iterdir()}
    result = weightstream("demo")
    assert result.code == 0
    assert "there from an earlier run" in result.out
    assert {file: file.stat().st_mtime_ns for file in (cache / "demo").iterdir()} == times


def test_fresh_writes_the_same_bytes_anew(weightstream: Run, cache: Path) -> None:
    weightstream("demo")
    before = contents(cache / "demo")
    (cache / "demo" / "more").touch()
    result = weightstream("demo", "--fresh")
    assert result.code == 0
    assert "written now" in result.out
    assert contents(cache / "demo") == before


@pytest.mark.parametrize("damage", ["cut", "missing", "other recipe"])
def test_demo_replaces_what_is_not_complete(weightstream: Run, cache: Path, damage: str) -> None:
    weightstream("demo")
    before = contents(cache / "demo")
    shard = next((cache / "demo").glob("*.safetensors"))
    index = cache / "demo" / "model.safetensors.index.json"
    if damage == "cut":
        os.truncate(shard, 1000)
    elif damage == "missing":
        shard.unlink()
    else:
        index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": {"recipe": "weightstream demo 0"}}))
    result = weightstream("demo")
    assert result.code == 0
    assert "written now" in result.out
    assert contents(cache / "demo") == before


def test_checkpoint_has_small_and_large_tensors_of_two_dtypes() -> None:
    """At its real size, which the other tests do not take the time for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "_HIDDEN", 1024)
        patch.setattr(toy, "_VOCABULARY", 4096)
        patch.setattr(toy, "_SHARD_BYTES", 2**27)
        model = toy.build_on_meta()
        tensors = model.state_dict().values()
        assert all(tensor.is_meta for tensor in tensors)
        assert len(tensors) == 3187
        assert toy.checkpoint_bytes(model) == pytest.approx(2**29, rel=0.1)
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16, torch.float32}
        assert sum(tensor.nbytes >= 2**20 for tensor in tensors) > 50
        assert sum(tensor.nbytes < 2**20 for tensor in tensors) > 3000
        assert len(toy._shards(model)) == 5


def test_wrong_byte_is_found(weightstream: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: FileSource, wanted: ByteRange, buffers: list[memoryview]) -> None:
        real(self, wanted, buffers)
        if wanted.shard == 3:
            buffers[-1][-1] ^= 1

    real = FileSource.read
    monkeypatch.setattr(FileSource, "read", read)
    result = weightstream("demo")
    assert (result.code, result.out) == (1, "")
    assert "error: " in result.err
    assert "differ from what safetensors' own reader finds" in result.err


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_disk_without_room_is_told_before_anything_is_written(
    weightstream: Run, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 12_300_000, 12_300_000))
    result = weightstream("demo")
    needed = format_bytes(toy.checkpoint_bytes(toy.build_on_meta()))
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1] == (
        f"error: {cache}: the disk has no room for the demo's checkpoint: expected {needed} free, found 12.3 MB."
        " Set XDG_CACHE_HOME to a folder on a disk with room"
    )
    assert names(cache) == ["demo.lock"]


def test_disk_that_fills_up_leaves_nothing(weightstream: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def header(tensors: dict[str, torch.Tensor]) -> bytes:
        if len(list(cache.glob("demo.partial-*/*"))) == 3:
            raise OSError(28, "No space left on device")
        return real(tensors)

    real = toy._header
    monkeypatch.setattr(toy, "_header", header)
    result = weightstream("demo")
    assert result.code == 1
    assert "cannot write the demo's checkpoint: No space left on device" in result.err
    assert names(cache) == ["demo.lock"]


def test_cache_folder_that_cannot_be_made_is_told(weightstream: Run, cache: Path) -> None:
    cache.parent.write_text("in the way")
    result = weightstream("demo")
    assert result.code == 1
    assert "cannot write the demo's checkpoint: " in result.err
    assert "Set XDG_CACHE_HOME" in result.err


def test_partial_folders_of_the_dead_are_removed(weightstream: Run, cache: Path) -> None:
    dead, alive = cache / "demo.partial-4194305", cache / f"demo.partial-{os.getppid()}"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    assert weightstream("demo").code == 0
    assert names(cache) == ["demo", "demo.lock", alive.name]
