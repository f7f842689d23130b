"""`--timeline`: a file of what happened, or a reason, before anything is loaded, why there will be none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from weightstream import drawing


@pytest.mark.parametrize("to", ["page-cache", "host"])
def test_warm_writes_a_trace(weightstream: Run, config: Path, tmp_path: Path, to: str) -> None:
    file = tmp_path / "load.json"
    result = weightstream("warm", config, "--to", to, "--timeline", file)
    assert result.code == 0
    assert f"writing {file}" in result.err
    kinds = {event.get("cat") for event in json.loads(file.read_text())["traceEvents"]}
    assert {"phase", "preflight", "read"} <= kinds


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_warm_writes_pages_and_pictures(weightstream: Run, config: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"load.{suffix}"
    assert weightstream("warm", config, "--quiet", "--json", "--timeline", file).err == ""
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("load.svg", "ends in none of them"),
        ("no/load.png", "there is no folder"),
        ("fifo.json", "not a regular file"),
        ("folder.html", "not a regular file"),
    ],
)
def test_impossible_files_are_usage_errors(weightstream: Run, config: Path, name: str, message: str) -> None:
    os.mkfifo(config.parent / "fifo.json")
    (config.parent / "folder.html").mkdir()
    result = weightstream("warm", config, "--timeline", config.parent / name)
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert "importing torch" not in result.err


def test_missing_library_names_the_extra(weightstream: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    result = weightstream("warm", config, "--timeline", config.parent / "load.html")
    assert result.code == 2
    assert "pip install 'weightstream[timeline]'" in result.err


def test_bench_writes_the_timeline_of_one_more_load(weightstream: Run, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    result = weightstream("bench", checkpoint, "--device", "cpu", "--runs", 1, "--timeline", file)
    assert result.code == 0
    assert json.loads(file.read_text())["traceEvents"]
