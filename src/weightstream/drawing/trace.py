"""A timeline in Chrome's trace format, as Perfetto (https://ui.perfetto.dev) and chrome://tracing open it.

Format: "Trace Event Format", the JSON object with `traceEvents`: times in microseconds; complete events (`ph` X), which
must not overlap within a thread unless one lies inside the other; metadata (M) with names and order; counters (C).
"""

from __future__ import annotations

import json
from typing import Any

from weightstream.drawing.chart import LABELS, heading, rows_by_lane, throughput
from weightstream.scheduler.timeline import Span, Timeline

__all__ = ["trace"]

_PID = 1


def trace(timeline: Timeline) -> str:
    """Return the JSON text: first the names, then events sorted by time. Each row of waiting chunks is a thread."""
    names = ["waited for"]
    events = [_complete(1, phase.name, "phase", phase.begin_s, phase.end_s) for phase in timeline.phases]
    for lane, rows in rows_by_lane(timeline):
        num_rows = max(row for _, row in rows) + 1
        first = len(names) + 1
        names += [lane if num_rows == 1 else f"{lane} {row}" for row in range(num_rows)]
        events += [
            _complete(first + row, LABELS[span.kind], span.kind, span.begin_s, span.end_s, _args(span))
            for span, row in rows
        ]
    for name, bytes_per_s in throughput(timeline).items():
        width_s = timeline.wall_s / len(bytes_per_s)
        events += [
            {"ph": "C", "pid": _PID, "name": name, "ts": _us(number * width_s), "args": {"GB/s": round(rate / 1e9, 3)}}
            for number, rate in enumerate([*bytes_per_s, 0.0])
        ]
    events.sort(key=lambda event: event["ts"])
    # No `displayTimeUnit`: it is for display alone, but releases of Perfetto took "ms" for the unit of `ts`, and were off by
    # a factor of 1000 (seen with the one that the tests ask).
    document = {"traceEvents": [*_metadata(timeline, names), *events]}
    return json.dumps(document, separators=(",", ":"))


def _complete(
    tid: int, name: str, category: str, begin_s: float, end_s: float, args: dict[str, Any] | None = None
) -> dict[str, Any]:
    # Both ends are rounded, not the duration: what begins where another ends must not begin before it.
    begin_us, end_us = _us(begin_s), _us(end_s)
    return {
        "ph": "X",
        "pid": _PID,
        "tid": tid,
        "name": name,
        "cat": category,
        "ts": begin_us,
        "dur": round(end_us - begin_us, 3),
        "args": args or {},
    }


def _args(span: Span) -> dict[str, Any]:
    if span.chunk is None:
        return {}
    return {"chunk": span.chunk, "chunks": span.num_chunks, "bytes": span.num_bytes, "file": span.file}


def _metadata(timeline: Timeline, names: list[str]) -> list[dict[str, Any]]:
    title = " | ".join(("weightstream", *heading(timeline)))
    result: list[dict[str, Any]] = [{"ph": "M", "pid": _PID, "name": "process_name", "args": {"name": title}}]
    for tid, name in enumerate(names, 1):
        result.append({"ph": "M", "pid": _PID, "tid": tid, "name": "thread_name", "args": {"name": name}})
        result.append({"ph": "M", "pid": _PID, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}})
    return result


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
