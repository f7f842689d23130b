"""What a recorder says of a load whose times were computed by hand, on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import write_in_order, write_sums
from tests.fakes.rig import KIB, Rig
from tests.models import SmallNet, tensors_of
from tests.scheduler.test_overlap import CHUNK, NUM_CHUNKS, ONE_SECOND, TWO_SECONDS, Layers, checkpoint_of_chunks
from weightstream.errors import ReadError
from weightstream.scheduler.plan import Chunk
from weightstream.scheduler.report import LoadReport
from weightstream.scheduler.timeline import Recorder, Span, Timeline, rates

MakeRig = Callable[..., Rig]


async def recorded(rig: Rig, folder: Path, **settings: Any) -> tuple[LoadReport, Timeline]:
    _, path = checkpoint_of_chunks(folder)
    recorder = Recorder()
    async with rig.loader(chunk=CHUNK, **settings) as loader:
        report = await loader.load(Layers(), path, recorder=recorder)
    return report, recorder.timeline()


def times(timeline: Timeline, kind: str) -> dict[int | None, tuple[float, float]]:
    return {span.chunk: (span.begin_s, span.end_s) for span in timeline.spans if span.kind == kind}


async def test_copies_are_recorded_beside_reads_and_nobody_waits(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(read_bytes_per_s=TWO_SECONDS, copy_bytes_per_s=ONE_SECOND)
    report, timeline = await recorded(rig, tmp_path, workers=1, num_slots=2)
    chunks = range(NUM_CHUNKS)
    assert times(timeline, "read") == {k: (2 * k, 2 * k + 2) for k in chunks}
    assert times(timeline, "copy") == {k: (2 * k + 2, 2 * k + 3) for k in chunks}
    assert times(timeline, "wait") == {}
    assert {(span.kind, span.lane) for span in timeline.spans} == {("read", "reader 0"), ("copy", "copies to cpu")}
    assert all((span.num_bytes, span.num_chunks) == (CHUNK, 1) for span in timeline.spans)
    assert {span.file for span in timeline.spans} == {Path(report.checkpoint).name}
    assert (timeline.wall_s, timeline.num_bytes) == (report.wall_s, report.num_bytes)


async def test_chunks_that_wait_for_others_copies_are_recorded(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(read_bytes_per_s=ONE_SECOND, copy_bytes_per_s=TWO_SECONDS)
    report, timeline = await recorded(rig, tmp_path, workers=1, num_slots=NUM_CHUNKS)
    assert times(timeline, "copy") == {k: (2 * k + 1, 2 * k + 3) for k in range(NUM_CHUNKS)}
    assert times(timeline, "wait") == {k: (k + 1, 2 * k + 1) for k in range(1, NUM_CHUNKS)}
    spent: dict[str, float] = {}
    for phase in timeline.phases:
        spent[phase.name] = spent.get(phase.name, 0.0) + phase.end_s - phase.begin_s
    assert {name: seconds for name, seconds in spent.items() if seconds} == {"disk": 4, "copy": 13}
    assert {name: seconds for name, seconds in report.phases.items() if seconds} == {"disk": 4, "copy": 13}
    edges = [*[phase.begin_s for phase in timeline.phases][1:], report.wall_s]
    assert [phase.end_s for phase in timeline.phases] == edges  # no gaps


async def test_reads_into_place_have_no_copies(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("host", read_bytes_per_s=TWO_SECONDS)
    _, timeline = await recorded(rig, tmp_path, workers=2, num_slots=2)
    assert times(timeline, "copy") == {}
    lanes = [span.lane for span in timeline.spans if span.kind == "read"]
    assert set(lanes) == {"reader 0", "reader 1"}
    assert len(lanes) == NUM_CHUNKS


async def test_copies_by_readers_are_told_apart_from_their_reads(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("host", io="direct", read_bytes_per_s=ONE_SECOND)
    moments: list[tuple[float, float, float]] = []

    class Watched(Recorder):
        def read(self, chunk: Chunk, begin_s: float, copy_s: float, end_s: float, num_bytes: int) -> None:
            moments.append((begin_s, copy_s, end_s))

    recorder = Watched()
    _, path = checkpoint_of_chunks(tmp_path)
    async with rig.loader(chunk=CHUNK, workers=1) as loader:
        await loader.load(Layers(), path, recorder=recorder)
    assert moments == [(k, k + 1, k + 1) for k in range(NUM_CHUNKS)]  # virtual copies take no time


async def test_failed_load_leaves_a_timeline_of_what_was_done(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(read_bytes_per_s=ONE_SECOND, copy_bytes_per_s=ONE_SECOND)
    rig.disk.fail_at(3, ReadError("broken"))
    recorder = Recorder()
    _, path = checkpoint_of_chunks(tmp_path)
    async with rig.loader(chunk=CHUNK, workers=1) as loader:
        with pytest.raises(ReadError):
            await loader.load(Layers(), path, recorder=recorder)
    assert set(times(recorder.timeline(), "read")) == {0, 1, 2}


async def test_hashing_is_recorded(make_rig: MakeRig, tmp_path: Path) -> None:
    path = write_in_order(tmp_path, tensors_of(SmallNet()), num_shards=3)
    write_sums(path)
    hashed_bytes = 0

    class Watched(Recorder):
        def hashed(self, chunk: Chunk, begin_s: float) -> None:
            nonlocal hashed_bytes
            hashed_bytes += chunk.num_bytes
            super().hashed(chunk, begin_s - 1.0)  # virtual time stands still meanwhile

    recorder = Watched()
    with torch.device("meta"):
        model = SmallNet()
    async with make_rig().loader(workers=1, verify="sha256") as loader:
        await loader.load(model, path, recorder=recorder)
    timeline = recorder.timeline()
    assert hashed_bytes == timeline.num_bytes > 0
    lanes = {span.lane for span in timeline.spans if span.kind == "verify"}
    assert lanes
    assert lanes <= {f"hash {number}" for number in range(8)}


async def test_every_strategy_can_be_recorded(make_rig: MakeRig, tmp_path: Path) -> None:
    path = write_in_order(tmp_path, tensors_of(SmallNet()))
    for strategy in ("stream", "map", "preload", "direct"):
        with torch.device("meta"):
            model = SmallNet()
        recorder = Recorder()
        async with make_rig("host").loader(strategy=strategy) as loader:
            report = await loader.load(model, path, recorder=recorder)
        assert recorder.timeline().wall_s == report.wall_s


async def test_recorder_serves_one_load(make_rig: MakeRig, tmp_path: Path) -> None:
    path = write_in_order(tmp_path, {"0": torch.rand(2)})
    recorder = Recorder()
    async with make_rig("host").loader() as loader:
        await (await loader.start_warm(path, recorder=recorder)).wait()
        with pytest.raises(ValueError, match="given to a load before"):
            await loader.start_warm(path, recorder=recorder)


async def test_stream_is_recorded(make_rig: MakeRig, tmp_path: Path) -> None:
    _, path = checkpoint_of_chunks(tmp_path)
    recorder = Recorder()
    async with make_rig("host").loader(chunk=CHUNK) as loader, loader.stream(path, recorder=recorder) as stream:
        names = [name async for name, _ in stream]
        await stream.report()
    assert recorder.timeline().num_bytes == CHUNK * len(names)


def test_rates_spread_bytes_over_time() -> None:
    spans = [Span("read", "reader 0", 0, 1, *times, 6 * KIB, "") for times in ((0.5, 2.5), (3.0, 4.0))]
    assert rates(spans, 4.0, 4) == [1.5 * KIB, 3 * KIB, 1.5 * KIB, 6 * KIB]
    assert rates(spans, 0.0, 2) == [0.0, 0.0]
    assert sum(rates(spans, 4.0, 7)) * 4 / 7 == pytest.approx(12 * KIB)


def test_empty_timeline_of_a_load_that_never_began() -> None:
    assert Recorder().timeline() == Timeline("", "", 0.0, 0, (), ())
