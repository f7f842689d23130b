"""Timelines as files: traces, pictures and pages, without a viewer. See `test_page` and `test_perfetto` for those."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from tests.drawing.colors import pixels_like
from tests.drawing.timelines import MIB, timeline_of
from weightstream import drawing
from weightstream.drawing import check_can_save, save_timeline
from weightstream.drawing.chart import Chart, heading, throughput
from weightstream.scheduler.timeline import Span, Timeline


def test_page_needs_nothing_from_elsewhere_and_escapes_names(tmp_path: Path) -> None:
    page = tmp_path / "load.html"
    save_timeline(timeline_of(10), page)
    text = page.read_text()
    assert '<script src="' not in text.replace("'", '"')
    assert "<link" not in text
    assert "&lt;tiny&gt;: 10.5 MB onto cuda:0" in text
    assert len(text) < 1.6e6


@pytest.mark.parametrize("num_chunks", [0, 50, 20_000])
def test_picture_has_every_kind(tmp_path: Path, num_chunks: int) -> None:
    picture = tmp_path / "load.png"
    save_timeline(timeline_of(num_chunks), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 300_000
    for kind in ("read", "wait", "copy") if num_chunks else ("preflight",):
        assert pixels_like(picture, kind) > 0.012, kind
    # Of 20,000 bars between which more time passes than they take, nothing looks as if it took all of it.
    assert (pixels_like(picture, "bind") > 0.012) == (num_chunks == 50)


def test_picture_takes_no_name_for_a_formula(tmp_path: Path) -> None:
    timeline = dataclasses.replace(timeline_of(2), checkpoint="/models/$\\frac$_$$x^2$$")
    save_timeline(timeline, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_bar_has_no_border_where_what_follows_is_a_longer_gap() -> None:
    spans = [
        Span("read", "reader 0", 0, 1, 0.0, 2.0, 1, "a"),  # long
        Span("read", "reader 0", 1, 1, 4.0, 4.001, 1, "a"),  # touches the next
        Span("read", "reader 0", 2, 1, 4.001, 4.002, 1, "a"),
        Span("bind", "load", 0, 1, 5.0, 5.001, 1, "a"),
    ]
    chart = Chart.of(dataclasses.replace(timeline_of(0), spans=tuple(spans)))
    assert {bar.span: bar.is_thin for bar in chart.bars} == dict(zip(spans, [False, False, True, True], strict=True))


def test_nothing_is_drawn_of_rates_where_nothing_was_read_or_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with mapped files."""
    whole = timeline_of(50)
    mapped = dataclasses.replace(
        whole, num_bytes=0, spans=tuple(span for span in whole.spans if span.kind in ("preflight", "bind"))
    )
    drawn: list[int] = []
    save = Figure.savefig

    def count_and_save(figure: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(len(figure.axes))
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", count_and_save)
    for timeline in (whole, mapped):
        save_timeline(timeline, tmp_path / "load.png")
        save_timeline(timeline, tmp_path / "load.html")
        page = (tmp_path / "load.html").read_text()
        assert page.count('"GB/s"') + page.count('"MB/s"') == (timeline is whole)
        assert page.count("seconds since the load began") == 1
    assert drawn == [3, 2]


def test_trace_is_what_its_viewers_expect(tmp_path: Path) -> None:
    timeline, file = timeline_of(200), tmp_path / "load.json"
    save_timeline(timeline, file)
    document = json.loads(file.read_text())
    assert list(document) == ["traceEvents"]  # "displayTimeUnit" is taken for the unit of all times by some
    events: list[dict[str, Any]] = document["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(names.values()) == [
        *("waited for", "reader 0", "reader 1", "waiting", "copies to cuda:0", "load"),
    ]
    assert [event["args"]["name"].split(":")[0] for event in events if event["name"] == "process_name"] == [
        "weightstream | <tiny>"
    ]
    timed = [event for event in events if event["ph"] != "M"]
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    complete = [event for event in timed if event["ph"] == "X"]
    assert len(complete) == len(timeline.spans) + len(timeline.phases)
    ends: dict[int, float] = {}
    for event in complete:
        assert event["pid"] == 1
        assert event["dur"] >= 0
        assert event["ts"] >= ends.get(event["tid"], 0.0) - 1e-6, event  # never two at once in a thread
        ends[event["tid"]] = event["ts"] + event["dur"]
    assert {event["name"] for event in timed if event["ph"] == "C"} == {"disk", "bus"}
    read = next(event for event in complete if event["cat"] == "read")
    assert read["args"] == {"chunk": 0, "chunks": 1, "bytes": MIB, "file": "model-0.safetensors"}


def test_waiting_chunks_lie_in_rows_of_their_own() -> None:
    waits = [Span("wait", "waiting", chunk, 1, chunk, 10.0 - chunk, 1, "f") for chunk in range(4)]
    later = Span("wait", "waiting", 9, 1, 9.5, 10.0, 1, "f")
    others = [Span(kind, lane, 0, 1, 0, 1, 1, "f") for kind, lane in (("bind", "load"), ("read", "reader 10"))]  # type: ignore[arg-type]  # kinds
    reads = [Span("read", f"reader {number}", 0, 1, 0, 1, 1, "f") for number in (9, 2)]
    chart = Chart.of(Timeline("c", "cpu", 10.0, 1, (), (*waits, *others, *reads, later)))
    assert [lane for lane, _ in chart.lanes] == ["reader 2", "reader 9", "reader 10", "waiting", "load"]
    bottoms = {bar.span.chunk: bar.bottom for bar in chart.bars if bar.span.kind == "wait"}
    assert sorted(bottoms, key=lambda chunk: -bottoms[chunk]) == [0, 1, 9, 2, 3]
    assert bottoms[9] == bottoms[1]  # the row of one that is over
    assert all(0 <= bar.bottom < bar.top <= chart.height for bar in chart.bars)


def test_heading_says_what_and_why() -> None:
    assert heading(timeline_of(1000)) == (
        "<tiny>: 1.05 GB onto cuda:0 in 10.00 s, 105 MB/s",
        "waited for: disk 90%, copy 10%, preflight 0%",
    )
    assert set(throughput(timeline_of(10))) == {"disk", "bus"}


def test_heading_of_mapped_files_claims_no_rate() -> None:
    mapped = dataclasses.replace(timeline_of(10), num_bytes=0)
    assert heading(mapped)[0].endswith("s, nothing read by the load itself")


def test_file_for_which_there_is_no_room_is_named_and_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(file: Path, content: bytes) -> None:
        file.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(OSError, match=r"No space left on device: .*load\.json") as caught:
        save_timeline(timeline_of(10), tmp_path / "load.json")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_saved_are_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"saved as \.html, \.png, \.json"):
        check_can_save(tmp_path / "load.svg")
    with pytest.raises(FileNotFoundError, match="no folder"):
        check_can_save(tmp_path / "nowhere" / "load.json")
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'weightstream\[timeline\]'"):
        check_can_save(tmp_path / "load.html")
    check_can_save(tmp_path / "load.json")
