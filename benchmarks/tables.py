"""What was measured, as tables in Markdown: for each checkpoint and state of the page cache, one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.summary import Summary, ratio, summarise

__all__ = ["Row", "ceiling_of", "comparison", "rows_of", "table"]

#: The arms of ours that the others are compared with, and what their columns are called.
REFERENCES = {"ws-stream": "stream", "ws-map": "map", "ws-again": "warm Loader", "ws-llama": "weightstream"}
#: An arm that imports more modules than this during its load is named: they should be among its `imports`.
_FEW_IMPORTS = 5
_CHUNK_BYTES = 16 * 2**20

EXPLANATION = """\
`load`: from the call until it returns, median (least to greatest). `with first read`: until every byte of every parameter
has been read once, which is when a lazily mapped model is really there. `filled`: after the load, at least 95 % of the
checkpoint is in anonymous memory (on a GPU: in its memory) and no parameter is in a mapped file. `CPU`: processor seconds
of all threads during the load. `peak`: the most memory, weights and mapped pages included, above the process with the
model's modules. `x stream` and the like: how many times as long as that arm of weightstream, load / with first read.
`of the ceiling`: the time of the best raw reader{copy}, as a share of the load, or of load and first read for what is not
filled. Every load ran in a fresh process, all arms in turn; before its clock, each touched and freed the memory that it
needs, and its imports were done; afterwards every parameter was compared with the files.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One arm in one setting, summarised. `whole` is load and first read; None for ceilings, which keep nothing."""

    key: str
    title: str
    group: str
    begins: str
    load: Summary
    whole: Summary | None
    filled: bool
    cpu: Summary
    peak: Summary
    report: Mapping[str, Any]
    num_bytes: int

    @property
    def real(self) -> Summary:
        """The time after which every byte is in memory."""
        return self.load if self.filled or self.whole is None else self.whole


def rows_of(series: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Summarise the series that have results."""
    return [_row(one) for one in series if one["results"]]


def _row(one: Mapping[str, Any]) -> Row:
    results: Sequence[Mapping[str, Any]] = one["results"]
    whole = [result["wall_s"] + result["first_read_s"] for result in results if "first_read_s" in result]
    return Row(
        key=one["arm"],
        title=one["title"],
        group=one["group"],
        begins=one["begins"],
        load=summarise([result["wall_s"] for result in results]),
        whole=summarise(whole) if whole else None,
        filled=all(result.get("filled", True) for result in results),
        cpu=summarise([result["cpu_s"] for result in results]),
        peak=summarise([result["peak_bytes"] / 2**20 for result in results]),
        report=results[-1]["report"],
        num_bytes=results[-1]["num_bytes"],
    )


def ceiling_of(rows: Sequence[Row]) -> Summary | None:
    """Return the time of the ceiling: the best raw reader, or the raw copy to the device where that takes longer."""
    ceilings = [row for row in rows if row.group == "ceiling"]
    readers = [row.load for row in ceilings if row.key != "copy"]
    copies = [row.load for row in ceilings if row.key == "copy"]
    if not readers:
        return None
    return max([min(readers, key=_median), *copies], key=_median)


def _median(summary: Summary) -> float:
    return summary.median


def comparison(document: Mapping[str, Any]) -> str:
    """Return all tables of a comparison, with what they mean and what is missing in them."""
    parts: list[str] = []
    device = document["machine"]["gpu"]
    for (name, cache), series in _by_setting(document["series"]).items():
        rows = rows_of(series)
        if rows:
            parts += [_heading(name, cache, series, rows), _setting_table(rows, on_device=device is not None)]
        parts += [_missing(series), _importing(series)]
    copy = " (or of the raw copy to the device, where that takes longer)" if device else ""
    return "\n\n".join(part for part in [*parts, EXPLANATION.format(copy=copy).strip()] if part) + "\n"


