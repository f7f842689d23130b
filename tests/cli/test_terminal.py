"""Ctrl-C at a terminal of one's own: one line, 130, and the terminal is as it was, with its cursor."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import textwrap
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.test_interrupts import MOMENTS, SMALL

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
#: Makes the process the one in front, as a shell does it, whose terminal turns Ctrl-C into SIGINT. `hang` tells through a
#: file, because what is written to the terminal is looked at.
PROGRAM = """
import fcntl, os, sys, termios, time
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
def reached(): open({marker!r}, "w").close()
def hang():
    reached()
    time.sleep(60)
{prepare}
from weightstream.cli import main
sys.argv[1:] = {args!r}
main()
"""


class Terminal:
    """A terminal with a command in front."""

    def __init__(self, args: list[str], prepare: str, folder: Path, environment: dict[str, str]) -> None:
        self._marker = folder / "reached"
        self._keyboard, self._screen = pty.openpty()
        self.settings = termios.tcgetattr(self._screen)
        program = PROGRAM.format(marker=str(self._marker), prepare=textwrap.dedent(prepare), args=args)
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=self._screen,
            stdout=self._screen,
            stderr=self._screen,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
        )
        self.text = ""

    def read_until_reached(self) -> None:
        while not self._marker.exists():
            assert self._process.poll() is None, self.text
            self._read()

    def press_ctrl_c(self) -> int:
        """Return the exit code of the command, and have all of its output read."""
        os.write(self._keyboard, b"\x03")
        while self._process.poll() is None:
            self._read()
        self._read()
        assert termios.tcgetattr(self._screen) == self.settings
        return self._process.returncode

    def _read(self) -> None:
        """Read what is there, or wait a little for more: the command keeps the terminal open, so there is no end."""
        while select.select([self._keyboard], [], [], 0.02)[0]:
            self.text += os.read(self._keyboard, 65536).decode(errors="replace")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._keyboard)
        os.close(self._screen)


@contextmanager
def terminal(*args: object, prepare: str, folder: Path) -> Generator[Terminal, None, None]:
    environment = {"XDG_CACHE_HOME": str(folder), "WEIGHTSTREAM_DEVICE__TARGET": "cpu"}
    opened = Terminal([str(arg) for arg in args], prepare, folder, environment)
    try:
        yield opened
    finally:
        opened.close()


def lines_behind(text: str) -> list[str]:
    """What stands on the screen behind the key that was pressed, without the bars that are drawn anew."""
    behind = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.rpartition("^C")[2])
    return [line for line in re.split(r"[\r\n]+", behind) if line.strip() and not re.match(r"\W|disk|cpu|hashed", line)]


@pytest.mark.parametrize("moment", ["importing torch", "building the model", "reading", "binding"])
def test_warm(moment: str, config: Path, tmp_path: Path) -> None:
    with terminal("warm", config, prepare=MOMENTS[moment], folder=tmp_path) as screen:
        screen.read_until_reached()
        assert screen.press_ctrl_c() == 130
        assert lines_behind(screen.text) == ["interrupted"]
        assert screen.text.rfind(SHOW) > screen.text.rfind(HIDE) >= 0


def test_demo(tmp_path: Path) -> None:
    with terminal("demo", prepare=SMALL + textwrap.dedent(MOMENTS["reading"]), folder=tmp_path) as screen:
        screen.read_until_reached()
        assert screen.press_ctrl_c() == 130
        assert lines_behind(screen.text) == ["interrupted"]
        assert screen.text.rfind(SHOW) > screen.text.rfind(HIDE) >= 0


def test_bench(checkpoint: Path, tmp_path: Path) -> None:
    prepare = "import weightstream.ceilings as ceilings\nceilings.read_ceiling = lambda *rest, **named: hang()\n"
    with terminal("bench", checkpoint, "--device", "cpu", prepare=prepare, folder=tmp_path) as screen:
        screen.read_until_reached()
        assert screen.press_ctrl_c() == 130
        assert lines_behind(screen.text) == ["interrupted"]
        assert screen.text.rfind(SHOW) > screen.text.rfind(HIDE) >= 0
