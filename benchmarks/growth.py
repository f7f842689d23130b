"""How the cost of a load grows: with the number of tensors, all of 4 KiB, and with the bytes, all in 200 tensors.

Each point is loaded into a model on meta, and streamed through staging memory with nothing kept, with the files in the
page cache, in turn. A line is fitted to the medians, and a power from 10,000 tensors on: exponent 1 is linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.checkpoints import Recipe
from benchmarks.registry import all_arms
from benchmarks.run import Series, Setting
from benchmarks.summary import Line, Summary, fit, fit_power, summarise
from benchmarks.tables import seconds, table

__all__ = ["Growth", "Point", "growth_of", "growth_tables", "recipes", "series_for"]

#: A power is fitted to so many tensors and more; with fewer, what every load costs is most of it.
_MANY = 10_000
_TENSORS_AT_CONSTANT_COUNT = 200


@dataclass(frozen=True, slots=True)
class Point:
    """One checkpoint: loaded (`wall`, `cpu`), and streamed through staging memory, of which it took `staging_bytes`."""

    x: int
    num_tensors: int
    num_bytes: int
    wall: Summary
    cpu: Summary
    staged_wall: Summary
    staging_bytes: int


@dataclass(frozen=True, slots=True)
class Growth:
    """How cost grows along one axis, `tensors` or `bytes`. `power` is for the number of tensors alone."""

    axis: str
    points: Sequence[Point]
    line: Line
    power: Line | None


def recipes(counts: Sequence[int], sizes: Sequence[int]) -> list[Recipe]:
    """Return the checkpoints: `counts` tensors of 4 KiB each, and 200 tensors of `sizes` bytes together."""
    columns = 2048
    rows = [max(1, size // _TENSORS_AT_CONSTANT_COUNT // (2 * columns)) for size in sizes]
    by_count = [Recipe("tensors", count, 64, 32, 4) for count in counts]
    return by_count + [Recipe("bytes", _TENSORS_AT_CONSTANT_COUNT, row, columns, 4) for row in rows]


def series_for(settings: Sequence[Setting]) -> list[Series]:
    """Return what is measured at each point."""
    arms = all_arms()
    return [Series(arms[key], setting) for setting in settings for key in ("ws-stream", "ws-staged")]


def growth_of(series: Sequence[Mapping[str, Any]]) -> list[Growth]:
    """Summarise a growth measurement along each of its axes that has at least two points."""
    found: list[Growth] = []
    for axis in ("tensors", "bytes"):
        points = _points([one for one in series if one["checkpoint"]["name"] == axis], axis)
        if len(points) > 1:
            many = [point for point in points if axis == "tensors" and point.x >= _MANY]
            found.append(Growth(axis, points, _fit(points, fit), _fit(many, fit_power) if len(many) > 1 else None))
    return found


def _fit(points: Sequence[Point], how: Any) -> Line:  # noqa: ANN401 - one of the two fits
    line: Line = how([point.x for point in points], [point.wall.median for point in points])
    return line


def _points(series: Iterable[Mapping[str, Any]], axis: str) -> list[Point]:
    by_checkpoint: dict[str, dict[str, Sequence[Mapping[str, Any]]]] = {}
    for one in series:
        if one["results"]:
            by_checkpoint.setdefault(str(one["checkpoint"]), {})[one["arm"]] = one["results"]
    pairs = [arms for arms in by_checkpoint.values() if len(arms) == 2]
    return sorted((_point(arms["ws-stream"], arms["ws-staged"], axis) for arms in pairs), key=lambda point: point.x)


def _point(loaded: Sequence[Mapping[str, Any]], staged: Sequence[Mapping[str, Any]], axis: str) -> Point:
    num_tensors, num_bytes = loaded[0]["report"]["num_tensors"], loaded[0]["report"]["num_bytes"]
    return Point(
        x=num_tensors if axis == "tensors" else num_bytes,
        num_tensors=num_tensors,
        num_bytes=num_bytes,
        wall=summarise([result["wall_s"] for result in loaded]),
        cpu=summarise([result["cpu_s"] for result in loaded]),
        staged_wall=summarise([result["wall_s"] for result in staged]),
        staging_bytes=max(result["report"]["host_peak_bytes"] for result in staged),
    )


def growth_tables(found: Iterable[Growth]) -> str:
    """Return a table for each axis, and the fits in words."""
    return "\n\n".join(f"### By {growth.axis}\n\n{_table(growth)}\n\n{in_words(growth)}" for growth in found) + "\n"


def _table(growth: Growth) -> str:
    head = ["tensors", "GB", "load s", "CPU s", "us / tensor", "GB/s", "streamed through 64 MiB s", "staging MiB"]
    return table(
        head,
        [
            [
                f"{point.num_tensors:,}",
                f"{point.num_bytes / 1e9:.2f}",
                seconds(point.wall),
                f"{point.cpu.median:.3f}",
                f"{point.wall.median / point.num_tensors * 1e6:.1f}",
                f"{point.num_bytes / 1e9 / point.wall.median:.2f}",
                seconds(point.staged_wall),
                f"{point.staging_bytes / 2**20:,.0f}",
            ]
            for point in growth.points
        ],
    )


def in_words(growth: Growth) -> str:
    """Say what the fits say."""
    unit, per = ("1,000 tensors", 1000) if growth.axis == "tensors" else ("GB", 1_000_000_000)
    line = growth.line
    words = f"{line.offset:.3f} s + {line.slope * per:.4f} s for each {unit}, R² {line.r_squared:.4f}"
    if growth.power is None:
        return f"{words}."
    return f"{words}; exponent from {_MANY:,} on {growth.power.slope:.2f} (1 is linear)."
