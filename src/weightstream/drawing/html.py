"""A timeline as one page that needs nothing else, by bokeh, whose JavaScript lies in it. It zooms, and tells about bars."""

# pyright: basic
# bokeh leaves much of itself without types.

from __future__ import annotations

import html
from string import Template
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.events import DoubleTap
from bokeh.layouts import column
from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    CustomJSHover,
    FixedTicker,
    HoverTool,
    Range1d,
)
from bokeh.plotting import figure
from bokeh.resources import Resources

from weightstream.drawing.chart import (
    COLORS,
    FILL_ALPHA,
    HEADROOM,
    LABELS,
    NUM_BINS,
    Bar,
    Chart,
    heading,
    labels_of,
    rate_unit,
    throughput,
)
from weightstream.scheduler.timeline import Timeline

__all__ = ["page"]

#: Heights in pixels.
_LANE_PX, _PHASES_PX, _RATES_PX, _AXIS_PX, _TICKS_PX = 24, 52, 170, 12, 48
_SECONDS = "seconds since the load began"

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
body { font-family: system-ui, sans-serif; margin: 1.2em 1.5em; color: #222 }
h1 { font-size: 1.15em; margin: 0 0 .2em }
p { margin: .2em 0 .6em; font-size: .9em; color: #444 }
.key { display: inline-block; width: .9em; height: .9em; margin: 0 .35em 0 1.1em; vertical-align: -.08em }
.key:first-child { margin-left: 0 }
</style>
$script_bokeh
</head>
<body>
<h1>$title</h1>
<p>$subtitle</p>
<p>$keys</p>
$div
<p>The wheel zooms, dragging moves, a double click shows everything again; the mouse over a bar tells what it is.</p>
$script
</body>
</html>
""")


def page(timeline: Timeline) -> str:
    """Return the HTML text."""
    title, subtitle = heading(timeline)
    chart = Chart.of(timeline)
    span_x = Range1d(start=0, end=timeline.wall_s or 1.0, bounds=(0, timeline.wall_s or 1.0))
    series = throughput(timeline)
    panels = [_phases(timeline, span_x), _lanes(chart, span_x, axis_px=0 if series else _TICKS_PX)]
    if series:  # else nothing was read or copied, and the axis comes below the lanes
        panels.append(_rates(timeline, series, span_x))
    panels[-1].xaxis.visible = True
    panels[-1].xaxis.axis_label = _SECONDS
    script, div = components(column(*panels, sizing_mode="stretch_width"))
    keys = [
        f'<span class="key" style="background:{color}"></span>{label}' for color, label in labels_of(timeline).items()
    ]
    return _PAGE.substitute(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        keys=" ".join(keys),
        script_bokeh=Resources(mode="inline", components=["bokeh"]).render_js(),
        div=div,
        script=script,
    )


def _panel(height: int, span_x: Range1d, **settings: Any) -> figure:  # noqa: ANN401 - bokeh's
    panel = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=span_x,
        tools="xpan,xwheel_zoom,reset",
        active_drag="xpan",
        active_scroll="xwheel_zoom",
        toolbar_location=None,
        min_border_left=130,
        min_border_right=20,
        outline_line_color="#cccccc",
        **settings,
    )
    panel.js_on_event(DoubleTap, CustomJS(args={"panel": panel}, code="panel.reset.emit()"))
    panel.xgrid.visible = panel.ygrid.visible = False
    return panel


def _phases(timeline: Timeline, span_x: Range1d) -> figure:
    panel = _panel(_PHASES_PX, span_x, y_range=Range1d(start=0, end=1))
    source = ColumnDataSource(
        {
            "left": [phase.begin_s for phase in timeline.phases],
            "right": [phase.end_s for phase in timeline.phases],
            "ms": [(phase.end_s - phase.begin_s) * 1e3 for phase in timeline.phases],
            "name": [phase.name for phase in timeline.phases],
            "color": [COLORS[phase.name] for phase in timeline.phases],
        }
    )
    panel.quad(left="left", right="right", bottom=0.1, top=0.9, color="color", line_color=None, source=source)
    panel.add_tools(HoverTool(tooltips="<b>waits for: @name</b><br>@ms{0.00} ms, from @left{0.0000} s on"))
    _name_rows(panel, [("waits for", 0.5)])
    panel.xaxis.visible = False
    return panel


def _lanes(chart: Chart, span_x: Range1d, *, axis_px: int) -> figure:
    height = max(chart.height, 1.0)
    panel = _panel(round(_LANE_PX * height) + 2 * _AXIS_PX + axis_px, span_x, y_range=Range1d(start=0, end=height))
    files = sorted({bar.span.file for bar in chart.bars})
    name_of = CustomJSHover(args={"files": files}, code="return files[value]")
    for kind, label in LABELS.items():
        bars = [bar for bar in chart.bars if bar.span.kind == kind]
        if not bars:
            continue
        glyphs: list[Any] = []
        for is_thin in (False, True):
            glyph = panel.quad(
                left="left",
                right="right",
                bottom="bottom",
                top="top",
                color=COLORS[kind],
                fill_alpha=1.0 if is_thin else FILL_ALPHA,
                line_alpha=0.0 if is_thin else 1.0,
                line_width=0.5,
                source=ColumnDataSource(_columns([bar for bar in bars if bar.is_thin == is_thin], files)),
            )
            glyphs.append(glyph)
        more = "" if kind == "preflight" else _TOLD
        tooltips = f"<b>{label}</b>: @ms{{0.000}} ms, from @left{{0.0000}} s on{more}"
        panel.add_tools(HoverTool(renderers=glyphs, tooltips=tooltips, formatters={"@file": name_of}))
    _name_rows(panel, list(chart.lanes))
    panel.xaxis.visible = False
    return panel


#: What is told of a bar that belongs to chunks.
_TOLD = "<br>chunk @chunk, @chunks in all, @mb{0.000} MB<br>@file{custom}"


def _columns(bars: list[Bar], files: list[str]) -> dict[str, Any]:
    number_of = {name: number for number, name in enumerate(files)}
    spans = [bar.span for bar in bars]
    return {  # arrays go into the page as binary data
        "left": np.array([span.begin_s for span in spans]),
        "right": np.array([span.end_s for span in spans]),
        "bottom": np.array([bar.bottom for bar in bars], np.float32),
        "top": np.array([bar.top for bar in bars], np.float32),
        "ms": np.array([(span.end_s - span.begin_s) * 1e3 for span in spans], np.float32),
        "mb": np.array([span.num_bytes / 1e6 for span in spans], np.float32),
        "chunk": np.array([-1 if span.chunk is None else span.chunk for span in spans], np.int32),
        "chunks": np.array([span.num_chunks for span in spans], np.int32),
        "file": np.array([number_of[span.file] for span in spans], np.int32),
    }


def _rates(timeline: Timeline, series: dict[str, list[float]], span_x: Range1d) -> figure:
    most_per_s = max(max(bytes_per_s) for bytes_per_s in series.values())
    unit, unit_per_s = rate_unit(most_per_s)
    span_y = Range1d(start=0, end=HEADROOM * most_per_s / unit_per_s or 1.0)
    panel = _panel(_RATES_PX, span_x, y_range=span_y, y_axis_label=unit)
    panel.ygrid.visible = True
    colors = {"disk": COLORS["read"], "bus": COLORS["copy"]}
    width_s = timeline.wall_s / NUM_BINS
    # Lines with corners: bokeh's own steps tell the mouse nothing.
    edges = [number * width_s for number in range(NUM_BINS + 1) for _ in range(2)][1:-1]
    rates = {name: [rate / unit_per_s for rate in series[name] for _ in range(2)] for name in series}
    source = ColumnDataSource({"x": edges, **rates})
    lines = [
        panel.line("x", name, color=colors[name], line_width=2, legend_label=name, source=source) for name in series
    ]
    # One of them tells about all: two tooltips would cover each other.
    tooltips = "<br>".join(f"{name}: @{name}{{0.00}} {unit}" for name in series)
    panel.add_tools(HoverTool(renderers=[lines[0]], mode="vline", line_policy="none", tooltips=tooltips))
    panel.legend.orientation = "horizontal"
    panel.legend.background_fill_alpha = 0
    panel.legend.location = "top_right"
    panel.legend.spacing = 14
    panel.legend.margin = 2
    panel.legend.border_line_color = None
    return panel


def _name_rows(panel: figure, rows: list[tuple[str, float]]) -> None:
    panel.yaxis.ticker = FixedTicker(ticks=[middle for _, middle in rows])
    panel.yaxis.major_label_overrides = {middle: name for name, middle in rows}
    panel.yaxis.major_tick_line_color = None
    panel.yaxis.axis_line_color = None
