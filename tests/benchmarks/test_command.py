"""The whole command, on a checkpoint that is as good as nothing. No time is looked at."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib, of the extra `bench`")
def test_comparison_is_saved_as_tables_numbers_and_pictures(tmp_path: Path) -> None:
    arms = ["ws-stream", "load-file", "safe-open-meta", "runai", "buffered-2"]
    sizes = ["--checkpoints", "small", "--small-tensors", "50", "--caches", "warm", "--runs", "1"]
    done = run("compare", *sizes, "--arms", *arms, "--folder", str(tmp_path), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out" / "compare.json").read_text())
    found = {one["arm"]: one for one in document["series"]}
    assert list(found) == arms
    for arm in ("ws-stream", "load-file", "safe-open-meta"):
        (result,) = found[arm]["results"]
        assert result["num_checked"] == 50
        assert result["num_imports"] <= 5  # imports are no part of a load
    assert found["buffered-2"]["results"]
    assert found["runai"]["results"] or "not installed" in found["runai"]["reason"]
    assert (tmp_path / "out" / "compare.md").read_text() == done.stdout.removesuffix("\n")
    assert (tmp_path / "out" / "compare-small.png").stat().st_size > 1000


def test_unknown_arm_is_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--arms", "nobody", "--folder", str(tmp_path)])
    assert "invalid choice: 'nobody'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_interrupted_comparison_keeps_what_was_measured(tmp_path: Path) -> None:
    sizes = ["--checkpoints", "small", "--small-tensors", "50", "--caches", "warm", "--runs", "1000000"]
    where = ["--folder", str(tmp_path), "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "benchmarks", "compare", *sizes, "--arms", "ws-stream", *where]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("2/"):  # the second turn of a million
                break
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("interrupted: not everything was measured\n")
    assert "| **weightstream stream** | meta |" in out
    assert (tmp_path / "out" / "compare.md").read_text() == out.removesuffix("\n")


def test_disk_that_is_full_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SystemExit, match=r"a checkpoint cannot be written: .*No space left on device"):
        main(["compare", "--checkpoints", "small", "--small-tensors", "50", "--folder", str(tmp_path)])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="there is no CUDA device"):
        main(["compare", "--device", "cuda", "--folder", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
