"""Progress on standard error: live bars on a terminal, lines of text elsewhere, or nothing. Loads nothing itself."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
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
#: Without a terminal: a line this often. On one, what has not moved for so long is said to wait.
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
        self.mapped_bytes = 0
        self._begin_s = self._moved_s = time.monotonic()
        self._end_s: float | None = None
        self._samples: deque[tuple[float, int]] = deque([(self._begin_s, 0)])

    def update(self, done_bytes: int, total_bytes: int, *, mapped_bytes: int = 0) -> None:
        """Note where it is now. The first `mapped_bytes` were there before, and count for no rate."""
        now_s = time.monotonic()
        if done_bytes != self.done_bytes:
            self._moved_s = now_s
        self.done_bytes, self.total_bytes, self.mapped_bytes = done_bytes, total_bytes, mapped_bytes
        self._samples.append((now_s, max(0, done_bytes - mapped_bytes)))
        while len(self._samples) > 2 and self._samples[1][0] <= now_s - _WINDOW_S:
            self._samples.popleft()
        if done_bytes == total_bytes and self._end_s is None:
            self._end_s = now_s

    @property
    def bytes_per_s(self) -> float:
        if self.still_s >= _LINE_S:
            return 0.0
        since_s, since_bytes = self._samples[0] if self._end_s is None else (self._begin_s, 0)
        elapsed_s = (self._end_s or time.monotonic()) - since_s
        return (self._samples[-1][1] - since_bytes) / elapsed_s if elapsed_s > 0 else 0.0

    @property
    def moves(self) -> bool:
        """Whether it has a rate: all that there is may be mapped."""
        return self.mapped_bytes < self.total_bytes

    @property
    def is_over(self) -> bool:
        return self._end_s is not None

    @property
    def still_s(self) -> float:
        """For how long nothing has moved; 0.0 once it is done."""
        return 0.0 if self.is_over else time.monotonic() - self._moved_s

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
    """Moves all meters: their common total, how many bytes each has done, and what is being worked at.

    `mapped_bytes` of the total are views of files, which nobody reads or copies: of several meters the first, which is for
    reads, leaves them out; they are the first bytes of the others.
    """

    def __call__(self, total_bytes: int, /, *done_bytes: int, current: str = "", mapped_bytes: int = 0) -> None: ...


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


def _no_update(total_bytes: int, /, *done_bytes: int, current: str = "", mapped_bytes: int = 0) -> None:
    """Move nothing."""


def _move(meters: Sequence[Meter], total_bytes: int, done_bytes: Sequence[int], mapped_bytes: int) -> None:
    for number, (meter, done) in enumerate(zip(meters, done_bytes, strict=True)):
        if number == 0 and len(meters) > 1:
            meter.update(done, total_bytes - mapped_bytes)
        else:
            meter.update(done, total_bytes, mapped_bytes=mapped_bytes)


class _Lines(Display):
    """Lines of text, for logs and pipes: every few seconds one, whether anything has moved or not."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def step(self, text: str) -> Generator[None, None, None]:
        begin_s = time.monotonic()
        self._say(text)
        with self._repeating(lambda: f"{text} ({time.monotonic() - begin_s:.0f} s)"):
            yield

    @contextmanager
    def meters(self, names: Sequence[str]) -> Generator[MeterUpdate, None, None]:
        meters = [Meter(name) for name in names]
        at = ""

        def update(total_bytes: int, /, *done_bytes: int, current: str = "", mapped_bytes: int = 0) -> None:
            nonlocal at
            was_over, at = all(meter.is_over for meter in meters), current
            _move(meters, total_bytes, done_bytes, mapped_bytes)
            if not was_over and all(meter.is_over for meter in meters):
                self._say(_describe(meters))

        def line() -> str:
            return _describe(meters, at) + (", finishing" if all(meter.is_over for meter in meters) else "")

        with self._repeating(line):
            yield update

    @contextmanager
    def _repeating(self, line: Callable[[], str]) -> Generator[None, None, None]:
        """Say a line every few seconds, on a thread of its own: the one that works may be what is waited for."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(_LINE_S):
                self._say(line())

        thread = threading.Thread(target=run, name="weightstream-display", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _say(self, text: str) -> None:
        self._console.print(f"weightstream: {text}", soft_wrap=True, markup=False, highlight=False)


def _describe(meters: Sequence[Meter], at: str = "") -> str:
    """Say how far meters are, what is being worked at, and, if nothing has moved of late, what is waited for."""
    said = [_amount(meter) for meter in meters if meter.total_bytes]
    waiting = [meter for meter in meters if not meter.is_over]
    if not waiting:
        return ", ".join(said or ["nothing to read"])
    still_s = min(meter.still_s for meter in waiting)
    if at:
        said.append(f"at {at}")
    if still_s >= _LINE_S:
        said.append(f"nothing has moved for {still_s:.0f} s: waiting for {waiting[0].name}")
    return ", ".join(said or [f"waiting for {waiting[0].name}"])


def _amount(meter: Meter) -> str:
    rate = [format_rate(meter.bytes_per_s)] if meter.moves else ["mapped"]
    left = [meter.left] if meter.left else []
    amount = f"{format_bytes(meter.done_bytes)} of {format_bytes(meter.total_bytes)} ({meter.fraction:.0%})"
    return f"{meter.name} {', '.join([amount, *rate, *left])}"


class _Live(Display):
    """A spinner or bars that move, on a terminal."""

    def __init__(self, console: Console, shutdown: Shutdown) -> None:
        self._console = console
        self._is_live = False
        shutdown.cleanups.append(self._restore_cursor)

    @contextmanager
    def step(self, text: str) -> Generator[None, None, None]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            _SecondsColumn(),
        )
        with self._live(Progress(*columns, console=self._console, transient=True)) as progress:
            progress.add_task(text, total=None)
            yield

    @contextmanager
    def meters(self, names: Sequence[str]) -> Generator[MeterUpdate, None, None]:
        meters = [Meter(name) for name in names]
        with self._live(Progress(*_columns(self._console.width), console=self._console)) as progress:
            tasks = [progress.add_task(meter.name, total=None, meter=meter, current="") for meter in meters]

            def update(total_bytes: int, /, *done_bytes: int, current: str = "", mapped_bytes: int = 0) -> None:
                _move(meters, total_bytes, done_bytes, mapped_bytes)
                for meter, task in zip(meters, tasks, strict=True):
                    total = meter.total_bytes
                    progress.update(task, completed=meter.done_bytes, total=total, visible=bool(total))
                is_over = all(meter.is_over for meter in meters)
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


class _SecondsColumn(ProgressColumn):
    """How long a step has taken, once that is worth a word."""

    def render(self, task: Task) -> RenderableType:
        return Text(f"{task.elapsed:.0f} s" if (task.elapsed or 0.0) >= _LINE_S else "", style="dim")


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
            waits = f"waits {meter.still_s:.0f} s" if meter.still_s >= _LINE_S else ""
            return Text(waits or meter.left, style="dim")
        if self._what == "rate":
            return Text(format_rate(meter.bytes_per_s) if meter.moves else "mapped")
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
