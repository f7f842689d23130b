"""A timeline as a picture, by matplotlib."""

# pyright: basic
# matplotlib leaves much of itself without types.

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from weightstream.display import format_rate
from weightstream.drawing.chart import COLORS, FILL_ALPHA, HEADROOM, LABELS, Bar, Chart, heading, labels_of, throughput
from weightstream.scheduler.timeline import Timeline

__all__ = ["picture"]

_WIDTH_IN, _DPI = 10.5, 120
#: Heights in inches: of one lane, the phases, the throughput, and everything around.
_LANE_IN, _PHASES_IN, _RATES_IN, _AROUND_IN = 0.26, 0.28, 1.1, 1.35
#: One pixel wide.
_BORDER_PT = 72 / _DPI


def picture(timeline: Timeline) -> bytes:
    """Return a PNG file."""
    chart = Chart.of(timeline)
    series = throughput(timeline)
    lanes_in = max(1.0, _LANE_IN * chart.height)
    heights = [_PHASES_IN, lanes_in, *([_RATES_IN] if series else [])]
    figure = Figure(
        figsize=(_WIDTH_IN, _AROUND_IN + sum(heights)),
        dpi=_DPI,
        layout=ConstrainedLayoutEngine(h_pad=0.07),
    )
    phases, lanes, *rates = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights})
    title, subtitle = heading(timeline)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    phases.set_title(subtitle, loc="left", fontsize=9, color="#444444", parse_math=False)
    _draw_phases(phases, timeline)
    _draw_lanes(lanes, chart)
    for axes in rates:  # none where nothing was read or copied
        _draw_rates(axes, timeline, series)
    lowest = figure.axes[-1]
    lowest.set_xlim(0, timeline.wall_s or 1.0)
    lowest.tick_params(bottom=True, labelsize=9)
    lowest.set_xlabel("seconds since the load began", fontsize=9)
    patches = [Patch(color=color, label=label) for color, label in labels_of(timeline).items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=max(1, len(patches)), fontsize=9, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_phases(axes: Axes, timeline: Timeline) -> None:
    for phase in timeline.phases:
        axes.axvspan(phase.begin_s, phase.end_s, color=COLORS[phase.name], linewidth=0)
    axes.set_yticks([0.5], ["waits for"], fontsize=9)
    axes.tick_params(left=False, bottom=False)


def _draw_lanes(axes: Axes, chart: Chart) -> None:
    for kind in LABELS:
        bars = [bar for bar in chart.bars if bar.span.kind == kind]
        thick = [bar for bar in bars if not bar.is_thin]
        thin = [bar for bar in bars if bar.is_thin]
        color = COLORS[kind]
        axes.add_collection(
            PolyCollection(_boxes(thick), facecolors=(color, FILL_ALPHA), edgecolors=color, linewidths=_BORDER_PT)
        )
        axes.add_collection(PolyCollection(_boxes(thin), facecolors=color, linewidths=0, snap=False))
    axes.set_ylim(0, max(chart.height, 1.0))
    axes.set_yticks([middle for _, middle in chart.lanes], [lane for lane, _ in chart.lanes], fontsize=9)
    axes.tick_params(left=False, bottom=False)


def _boxes(bars: list[Bar]) -> list[list[tuple[float, float]]]:
    return [
        [
            (bar.span.begin_s, bar.bottom),
            (bar.span.end_s, bar.bottom),
            (bar.span.end_s, bar.top),
            (bar.span.begin_s, bar.top),
        ]
        for bar in bars
    ]


def _draw_rates(axes: Axes, timeline: Timeline, series: dict[str, list[float]]) -> None:
    colors = {"disk": COLORS["read"], "bus": COLORS["copy"]}
    most_per_s = max(max(bytes_per_s) for bytes_per_s in series.values())
    for name, bytes_per_s in series.items():
        width_s = timeline.wall_s / len(bytes_per_s)
        edges = [number * width_s for number in range(len(bytes_per_s) + 1)]
        axes.stairs(bytes_per_s, edges, color=colors[name], label=name, linewidth=1.4)
    axes.set_ylim(0, HEADROOM * most_per_s or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: format_rate(rate)))
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.legend(loc="upper right", fontsize=9, frameon=False, ncols=2)
