"""Progress on standard error: live bars on a terminal, lines of text elsewhere, or nothing. Loads nothing itself."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from weightstream.shutdown import Shutdown, tell

__all__ = ["Display", "Meter", "MeterUpdate", "Output", "format_bytes", "format_rate", "make_display"]

#: Live rates are averages over this time.
_WINDOW_S = 1.0
#: Without a terminal: a line at most this often.
_LINE_S = 3.0


class Output(Console):
    """A console whose reader may go away (`| head`): what is written from then on is dropped."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def format_bytes(num_bytes: float) -> str:
    """Return a size in decimal units, with three digits: `537 MB`."""
    units = ("B", "kB", "MB", "GB", "TB")
    value, number = float(num_bytes), 0
    while value >= 999.5 and number < len(units) - 1:
        value, number = value / 1000, number + 1
    digits = 0 if number == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[number]}"


def format_rate(bytes_per_s: float) -> str:
    """Return a rate in decimal units: `2.31 GB/s`."""
    return f"{format_bytes(bytes_per_s)}/s"


class Meter:
    """How far one thing is, in bytes, and how fast: of late while it runs, on average once it is done."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.done_bytes = 0
        self.total_bytes = 0
        self._begin_s = time.monotonic()
        self._end_s: float | None = None
        self._samples: deque[tuple[float, int]] = deque([(self._begin_s, 0)])

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Note where it is now."""
        now_s = time.monotonic()
        self.done_bytes, self.total_bytes = done_bytes, total_bytes
        self._samples.append((now_s, done_bytes))
        while len(self._samples) > 2 and self._samples[1][0] <= now_s - _WINDOW_S:
            self._samples.popleft()
        if done_bytes == total_bytes and self._end_s is None:
            self._end_s = now_s

    @property
    def bytes_per_s(self) -> float:
        since_s, since_bytes = self._samples[0] if self._end_s is None else (self._begin_s, 0)
        elapsed_s = (self._end_s or time.monotonic()) - since_s
        return (self.done_bytes - since_bytes) / elapsed_s if elapsed_s > 0 else 0.0

    @property
    def left(self) -> str:
        """How long it will take at this rate, as text; "" if that is unknown, or over."""
        rate = self.bytes_per_s
        if self._end_s is not None or rate <= 0:
            return ""
        seconds = round((self.total_bytes - self.done_bytes) / rate)
        return f"{seconds} s left" if seconds < 100 else f"{seconds / 60:.0f} min left"

    @property
    def fraction(self) -> float:
        return self.done_bytes / self.total_bytes if self.total_bytes else 0.0


class MeterUpdate(Protocol):
    """Moves all meters: their common total, how many bytes each has done, and what is being worked at."""

    def __call__(self, total_bytes: int, /, *done_bytes: int, current: str = "") -> None: ...


class Display:
    """Shows nothing: the base of the displays that do."""

    @contextmanager
    def step(self, text: str) -> Generator[None, None, None]:
        """Show that something is going on for as long as the context is open."""
        yield

    @contextmanager
    def meters(self, names: Sequence[str]) -> Generator[MeterUpdate, None, None]:
        """Show meters for as long as the context is open. It yields the function that moves them."""
        yield _no_update


def _no_update(total_bytes: int, /, *done_bytes: int, current: str = "") -> None:
    """Move nothing."""


