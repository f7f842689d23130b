"""Progress: sizes and rates as text, lines without a terminal, bars on one, and a cursor that comes back."""

from __future__ import annotations

import io
import os
import pty
import queue
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from types import SimpleNamespace

import pytest

from weightstream import display
from weightstream.display import Meter, Output, format_bytes, format_rate, make_display
from weightstream.shutdown import Shutdown

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (536_870_912, "537 MB"),
        (70_123_000_000, "70.1 GB"),
        (2_000_000_000_000_000, "2000 TB"),
    ],
)
def test_sizes_have_three_digits(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
    assert format_rate(num_bytes) == f"{text}/s"


class Time:
    """Seconds that pass when a test says so."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture(name="time_")
def fixture_time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time_ = Time()
    monkeypatch.setattr(display, "time", time_)
    return time_


def test_meter_tells_the_rate_of_the_last_second_and_at_last_the_average(time_: Time) -> None:
    meter = Meter("disk")
    assert (meter.bytes_per_s, meter.fraction) == (0.0, 0.0)
    for step in range(1, 9):
        time_.now_s = step / 4
        meter.update(100 * step if step <= 4 else 400 + 300 * (step - 4), 10_000)
    assert meter.bytes_per_s == pytest.approx(1200)
    time_.now_s = 4.0
    meter.update(10_000, 10_000)
    time_.now_s = 9.0
    assert (meter.bytes_per_s, meter.fraction) == (2500, 1.0)


class Pulses:
    """Stands for the event that lines are said without: each call of `pulse` lets it wait its time, once."""

    def __init__(self) -> None:
        self._asked, self._answers = queue.Queue[None](), queue.Queue[bool]()

    def wait(self, timeout: float) -> bool:
        assert timeout == 3.0
        self._asked.put(None)
        return self._answers.get(timeout=20)

    def set(self) -> None:
        self._answers.put(True)

    def pulse(self) -> None:
        """Return when a line has been said."""
        self._asked.get(timeout=20)
        self._answers.put(False)
        self._asked.get(timeout=20)
        self._asked.put(None)


@pytest.fixture(name="pulses")
def fixture_pulses(monkeypatch: pytest.MonkeyPatch) -> list[Pulses]:
    """One for each context that says lines."""
    made: list[Pulses] = []

    def make() -> Pulses:
        made.append(Pulses())
        return made[-1]

    monkeypatch.setattr(display, "threading", SimpleNamespace(Event=make, Thread=threading.Thread))
    return made


def test_lines_come_every_few_seconds_and_at_the_end(
    time_: Time, pulses: list[Pulses], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = make_display(Shutdown(), quiet=False)
    with shown.step("thinking"):
        time_.now_s = 3.0
        pulses[-1].pulse()
    time_.now_s = 0.0
    with shown.meters(["disk", "cuda:0"]) as update:
        for step in range(1, 11):
            time_.now_s = step * 0.75
            update(1000, step * 100, step * 50, current="layers.3")
            if step in (4, 8):
                pulses[-1].pulse()
        time_.now_s = 7.8
        update(1000, 1000, 1000)
        update(1000, 1000, 1000)
        pulses[-1].pulse()
    out, err = capsys.readouterr()
    assert out == ""
    at = ", at layers.3"
    first = f"weightstream: disk 400 B of 1.00 kB (40%), 133 B/s, 4 s left, cuda:0 200 B of 1.00 kB (20%), 67 B/s, 12 s left{at}"
    second = f"weightstream: disk 800 B of 1.00 kB (80%), 133 B/s, 2 s left, cuda:0 400 B of 1.00 kB (40%), 67 B/s, 9 s left{at}"
    last = "weightstream: disk 1.00 kB of 1.00 kB (100%), 133 B/s, cuda:0 1.00 kB of 1.00 kB (100%), 128 B/s"
    said = ["weightstream: thinking", "weightstream: thinking (3 s)", first, second, last, f"{last}, finishing"]
    assert err.splitlines() == said


def test_lines_come_where_nothing_moves_and_say_what_is_waited_for(
    time_: Time, pulses: list[Pulses], capsys: pytest.CaptureFixture[str]
) -> None:
    with make_display(Shutdown(), quiet=False).meters(["disk", "cuda:0"]) as update:
        pulses[0].pulse()
        update(1000, 500, 0)
        time_.now_s = 3.0
        pulses[0].pulse()
        update(1000, 1000, 0)
        time_.now_s = 12.0
        pulses[0].pulse()
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "weightstream: waiting for disk"
    nothing = "cuda:0 0 B of 1.00 kB (0%), 0 B/s"
    disk = "weightstream: disk 500 B of 1.00 kB (50%), 0 B/s"
    assert second == f"{disk}, {nothing}, nothing has moved for 3 s: waiting for disk"
    assert third.endswith(f", {nothing}, nothing has moved for 12 s: waiting for cuda:0")


def test_mapped_bytes_are_placed_and_not_read(time_: Time, capsys: pytest.CaptureFixture[str]) -> None:
    for mapped in (1000, 600):
        with make_display(Shutdown(), quiet=False).meters(["disk", "cpu"]) as update:
            time_.now_s += 2.0
            update(1000, 1000 - mapped, 1000, mapped_bytes=mapped)
    assert capsys.readouterr().err.splitlines() == [
        "weightstream: cpu 1.00 kB of 1.00 kB (100%), mapped",
        "weightstream: disk 400 B of 400 B (100%), 200 B/s, cpu 1.00 kB of 1.00 kB (100%), 200 B/s",
    ]
    console = Output(file=io.StringIO(), width=100, force_terminal=True, color_system=None, record=True)
    with display._Live(console, Shutdown()).meters(["disk", "cpu"]) as update:
        update(1000, 0, 1000, mapped_bytes=1000)
    drawn = console.export_text().splitlines()[-1]
    assert re.search(r"cpu +━+ 1.00 kB of 1.00 kB +mapped *$", drawn)


def test_long_times_are_told_in_minutes(time_: Time) -> None:
    meter = Meter("disk")
    assert meter.left == ""
    time_.now_s = 1.0
    meter.update(100, 100_000)
    assert meter.left == "17 min left"
    meter.update(100_000, 100_000)
    assert meter.left == ""


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_bars_tell_rate_time_left_and_module_in_one_line_each(width: int, time_: Time) -> None:
    console = Output(file=io.StringIO(), width=width, force_terminal=True, color_system=None, record=True)
    with display._Live(console, Shutdown()).meters(["disk", "cuda:0"]) as update:
        update(10**9, 0, 0)
        time_.now_s = 1.0
        update(10**9, 4 * 10**8, 2 * 10**8, current="model.layers.17.mlp")
    drawn = console.export_text()  # every state, one after the other
    disk, device = (line.rstrip() for line in drawn[drawn.rindex("disk ") :].rstrip().splitlines())
    assert disk.startswith("disk ")
    assert device.startswith("cuda:0 ")
    assert "400 MB/s" in disk
    assert ("4 s left" in device) == (width >= 64)
    assert ("model.layers.17.mlp" in device) == (width >= 80)
    assert max(len(disk), len(device)) <= width


def test_bars_say_how_long_nothing_has_moved(time_: Time) -> None:
    console = Output(file=io.StringIO(), width=80, force_terminal=True, color_system=None, record=True)
    with display._Live(console, Shutdown()).meters(["disk"]) as update:
        update(1000, 500)
        time_.now_s = 7.0
    assert "waits 7 s" in console.export_text().splitlines()[-1]


@pytest.mark.parametrize("name", ["[/x]", "[bold]", "a[0]"])
def test_name_of_a_module_is_no_markup(name: str) -> None:
    console = Output(file=io.StringIO(), width=120, force_terminal=True, color_system=None, record=True)
    with display._Live(console, Shutdown()).meters(["cpu"]) as update:
        update(10, 5, current=name)
    assert name in console.export_text()


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = make_display(Shutdown(), quiet=True)
    with shown.step("thinking"), shown.meters(["disk"]) as update:
        update(1, 1)
    assert capsys.readouterr() == ("", "")


class Terminal:
    """A pseudo-terminal of some width, for a process's standard error."""

    def __init__(self, width: int) -> None:
        self._ours, self._theirs = pty.openpty()
        ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
        self.text = ""

    def run(self, *args: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "", "NO_COLOR": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "weightstream", *args],
            stdout=subprocess.PIPE,
            stderr=self._theirs,
            env=environment,
        )
        os.close(self._theirs)
        return process

    def read(self, until: str | None = None) -> str:
        """Return what was shown, up to a text or to the end."""
        while until is None or until not in self.text:
            try:
                part = os.read(self._ours, 4096)
            except OSError:  # the other side was closed
                break
            if not part:
                break
            self.text += part.decode()
        return self.text

    def close(self) -> None:
        os.close(self._ours)


@pytest.fixture(name="terminal", params=[100, 44])
def fixture_terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    terminal = Terminal(request.param)
    yield terminal
    terminal.close()


def test_terminal_shows_two_bars_with_rates(terminal: Terminal, config: Path) -> None:
    process = terminal.run("warm", str(config))
    shown = terminal.read()
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out.startswith(b"Loaded ")
    assert "importing torch" in shown
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-ln-z]", "\n", re.sub(r"\x1b\[[0-9;]*m", "", shown)).splitlines()
    for name in ("disk", "cpu"):
        last = next(line.strip() for line in reversed(lines) if line.startswith(name))
        assert re.fullmatch(rf"{name} +━+ .*B/s", last), last
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) > 0


def test_interrupt_brings_the_cursor_back(config: Path) -> None:
    (config.parent / "slow.py").write_text("import threading\ndef build(): threading.Event().wait()\n")
    config.write_text("checkpoint: model\nmodel: slow:build\n")
    terminal = Terminal(80)
    process = terminal.run("warm", str(config))
    terminal.read("building the model")
    process.send_signal(signal.SIGINT)
    shown = terminal.read()
    process.communicate()
    terminal.close()
    assert process.returncode == 130
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)
    assert shown.endswith("interrupted\r\n")
