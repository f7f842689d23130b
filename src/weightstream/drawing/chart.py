"""What page and picture have in common: colours, texts, and which bar lies where. Knows no library."""

from __future__ import annotations

import heapq
import math
import re
from dataclasses import dataclass
from pathlib import Path

from weightstream.display import format_bytes, format_rate
from weightstream.scheduler.timeline import WAITING, Span, Timeline, rates

__all__ = [
    "COLORS",
    "FILL_ALPHA",
    "HEADROOM",
    "LABELS",
    "NUM_BINS",
    "Bar",
    "Chart",
    "heading",
    "labels_of",
    "rate_unit",
    "rows_by_lane",
    "throughput",
]

#: Okabe and Ito's colours, which colour-blind people can tell apart. Phases have those of what is waited for.
COLORS = {
    "preflight": "#CC79A7",
    "read": "#0072B2",
    "disk": "#0072B2",
    "verify": "#D55E00",
    "wait": "#BFBFBF",
    "submit": "#56B4E9",
    "copy": "#E69F00",
    "bind": "#009E73",
    "consumer": "#F0E442",
    "other": "#4D4D4D",
}
#: Bars are this opaque, and their thin borders wholly: bars that touch can be told apart.
FILL_ALPHA = 0.78
#: A bar that takes less of the load than this is about a pixel wide. Its border makes it wider, which is right among others
#: that touch it; where what lies between two is longer than they are, there is none: borders of thousands of moments, in
#: which tensors are placed for instance, would hide all that a lane waits.
_THIN = 1e-3
LABELS = {
    "preflight": "preflight",
    "read": "read (disk)",
    "verify": "verify",
    "wait": "wait",
    "submit": "submit copies",
    "copy": "copy",
    "bind": "bind",
}

#: Rates are averages over so many equal parts of a load.
NUM_BINS = 150
#: How much higher than the highest rate its panel is: room for the legend.
HEADROOM = 1.35
#: How high the rows of waiting chunks are together at most, in rows of other lanes; and one of them.
_WAITING_HEIGHT = 3.0
_WAITING_ROW = 0.35