class _Lines(Display):
    """Lines of text, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def step(self, text: str) -> Generator[None, None, None]:
        self._say(text)
        yield

    @contextmanager
    def meters(self, names: Sequence[str]) -> Generator[MeterUpdate, None, None]:
        meters = [Meter(name) for name in names]
        last_s = time.monotonic()

        def update(total_bytes: int, /, *done_bytes: int, current: str = "") -> None:
            nonlocal last_s
            was_over = all(meter.fraction == 1 for meter in meters)
            for meter, done in zip(meters, done_bytes, strict=True):
                meter.update(done, total_bytes)
            is_over = all(meter.fraction == 1 for meter in meters)
            now_s = time.monotonic()
            if (is_over and not was_over) or (not is_over and now_s - last_s >= _LINE_S):
                last_s = now_s
                at = [f"at {current}"] if current and not is_over else []
                self._say(", ".join([*map(_describe, meters), *at]))

        yield update

    def _say(self, text: str) -> None:
        self._console.print(f"weightstream: {text}", soft_wrap=True, markup=False, highlight=False)


def _describe(meter: Meter) -> str:
    amount = f"{format_bytes(meter.done_bytes)} of {format_bytes(meter.total_bytes)}"
    left = f", {meter.left}" if meter.left else ""
    return f"{meter.name} {amount} ({meter.fraction:.0%}), {format_rate(meter.bytes_per_s)}{left}"


class _Live(Display):
    """A spinner or bars that move, on a terminal."""

    def __init__(self, console: Console, shutdown: Shutdown) -> None:
        self._console = console
        self._is_live = False
        shutdown.cleanups.append(self._restore_cursor)

    @contextmanager
    def step(self, text: str) -> Generator[None, None, None]:
        columns = SpinnerColumn(), TextColumn("{task.description}", table_column=Column(no_wrap=True))
        with self._live(Progress(*columns, console=self._console, transient=True)) as progress:
            progress.add_task(text, total=None)
            yield

    @contextmanager
    def meters(self, names: Sequence[str]) -> Generator[MeterUpdate, None, None]:
        meters = [Meter(name) for name in names]
        with self._live(Progress(*_columns(self._console.width), console=self._console)) as progress:
            tasks = [progress.add_task(meter.name, total=None, meter=meter, current="") for meter in meters]

            def update(total_bytes: int, /, *done_bytes: int, current: str = "") -> None:
                for meter, task, done in zip(meters, tasks, done_bytes, strict=True):
                    meter.update(done, total_bytes)
                    progress.update(task, completed=done, total=total_bytes)
                is_over = all(meter.fraction == 1 for meter in meters)
                progress.update(tasks[-1], current="" if is_over else current)  # beside what is placed

            yield update

    @contextmanager
    def _live(self, progress: Progress) -> Generator[Progress, None, None]:
        self._is_live = True
        try:
            with progress:
                yield progress
        finally:
            self._is_live = False

    def _restore_cursor(self) -> None:
        if self._is_live:
            tell("\x1b[?25h\n")


class _MeterColumn(ProgressColumn):
    """A meter's amount, its rate, or the time that it has left."""

    def __init__(self, what: str, width: int) -> None:
        super().__init__(Column(no_wrap=True, justify="right", min_width=width))
        self._what = what

    def render(self, task: Task) -> RenderableType:
        meter: Meter = task.fields["meter"]
        if not meter.total_bytes:
            return Text("")
        if self._what == "left":
            return Text(meter.left, style="dim")
        if self._what == "rate":
            return Text(format_rate(meter.bytes_per_s))
        return Text(f"{format_bytes(meter.done_bytes)} of {format_bytes(meter.total_bytes)}", style="dim")


def _columns(width: int) -> list[ProgressColumn]:
    """Return what fits: the bar takes what the texts leave, and on narrow terminals the amounts go first."""
    name = TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=6))
    rate = _MeterColumn("rate", 9)
    if width < 64:
        return [name, BarColumn(bar_width=max(4, width - 20)), rate]
    amount, left = _MeterColumn("amount", 16), _MeterColumn("left", 9)
    current = TextColumn(  # a name of the model's, which is no markup
        "{task.fields[current]}",
        style="dim",
        markup=False,
        table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis"),
    )
    return [name, BarColumn(bar_width=8 if width < 90 else 24), amount, rate, left, current]


def make_display(shutdown: Shutdown, *, quiet: bool) -> Display:
    """Return the display that suits standard error."""
    if quiet:
        return Display()
    console = Output(file=sys.stderr)
    return _Live(console, shutdown) if console.is_terminal else _Lines(console)
