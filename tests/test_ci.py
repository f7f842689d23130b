""".ci/tools: what cannot be installed is an error in CI, and only said elsewhere; a mirror gets a second and a third chance."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.documents import ROOT


def run_tools(folder: Path, *, ci: str | None, apt: str, make: str) -> tuple[int, str, list[str]]:
    """Run it with programs of our own: return its exit code, what it said, and which of them it called."""
    log = folder / "log"
    for name, body in {"apt-get": apt, "make": make, "sleep": "exit 0"}.items():
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/bash\necho {name} "$1" >> {log}\n{body}\n')
        program.chmod(0o755)
    for name in ("bash", "env", "dirname"):
        (folder / "bin" / name).symlink_to(f"/usr/bin/{name}")
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    environment |= {"PATH": str(folder / "bin")} | ({} if ci is None else {"CI": ci})
    done = subprocess.run([ROOT / ".ci/tools"], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()


@pytest.mark.parametrize(("ci", "code"), [("true", 1), (None, 0), ("false", 0)], ids=["ci", "elsewhere", "not-ci"])
def test_what_cannot_be_installed_is_an_error_in_ci_alone(tmp_path: Path, ci: str | None, code: int) -> None:
    found, said, calls = run_tools(tmp_path, ci=ci, apt="exit 100", make="exit 0")
    assert (found, said) == (code, "Chromium with its driver cannot be installed here\n")
    assert calls.count("apt-get update") == 3
    assert ("make node_modules" in calls) == (code == 0)


def test_trace_parser_is_an_error_too(tmp_path: Path) -> None:
    found, said, calls = run_tools(tmp_path, ci="1", apt="exit 0", make="exit 2")
    assert (found, said) == (1, "Perfetto's parser cannot be installed here\n")
    assert calls.count("make node_modules") == 3


def test_mirror_that_answers_later_is_enough(tmp_path: Path) -> None:
    second = f"[ $1 != update ] || [ -e {tmp_path}/again ] || {{ : > {tmp_path}/again; exit 100; }}"
    found, said, calls = run_tools(tmp_path, ci="true", apt=second, make="exit 0")
    assert (found, said) == (0, "")
    assert calls == ["apt-get update", "sleep 10", "apt-get update", "apt-get install", "make node_modules"]
