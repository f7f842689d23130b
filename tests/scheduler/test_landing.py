"""Copies that readers make are in the report as they are in the timeline: exact times, on a virtual clock.

A chunk is read in 1 s, one after the other, and copied by its reader, which reads nothing meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from tests.builders import assert_same, write_sums
from tests.fakes.rig import Rig
from tests.scheduler.test_overlap import CHUNK, NUM_CHUNKS, ONE_SECOND, Layers, checkpoint_of_chunks
from weightstream.prefetch.memory import copy_out
from weightstream.scheduler import fetching
from weightstream.scheduler.report import LoadReport
from weightstream.scheduler.timeline import Recorder, Timeline
from weightstream.summary import print_report
from weightstream.why import explain

MakeRig = Callable[..., Rig]


@pytest.fixture(name="copies_take")
def fixture_copies_take(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rig, float], None]:
    """Returns what makes the copies of a rig's readers take so many seconds each."""

    def take(rig: Rig, seconds: float) -> None:
        def copy(source: memoryview, buffers: Iterable[memoryview]) -> None:
            rig.clock.sleep(seconds)
            copy_out(source, buffers)

        monkeypatch.setattr(fetching, "copy_out", copy)

    return take


async def load(rig: Rig, folder: Path, *, in_place: bool, **settings: Any) -> tuple[LoadReport, Timeline]:
    tensors, path = checkpoint_of_chunks(folder)
    model, recorder = Layers(), Recorder()
    if in_place:
        model.to_empty(device="cpu")
    async with rig.loader(chunk=CHUNK, strategy="stream", **settings) as loader:
        report = await loader.load(model, path, recorder=recorder)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])
    return report, recorder.timeline()


ways = pytest.mark.parametrize(
    "way",
    [("direct", False), ("direct", True), ("buffered", True)],
    ids=["direct-onto-meta", "direct-in-place", "buffered-in-place"],
)


class Case(NamedTuple):
    """So many readers, whose copies take so long each; and what comes of it."""

    workers: int
    copy_s: float
    disk_s: float
    alone_s: float
    overlap: float


@ways
@pytest.mark.parametrize(
    "case",
    [
        # One reader: it reads and copies in turn, 8 times 1 s and 1 s.
        Case(1, 1, 8, 8, 0),
        # Two: one reads while the other copies, and the last copy is left.
        Case(2, 1, 8, 1, 7 / 8),
        # Two read in [4k, 4k + 2] and copy for 3 s each: nothing is read in [4k + 2, 4k + 4], and in [14, 17]. Reads are
        # busy for 8 s, all but the first of these beside a copy.
        Case(2, 3, 8, 9, 7 / 8),
    ],
    ids=["in-turn", "disk-bound", "copy-bound"],
)
async def test_report_agrees_with_the_timeline(
    make_rig: MakeRig, tmp_path: Path, copies_take: Callable[[Rig, float], None], way: tuple[str, bool], case: Case
) -> None:
    io, in_place = way
    rig = make_rig("host", io=io, read_bytes_per_s=ONE_SECOND)
    copies_take(rig, case.copy_s)

    report, timeline = await load(rig, tmp_path, in_place=in_place, workers=case.workers)

    assert report.phases == {"preflight": 0, "disk": case.disk_s, "copy": case.alone_s, "bind": 0, "other": 0}
    assert report.wall_s == timeline.wall_s == case.disk_s + case.alone_s
    assert report.overlap == case.overlap
    copies = [span for span in timeline.spans if span.kind == "copy"]
    assert report.num_copies == len(copies) == NUM_CHUNKS
    assert sum(span.num_bytes for span in copies) == report.num_bytes
    spent = [phase.end_s - phase.begin_s for phase in timeline.phases if phase.name == "copy"]
    assert sum(spent) == case.alone_s


@ways
async def test_summary_speaks_of_copies_and_says_what_to_do_about_them(
    make_rig: MakeRig, tmp_path: Path, copies_take: Callable[[Rig, float], None], way: tuple[str, bool]
) -> None:
    io, in_place = way
    rig = make_rig("host", io=io, read_bytes_per_s=ONE_SECOND)
    copies_take(rig, 3)

    report, _ = await load(rig, tmp_path, in_place=in_place, workers=2)

    text = explain(report)
    assert text.startswith("It waited for copies most, 53% of the time (47% for reading): ")
    assert ("what was read past the page cache was copied" in text) == (io == "direct")
    assert ("what comes from storage for parameters that have storage" in text) == (io == "buffered")
    console = Console(file=StringIO(), width=400)
    print_report(console, report)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "without a copy" not in text.split("why so long")[0]
    assert f"  copies        {NUM_CHUNKS}\n" in text


async def test_verified_load_waits_for_copies_that_come_before_the_hashes(
    make_rig: MakeRig, tmp_path: Path, copies_take: Callable[[Rig, float], None]
) -> None:
    _, path = checkpoint_of_chunks(tmp_path)
    write_sums(path)
    rig = make_rig("host", io="direct", read_bytes_per_s=ONE_SECOND)
    copies_take(rig, 1)
    async with rig.loader(chunk=CHUNK, workers=1, verify="sha256") as loader:
        report = await loader.load(Layers(), path)
    assert {name: seconds for name, seconds in report.phases.items() if seconds} == {"disk": 8, "copy": 8}


@pytest.mark.parametrize("fault", [OSError("broken"), None], ids=["fails", "stopped"])
async def test_nothing_is_left_in_the_ledger_of_a_load_that_ends_in_a_copy(
    make_rig: MakeRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception | None
) -> None:
    """A copy that has begun goes on until it ends, also when nobody waits for it any more."""
    rig = make_rig("host", io="direct", read_bytes_per_s=ONE_SECOND)
    _, path = checkpoint_of_chunks(tmp_path)
    counts: list[tuple[int, int]] = []

    def copy(_source: memoryview, _buffers: Iterable[memoryview]) -> None:
        if fault is not None:
            raise fault
        counts.append((ledger.reading, ledger.landing))
        rig.clock.sleep(100)

    monkeypatch.setattr(fetching, "copy_out", copy)
    async with rig.loader(chunk=CHUNK, workers=1, stall_s=10.0, scheduler={"timeout_s": 5.0}) as loader:
        handle = await loader.start(Layers(), path)
        ledger = handle._job._ledger
        with pytest.raises(Exception, match="broken" if fault else "the load took too long"):
            await handle.wait()
        assert counts == ([] if fault else [(0, 1)])
        assert (ledger.reading, ledger.landing) == (0, 0)
    assert (ledger.reading, ledger.landing) == (0, 0)
