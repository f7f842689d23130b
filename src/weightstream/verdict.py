"""What `weightstream bench` found: the measurements as data, the ceiling of each load, and a sentence on what bounds it.

Measures nothing, and imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from weightstream.display import format_bytes, format_rate
from weightstream.outputs import Benchmark, BenchmarkRow, Kind, Sample
from weightstream.summary import print_facts, print_phases, print_table, print_title
from weightstream.why import explain

__all__ = ["Findings", "Row", "print_findings"]

_NAMES: dict[Kind, str] = {
    "load cached": "weightstream, cached",
    "load cold": "weightstream, cold",
    "read cached": "read, cached",
    "read cold": "read, cold",
    "read direct": "read, O_DIRECT",
    "copy": "copy, page-locked",
}

#: A load is near its ceiling from this share on. A choice, not a measurement.
_NEAR = 0.85
#: Another setting is worth a word if it reads faster by this factor. A choice too.
_BETTER = 1.1


@dataclass(frozen=True, slots=True)
class Row:
    """All runs of one thing."""

    kind: Kind
    num_threads: int | None
    samples: tuple[Sample, ...]

    @property
    def median(self) -> Sample:
        """The run in the middle; of an even number, the faster of the two."""
        return sorted(self.samples, key=lambda sample: sample.wall_s)[(len(self.samples) - 1) // 2]

    @property
    def bytes_per_s(self) -> float:
        return self.median.num_bytes / self.median.wall_s

    @property
    def moves(self) -> bool:
        """Whether it has a rate: a load that maps all it wants reads nothing, and copies nothing."""
        return self.median.num_bytes > 0

    @property
    def name(self) -> str:
        threads = "" if self.num_threads is None else f", {_threads(self.num_threads)}"
        return f"{_NAMES[self.kind]}{threads}"


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that was measured, on `device`, with `prefetch.io` and `prefetch.workers` as configured."""

    checkpoint: str
    num_bytes: int
    num_tensors: int
    num_shards: int
    device: str
    io: str
    workers: int | str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def loads(self) -> list[Row]:
        return [row for row in self.rows if row.kind.startswith("load")]

    def fastest_read(self, load: Row) -> Row:
        """Return the fastest raw read that a load could have done."""
        return max(self._reads(load), key=lambda row: row.bytes_per_s)

    def _reads(self, load: Row) -> list[Row]:
        """Return the raw reads that a load can be compared with: past the page cache it can always read."""
        kinds = ("read direct", load.kind.replace("load", "read"))
        return [row for row in self.rows if row.kind in kinds] or [
            row for row in self.rows if row.kind == "read cached"
        ]

    def ceiling(self, load: Row) -> Row:
        """Return what bounds a load in the end: the fastest read, or the copies if they are slower."""
        copies = [row for row in self.rows if row.kind == "copy"]
        return min([self.fastest_read(load), *copies], key=lambda row: row.bytes_per_s)

    def share(self, load: Row) -> float:
        """Return a load's rate as a share of its ceiling's."""
        return load.bytes_per_s / self.ceiling(load).bytes_per_s

    def bound(self, load: Row) -> str:
        """Say in one sentence what a load waited for most, and what could be changed."""
        assert load.median.report is not None
        return explain(load.median.report, reading=self._reading(load))

    def _reading(self, load: Row) -> str:
        if self.share(load) >= _NEAR:
            where = "memory" if load.kind == "load cached" else "storage"
            return f"that is close to what this machine can do, and only faster {where} would help"
        best = self.fastest_read(load)
        io = "direct" if best.kind == "read direct" else "buffered"
        others = [row.bytes_per_s for row in self._reads(load) if row.kind != best.kind]
        settings: list[str] = []
        if self.io not in (io, "auto") and best.bytes_per_s > _BETTER * max(others, default=0.0):
            settings.append(f"prefetch.io: {io}")
        if self.workers not in (best.num_threads, "auto"):
            settings.append(f"prefetch.workers: {best.num_threads}")
        if settings:
            return f"raw reads were fastest as in `{best.name}`, so try {' and '.join(settings)}"
        return f"raw reads reach {format_rate(best.bytes_per_s)} with {_threads(best.num_threads or 1)}; no setting stands out"

    def printed(self) -> Benchmark:
        """Return it as `--json` prints it."""
        rows = [
            BenchmarkRow(
                name=row.name,
                kind=row.kind,
                num_threads=row.num_threads,
                bytes_per_s=row.bytes_per_s,
                share_of_ceiling=self.share(row) if row in self.loads and row.moves else None,
                ceiling=self.ceiling(row).name if row in self.loads else None,
                bound=self.bound(row) if row in self.loads else None,
                samples=row.samples,
            )
            for row in self.rows
        ]
        return Benchmark(
            checkpoint=self.checkpoint,
            num_bytes=self.num_bytes,
            num_tensors=self.num_tensors,
            num_shards=self.num_shards,
            device=self.device,
            io=self.io,
            workers=self.workers,
            rows=tuple(rows),
            notes=self.notes,
        )


def print_findings(console: Console, found: Findings) -> None:
    """Print the table, where the time of each load went, and what bounds it."""
    print_table(
        console,
        "Ceilings, and loads as shares of theirs (medians)",
        [_cells(found, row) for row in found.rows],
        header=("", "s", "min-max", "rate", "share", "CPU s", "memory"),
    )
    for load in found.loads:
        report = load.median.report
        assert report is not None
        print_phases(console, report, title=f"Where the time went: {load.name}")
        console.print()
        rate, ceiling = format_rate(load.bytes_per_s), found.ceiling(load)
        reached = (
            f"{rate}, {found.share(load):.0%} of the ceiling ({ceiling.name}: {format_rate(ceiling.bytes_per_s)})"
            if load.moves
            else f"{format_bytes(report.mapped_bytes)} mapped, nothing read or copied"
        )
        print_title(console, f"{load.name}: {reached}")
        print_facts(
            console,
            [
                ("why", found.bound(load)),
                *(("reads", sentence) for sentence in report.decisions),
                *(("note", sentence) for sentence in report.fallbacks),
            ],
        )
    if found.notes:
        console.print()
        print_facts(console, [("note", sentence) for sentence in found.notes])


def _cells(found: Findings, row: Row) -> tuple[str, ...]:
    walls = [sample.wall_s for sample in row.samples]
    median = row.median
    return (
        row.name,
        _seconds(median.wall_s),
        f"{_seconds(min(walls))}-{_seconds(max(walls))}",
        format_rate(row.bytes_per_s) if row.moves else "mapped",
        f"{found.share(row):.0%}" if row in found.loads and row.moves else "",
        _seconds(median.cpu_s),
        "unknown" if median.peak_bytes is None else format_bytes(median.peak_bytes),
    )


def _seconds(seconds: float) -> str:
    """Return seconds with three digits, in at most five characters."""
    digits = 3 if seconds < 0.9995 else 2 if seconds < 9.995 else 1 if seconds < 99.95 else 0
    return f"{seconds:.{digits}f}"


def _threads(number: int) -> str:
    return f"{number} thread{'' if number == 1 else 's'}"
