"""What was measured, as pictures: a chart for each checkpoint, and how cost grows. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.growth import Growth
from benchmarks.summary import Summary
from benchmarks.tables import Row, ceiling_of, rows_of, seconds

__all__ = ["draw_comparison", "draw_growth"]

# Okabe and Ito's colours, which differ for every kind of colour vision, and in grey.
_BLUE, _ORANGE, _GREY, _BLACK = "#0072B2", "#E69F00", "#8C8C8C", "#222222"
_COLOURS = {"weightstream": _BLUE, "peer": _GREY}
_DPI = 160


def draw_comparison(series: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw one checkpoint: a panel for each state of the page cache, a line for each loader, on a logarithmic scale."""
    caches = [cache for cache in ("warm", "cold") if any(one["cache"] == cache and one["results"] for one in series)]
    panels = {cache: rows_of(one for one in series if one["cache"] == cache) for cache in caches}
    height = max(len(_loaders(rows)) for rows in panels.values())
    figure, axes = _plots().subplots(
        len(caches),
        1,
        figsize=(9, (0.27 * height + 0.9) * len(caches) + 0.5),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (cache, rows) in zip(axes[:, 0], panels.items(), strict=True):
        _draw_panel(axis, rows)
        where = "in the page cache" if cache == "warm" else "not in the page cache"
        axis.set_title(f"`{series[0]['checkpoint']['name']}`, files {where}".replace("`", ""), loc="left", fontsize=11)
    axes[-1, 0].set_xlabel("seconds, logarithmic; median, and least to greatest")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.savefig(path, dpi=_DPI)
    _plots().close(figure)


def _plots() -> Any:  # noqa: ANN401 - matplotlib is an extra, and brings types of its own
    import_module("matplotlib").use("agg")
    return import_module("matplotlib.pyplot")


def _loaders(rows: Sequence[Row]) -> list[Row]:
    """Return all but the ceilings, the slowest first, which a chart draws at the bottom."""
    return sorted((row for row in rows if row.whole is not None), key=lambda row: -row.real.median)


def _draw_panel(axis: Any, rows: Sequence[Row]) -> None:  # noqa: ANN401
    loaders = _loaders(rows)
    for place, row in enumerate(loaders):
        colour = _COLOURS[row.group]
        if not row.filled:
            axis.plot([row.load.median, row.real.median], [place, place], color=colour, linewidth=2, alpha=0.5)
            _draw_point(axis, row.load, place, colour, marker="o", hollow=True)
        _draw_point(axis, row.real, place, colour, marker="o" if row.filled else "D", hollow=False)
        axis.annotate(
            seconds(row.real).partition(" ")[0],
            (row.real.high, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_BLACK,
        )
    axis.set_ylim(-0.6, len(loaders) - 0.4)
    axis.set_yticks(range(len(loaders)), [f"{row.title} ({_begin(row)})" for row in loaders], fontsize=9)
    for label, row in zip(axis.get_yticklabels(), loaders, strict=True):
        label.set_fontweight("bold" if row.group == "weightstream" else "normal")
    ceiling = ceiling_of(rows)
    if ceiling is not None:
        axis.axvline(ceiling.median, color=_ORANGE, linewidth=1.5, label="raw ceiling")
    _finish(axis)


def _begin(row: Row) -> str:
    return {"meta": "from meta", "allocated": "allocated", "nothing": "builds the model"}[row.begins]


def _draw_point(axis: Any, summary: Summary, place: int, colour: str, *, marker: str, hollow: bool) -> None:  # noqa: ANN401
    spread = [[summary.median - summary.low], [summary.high - summary.median]]
    axis.errorbar(
        summary.median,
        place,
        xerr=spread,
        fmt=marker,
        color=colour,
        markerfacecolor="white" if hollow else colour,
        markersize=6,
        capsize=3,
        elinewidth=1,
    )


def _finish(axis: Any) -> None:  # noqa: ANN401
    axis.plot([], [], "o", color=_BLACK, label="load")
    axis.plot([], [], "o", color=_BLACK, markerfacecolor="white", label="load that only maps")
    axis.plot([], [], "D", color=_BLACK, label="the same with first read")
    axis.set_xscale("log")
    axis.grid(axis="x", which="both", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    ticker = import_module("matplotlib.ticker")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.tick_params(axis="x", labelbottom=True)
    axis.margins(x=0.1)


def draw_growth(found: Sequence[Growth], path: Path) -> None:
    """Draw a panel for each axis along which cost was measured: wall time and processor time, and the fitted line."""
    figure, axes = _plots().subplots(1, len(found), figsize=(9, 3.8), squeeze=False, layout="constrained")
    for axis, growth in zip(axes[0], found, strict=True):
        unit = 1 if growth.axis == "tensors" else 1e9
        xs = [point.x / unit for point in growth.points]
        _draw_curve(axis, xs, [point.wall for point in growth.points], _BLUE, "o", "load")
        _draw_curve(axis, xs, [point.cpu for point in growth.points], _ORANGE, "s", "CPU seconds of the load")
        _draw_curve(axis, xs, [point.staged_wall for point in growth.points], _GREY, "^", "streamed through 64 MiB")
        line = [growth.line.offset + growth.line.slope * x * unit for x in (xs[0], xs[-1])]
        axis.plot([xs[0], xs[-1]], line, color=_BLUE, linewidth=1, linestyle=":", label="line fitted to the loads")
        axis.set_xlabel("tensors of 4 KiB" if growth.axis == "tensors" else "GB in 200 tensors")
        axis.set_ylabel("seconds")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        power = f", exponent {growth.power.slope:.2f}" if growth.power else ""
        axis.set_title(f"by {growth.axis}: R² {growth.line.r_squared:.3f}{power}", loc="left", fontsize=10)
        axis.xaxis.set_major_locator(import_module("matplotlib.ticker").MaxNLocator(5))
        axis.xaxis.set_major_formatter(import_module("matplotlib.ticker").StrMethodFormatter("{x:,g}"))
        axis.grid(color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.savefig(path, dpi=_DPI)
    _plots().close(figure)


def _draw_curve(axis: Any, xs: Sequence[float], ys: Sequence[Summary], colour: str, marker: str, label: str) -> None:  # noqa: ANN401
    spread = [[y.median - y.low for y in ys], [y.high - y.median for y in ys]]
    medians = [y.median for y in ys]
    axis.errorbar(
        xs, medians, yerr=spread, fmt=f"{marker}-", color=colour, markersize=5, linewidth=1.2, capsize=3, label=label
    )