@dataclass(frozen=True, slots=True)
class Bar:
    """A span, from `bottom` to `top`. A thin one is drawn opaque, and without a border: see `_THIN`."""

    span: Span
    bottom: float
    top: float
    is_thin: bool


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars by lane: readers at the top, then who waits, the copies, and the load's own thread.

    Attributes:
        bars: all of them.
        lanes: the name of each lane, and the middle of it.
        height: of everything; rows lie between 0, at the bottom, and this. One lane is 1 high, the waiting more.
    """

    bars: tuple[Bar, ...]
    lanes: tuple[tuple[str, float], ...]
    height: float

    @classmethod
    def of(cls, timeline: Timeline) -> Chart:
        """Lay out a timeline."""
        bars: list[Bar] = []
        lanes: list[tuple[str, float]] = []
        top = 0.0  # downwards, and turned round at the end
        for lane, rows in rows_by_lane(timeline):
            num_rows = max(row for _, row in rows) + 1
            height = 1.0 if lane != WAITING else min(_WAITING_HEIGHT, max(1.0, num_rows * _WAITING_ROW))
            next_s = [math.inf] * num_rows
            found: list[Bar] = []
            for span, row in reversed(rows):
                begin = top + 0.1 + row * (height - 0.2) / num_rows
                gap = 0.1 if num_rows > 1 else 0.0
                end = begin + (1 - gap) * (height - 0.2) / num_rows
                length_s = span.end_s - span.begin_s
                is_thin = length_s < min(_THIN * timeline.wall_s, next_s[row] - span.end_s)
                next_s[row] = span.begin_s
                found.append(Bar(span, begin, end, is_thin))
            bars += reversed(found)
            lanes.append((lane, top + height / 2))
            top += height
        return cls(
            tuple(Bar(bar.span, top - bar.top, top - bar.bottom, bar.is_thin) for bar in bars),
            tuple((lane, top - middle) for lane, middle in lanes),
            top,
        )


def rows_by_lane(timeline: Timeline) -> list[tuple[str, list[tuple[Span, int]]]]:
    """Return the lanes in order, and for each its spans with the row that each of them is in."""
    by_lane: dict[str, list[Span]] = {}
    for span in timeline.spans:
        by_lane.setdefault(span.lane, []).append(span)
    return [
        (lane, list(zip(spans, _rows(spans) if lane == WAITING else [0] * len(spans), strict=True)))
        for lane, spans in sorted(by_lane.items(), key=lambda item: _order(item[0]))
    ]


def _order(lane: str) -> tuple[int, str, int]:
    """Sort lanes along the way of the data, and readers by number."""
    name, number = re.fullmatch(r"(.*?) ?(\d*)", lane).groups()  # type: ignore[union-attr]  # it always matches
    rank = {"reader": 0, "hash": 1, WAITING: 2, "load": 4}.get(name, 3)
    return rank, name, int(number or 0)


def _rows(spans: list[Span]) -> list[int]:
    """Return the row of each span, such that none in a row overlap: the lowest that is free when it begins."""
    free: list[int] = []
    taken: list[tuple[float, int]] = []
    rows: list[int] = []
    for span in spans:
        while taken and taken[0][0] <= span.begin_s:
            heapq.heappush(free, heapq.heappop(taken)[1])
        row = heapq.heappop(free) if free else len(taken)
        heapq.heappush(taken, (span.end_s, row))
        rows.append(row)
    return rows


def heading(timeline: Timeline) -> tuple[str, str]:
    """Return what was loaded and how fast, and what it waited for."""
    name = Path(timeline.checkpoint)
    title = name.parent.name if name.name.endswith(".json") else name.name
    rate = timeline.num_bytes / timeline.wall_s if timeline.wall_s > 0 else 0.0
    spent: dict[str, float] = {}
    for phase in timeline.phases:
        spent[phase.name] = spent.get(phase.name, 0.0) + phase.end_s - phase.begin_s
    wall_s = timeline.wall_s or 1.0
    shares = [f"{phase} {seconds / wall_s:.0%}" for phase, seconds in sorted(spent.items(), key=lambda item: -item[1])]
    waited = f"waited for: {', '.join(shares)}"
    if not timeline.num_bytes:  # the kernel reads mapped files, when it is asked for their bytes
        return f"{title}: files mapped in {timeline.wall_s:.2f} s, nothing read by the load itself", waited
    what = f"{title}: {format_bytes(timeline.num_bytes)} onto {timeline.device}"
    return f"{what} in {timeline.wall_s:.2f} s, {format_rate(rate)}", waited


def labels_of(timeline: Timeline) -> dict[str, str]:
    """Return what each colour that is used stands for."""
    kinds = {span.kind for span in timeline.spans}
    labels = {COLORS[kind]: label for kind, label in LABELS.items() if kind in kinds}
    # What is waited for has bars too, but for what is none of these, and reads that the kernel makes.
    return labels | {COLORS[phase.name]: phase.name for phase in timeline.phases if COLORS[phase.name] not in labels}


def rate_unit(bytes_per_s: float) -> tuple[str, float]:
    """Return the unit in which a rate has one to three digits before its point, and how much it is."""
    units = (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3))
    return next((unit for unit in units if bytes_per_s >= unit[1]), units[-1])


def throughput(timeline: Timeline, num_bins: int = NUM_BINS) -> dict[str, list[float]]:
    """Return bytes per second over time: of reads ("disk"), and of copies ("bus"), if there are some."""
    spans = timeline.spans
    kinds = {"disk": "read", "bus": "copy"}
    return {
        name: rates((span for span in spans if span.kind == kind), timeline.wall_s, num_bins)
        for name, kind in kinds.items()
        if any(span.kind == kind for span in spans)
    }
