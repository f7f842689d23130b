"""Running the command line: in this process, and as a process of its own that gets signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
import torch

from tests.builders import write_checkpoint
from weightstream.commands import run

ROOT = Path(__file__).parents[2]

#: What a signal may take in all, and as much again for a busy machine.
DEADLINE_S = 2.0


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class Run(Protocol):
    """Runs a command in this process."""

    def __call__(self, *args: object) -> Result: ...


@pytest.fixture(name="weightstream")
def fixture_weightstream(capfd: pytest.CaptureFixture[str]) -> Run:
    def run_command(*args: object) -> Result:
        code = run([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run_command


class Running:
    """A command in a process of its own.

    Args:
        args: the command line.
        prepare: Python code that runs before it. It may call `reached()`, which tells this object, and `hang()`.
        environment: additional variables.
    """

    def __init__(self, args: list[str], prepare: str = "", environment: Mapping[str, str] | None = None) -> None:
        program = "\n".join(
            [
                "import os, sys, time",
                "def reached(): os.write(2, b'REACHED\\n')",
                "def hang():\n    reached()\n    time.sleep(60)",
                textwrap.dedent(prepare),
                "from weightstream.cli import main",
                f"sys.argv[1:] = {args!r}",
                "main()",
            ]
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **(environment or {})},
        )
        self.err = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, marker: str) -> None:
        """Read standard error up to the line that has the marker."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.err += line
            if marker in line:
                return
        pytest.fail(f"no {marker!r} in {self.err}")

    def end_by(self, number: signal.Signals) -> Result:
        """Send a signal, and check that the process ends in time."""
        begin = time.monotonic()
        self._process.send_signal(number)
        result = self.result()
        assert time.monotonic() - begin < DEADLINE_S
        return result

    def result(self) -> Result:
        out, err = self._process.communicate(timeout=60)
        return Result(self._process.returncode, out, self.err + err)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


class Start(Protocol):
    def __call__(self, *args: object, prepare: str = "", environment: Mapping[str, str] | None = None) -> Running: ...


@pytest.fixture(name="start")
def fixture_start() -> Iterator[Start]:
    started: list[Running] = []

    def start(*args: object, prepare: str = "", environment: Mapping[str, str] | None = None) -> Running:
        started.append(Running([str(arg) for arg in args], prepare, environment))
        return started[-1]

    yield start
    for running in started:
        running.kill()


#: A model that fits the checkpoint of the fixture of that name.
BUILDERS = """
import torch
from torch import nn

LIMIT = 3

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    class Nested:
        pass

def build():
    with torch.device("meta"):
        return Net()

def build_wide():
    with torch.device("meta"):
        return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(9, 8) for _ in range(4))})

def build_real():
    return Net()

def build_with(size):
    return Net()

def build_nothing():
    return None

def build_badly():
    raise ArithmeticError("two and two\\nare five")
"""


@pytest.fixture(name="checkpoint")
def fixture_checkpoint(tmp_path: Path) -> Path:
    names = [f"layers.{number}.{kind}" for number in range(4) for kind in ("weight", "bias")]
    tensors = {name: torch.rand((8, 8) if name.endswith("weight") else (8,)) for name in names}
    return write_checkpoint(tmp_path / "model", tensors, num_shards=3)


@pytest.fixture(name="config")
def fixture_config(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A YAML file for the checkpoint, in the working folder, where the builders are too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "builders_of_a_user.py").write_text(BUILDERS)
    file = tmp_path / "config.yaml"
    file.write_text("checkpoint: model\nmodel: builders_of_a_user:build\nstrategy: stream\ndevice: {target: cpu}\n")
    yield file
    sys.modules.pop("builders_of_a_user", None)
