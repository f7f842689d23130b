"""Output that cannot be written: an exit code and one line, whatever Python's buffers are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.builders import write_checkpoint

#: What cuts a file off after so many blocks of 512 bytes, as a disk does that becomes full in the middle of a write.
_CUT = 'ulimit -f 8; exec "$@" > "$0"'


@pytest.fixture(name="path")
def fixture_path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", {f"layers.{n}.weight": torch.zeros(2) for n in range(200)})


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("output", ["/dev/full", "cut"])
def test_output_without_room_is_an_error_in_one_line(
    path: Path, tmp_path: Path, output: str, more: list[str], unbuffered: str
) -> None:
    if output == "cut" and not more:
        pytest.skip("the text is short enough")
    file = str(tmp_path / "output") if output == "cut" else output
    script = _CUT if output == "cut" else 'exec "$@" > "$0"'
    result = subprocess.run(
        ["/bin/sh", "-c", script, file, sys.executable, "-m", "weightstream", "inspect", str(path), *more],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: cannot write the output: ")


def test_output_that_is_closed_is_nobody_s_mistake(path: Path) -> None:
    script = 'exec "$@" >&-'
    result = subprocess.run(
        ["/bin/sh", "-c", script, "sh", sys.executable, "-m", "weightstream", "inspect", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")
