"""What the command line says about reports and checkpoints, as text for people."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from weightstream.display import format_bytes, format_rate
from weightstream.errors import shown
from weightstream.why import explain

if TYPE_CHECKING:
    from weightstream.prefetch.checkpoint import Checkpoint
    from weightstream.scheduler.report import LoadReport

__all__ = [
    "print_checkpoint",
    "print_facts",
    "print_phases",
    "print_report",
    "print_table",
    "print_title",
    "shell_path",
]

#: Where texts begin, behind their labels.
_INDENT = 16
_LARGEST = 5


def print_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Print lines of a label and a text."""
    for label, text in facts:
        first, *rest = _wrapped(console, text, _INDENT)
        line = Text(f"  {label:<{_INDENT - 2}}", style="dim")
        console.print(line.append(first, style="not dim"), soft_wrap=True)
        for more in rest:
            console.print(" " * _INDENT + more, soft_wrap=True, markup=False, highlight=False)


def print_title(console: Console, text: str) -> None:
    """Print a line in bold."""
    for line in _wrapped(console, text, 0):
        console.print(Text(line, style="bold"), soft_wrap=True)


def _wrapped(console: Console, text: str, indent: int) -> list[str]:
    """Break lines between words on a terminal. Paths stay whole, so that they can be copied, and so does other output."""
    if not console.is_terminal:
        return [text]
    width = max(20, console.width - indent)
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def shell_path(path: object) -> str:
    """Return a path as a shell understands it."""
    return shlex.quote(str(path))


def print_report(console: Console, report: LoadReport, extra: Iterable[tuple[str, str]] = ()) -> None:
    """Print what a load did, `extra` facts about it, and where the time went."""
    is_cache = report.device == "page-cache"
    what = f"{format_bytes(report.num_bytes)}, {_count(report.num_tensors, 'tensor')} in {_count(report.num_shards, 'shard')}"
    is_mapped = report.mapped_bytes == report.num_bytes > 0
    verb = "Mapped" if is_mapped else "Loaded"
    done = f"Read {what}, into the page cache" if is_cache else f"{verb} {what}, onto {report.device}"
    if is_mapped and not report.read_bytes:  # for which there is no rate: nothing was moved
        rate = ""
    elif report.mapped_bytes:
        rate = f"; {format_bytes(report.mapped_bytes)} mapped, {format_bytes(report.read_bytes)} read"
    else:
        rate = f": {format_rate(report.throughput_bytes_per_s)}"
    print_title(console, f"{done} in {report.wall_s:.2f} s{rate}")
    print_facts(console, [*_facts(report, is_cache=is_cache), *extra])
    print_phases(console, report)


def _facts(report: LoadReport, *, is_cache: bool) -> Iterable[tuple[str, str]]:
    yield "checkpoint", report.checkpoint
    yield "strategy", f"{report.strategy}: {report.reason}"
    yield "dtype", report.dtype
    if report.world_size > 1:
        yield "rank", f"{report.rank} of {report.world_size}"
    if not is_cache and report.num_copies:
        yield "overlap", f"{report.overlap:.0%} of the less busy stage's time, reads and copies went on at once"
        yield "copies", f"{report.num_copies:,}"
    elif not is_cache and report.read_bytes:
        yield "overlap", "none needed: reads landed in the weights themselves, without a copy"
    kind = "ring and weights" if report.device == "cpu" else "ring"
    yield (
        "host memory",
        f"{format_bytes(report.host_peak_bytes)} at most ({kind}), {format_bytes(report.pinned_bytes)} page-locked",
    )
    if report.device_peak_bytes:
        yield "device memory", f"{format_bytes(report.device_peak_bytes)} at most"
    for sentence in report.decisions:
        yield "reads", sentence
    if report.num_retries:
        yield "retries", f"{report.num_retries} reads were repeated"
    for label, keys in (
        ("missing", report.missing_keys),
        ("unexpected", report.unexpected_keys),
        ("unloaded", report.unloaded_keys),
    ):
        if keys:
            yield (
                label,
                f"{_count(len(keys), 'tensor')}: {', '.join(map(shown, keys[:5]))}{', ...' if len(keys) > 5 else ''}",
            )
    for sentence in report.fallbacks:
        yield "note", sentence
    yield "why so long", explain(report)


def print_phases(console: Console, report: LoadReport, title: str = "Where the time went") -> None:
    """Print a report's phases, with bars."""
    full = "█" if (console.encoding or "").lower().startswith("utf") else "#"
    width = max(6, min(36, console.width - _INDENT - 20))
    wall_s = sum(report.phases.values()) or 1.0
    console.print()
    print_title(console, title)
    for phase, seconds in report.phases.items():
        share = seconds / wall_s
        bar = full * (max(1, round(share * width)) if seconds else 0)
        line = Text(f"  {phase:<{_INDENT - 2}}", style="dim")
        line.append(f"{bar:<{width}}", style="not dim cyan").append(f"{seconds:8.3f} s {share:6.1%}", style="not dim")
        console.print(line, soft_wrap=True)


def print_checkpoint(console: Console, checkpoint: Checkpoint) -> None:
    """Print what is in a checkpoint."""
    specs = checkpoint.tensors.values()
    shards = _count(len(checkpoint.shards), "shard")
    print_title(console, f"{format_bytes(checkpoint.num_bytes)}, {_count(len(specs), 'tensor')} in {shards}")
    print_facts(console, [("checkpoint", str(checkpoint.path))])
    tensors = [0] * len(checkpoint.shards)
    dtypes: dict[str, tuple[int, int]] = {}
    for spec in specs:
        tensors[spec.shard] += 1
        count, num_bytes = dtypes.get(spec.dtype, (0, 0))
        dtypes[spec.dtype] = count + 1, num_bytes + spec.num_bytes
    print_table(
        console,
        "Shards",
        [
            (shown(shard.path.name), _count(count, "tensor"), format_bytes(shard.num_bytes))
            for shard, count in zip(checkpoint.shards, tensors, strict=True)
        ],
    )
    by_bytes = sorted(dtypes.items(), key=lambda item: -item[1][1])
    print_table(
        console, "Dtypes", [(dtype, _count(count, "tensor"), format_bytes(size)) for dtype, (count, size) in by_bytes]
    )
    largest = sorted(specs, key=lambda spec: -spec.num_bytes)[:_LARGEST]
    rows = [
        (shown(spec.name), " x ".join(map(str, spec.shape)) or "scalar", spec.dtype, format_bytes(spec.num_bytes))
        for spec in largest
    ]
    print_table(console, "Largest tensors", rows)


def print_table(
    console: Console, title: str, rows: Sequence[tuple[str, ...]], *, header: tuple[str, ...] | None = None
) -> None:
    """Print rows of cells, the first to the left and the others to the right."""
    console.print()
    print_title(console, title)
    lines = [*([] if header is None else [header]), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [f"{line[0]:<{widths[0]}}", *(f"{cell:>{n}}" for cell, n in zip(line[1:], widths[1:], strict=True))]
        console.print(Text(f"  {'  '.join(cells)}", style="dim" if line is header else ""), soft_wrap=True)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