def _by_setting(series: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in series:
        found.setdefault((one["checkpoint"]["name"], one["cache"]), []).append(one)
    return found


def _heading(name: str, cache: str, series: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    checked = {result["num_checked"] for one in series for result in one["results"] if "num_checked" in result}
    tensors = f"{max(checked):,} tensors, " if checked else ""
    counts = sorted({row.load.count for row in rows})
    times = f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} time{'s' if counts[-1] > 1 else ''}"
    return f"### `{name}`, {cache}: {tensors}{rows[0].num_bytes / 1e9:.2f} GB; each loader {times}"


def _setting_table(rows: Sequence[Row], *, on_device: bool) -> str:
    wanted = [key for key in REFERENCES if key != "ws-again" or on_device]
    references = {key: row for key in wanted for row in rows if row.key == key}
    ceiling = ceiling_of(rows)
    columns: dict[str, Callable[[Row], str]] = {
        "loader": lambda row: f"**{row.title}**" if row.group == "weightstream" else row.title,
        "model begins": lambda row: "" if row.group == "ceiling" else {"nothing": "built"}.get(row.begins, row.begins),
        "load s": lambda row: seconds(row.load),
        "with first read s": lambda row: seconds(row.whole),
        "filled": lambda row: "" if row.group == "ceiling" else ("yes" if row.filled else "no"),
        "CPU s": lambda row: f"{row.cpu.median:.2f}",
        "peak MiB": lambda row: f"{row.peak.median:,.0f}",
    }
    if on_device:
        del columns["with first read s"], columns["filled"]
    for key, reference in references.items():
        columns[f"x {REFERENCES[key]}"] = lambda row, reference=reference: _times(row, reference)  # type: ignore[misc]
    if ceiling is not None:
        columns["of the ceiling"] = lambda row: f"{(ratio(ceiling, row.real) or 0):.0%}"
    if on_device:
        columns["copies / chunk"] = _copies
    return table(list(columns), [[cell(row) for cell in columns.values()] for row in _sorted(rows)])


def _sorted(rows: Sequence[Row]) -> list[Row]:
    """Ours as they come, then the others, the fastest first; then the ceilings, likewise."""
    ours = [row for row in rows if row.group == "weightstream"]
    others = [row for group in ("peer", "ceiling") for row in rows if row.group == group]
    return ours + sorted(others, key=lambda row: (row.group == "ceiling", row.real.median))


def _times(row: Row, reference: Row) -> str:
    if row.whole is None:
        return ""
    load, whole = ratio(row.load, reference.load), ratio(row.whole, reference.whole)
    return f"{load:.2f} / {whole:.2f}" if row is not reference else "1"


def _copies(row: Row) -> str:
    if "num_copies" not in row.report:
        return ""
    return f"{row.report['num_copies'] / max(1, -(-row.num_bytes // _CHUNK_BYTES)):.2f}"


def seconds(summary: Summary | None) -> str:
    """Write a median and its spread, in seconds."""
    if summary is None:
        return ""
    digits = 3 if summary.median < 1 else 2
    return f"{summary.median:.{digits}f} ({summary.low:.{digits}f} to {summary.high:.{digits}f})"


def _missing(series: Iterable[Mapping[str, Any]]) -> str:
    lines = [f"- {one['title']} (`{one['arm']}`): {one['reason']}" for one in series if one["reason"]]
    return "\n".join(["Not measured, or not as often as the others:", "", *lines]) if lines else ""


def _importing(series: Iterable[Mapping[str, Any]]) -> str:
    """Name the arms whose clock had much in it that is no part of a load."""
    most = {
        f"{one['title']} (`{one['arm']}`)": max(result.get("num_imports", 0) for result in one["results"])
        for one in series
        if one["results"]
    }
    lines = [f"- {arm}: {count} modules" for arm, count in most.items() if count > _FEW_IMPORTS]
    return "\n".join(["Modules were imported while the clock ran:", "", *lines]) if lines else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
