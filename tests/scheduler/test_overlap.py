"""Reading and copying overlap: exact times, computed by hand, on a virtual clock.

All chunks are equal: one tensor each, as large as a chunk. All speeds are powers of two, so no time is rounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.builders import assert_same, write_in_order
from tests.fakes.rig import KIB, Rig
from weightstream.scheduler.report import LoadReport

CHUNK = 64 * KIB
NUM_CHUNKS = 8

#: Bytes in a second such that one chunk takes so many seconds.
ONE_SECOND = CHUNK
TWO_SECONDS = CHUNK // 2

MakeRig = Callable[..., Rig]


def checkpoint_of_chunks(folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    tensors = {f"layers.{i}": torch.randint(256, (CHUNK,), dtype=torch.uint8) for i in range(NUM_CHUNKS)}
    return tensors, write_in_order(folder, tensors)


class Layers(nn.Module):
    """One buffer a chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Module()
        for i in range(NUM_CHUNKS):
            self.layers.register_buffer(str(i), torch.empty(CHUNK, dtype=torch.uint8, device="meta"))


async def load(rig: Rig, folder: Path, *, workers: int, num_slots: int) -> LoadReport:
    tensors, path = checkpoint_of_chunks(folder)
    model = Layers()
    async with rig.loader(chunk=CHUNK, workers=workers, num_slots=num_slots) as loader:
        report = await loader.load(model, path)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])
    return report


several_slots = pytest.mark.parametrize("num_slots", [2, NUM_CHUNKS], ids=["2-slots", "8-slots"])


@several_slots
@pytest.mark.parametrize("workers", [1, 4], ids=["1-worker", "4-workers"])
async def test_disk_bound_load_takes_all_reads_and_the_last_copy(
    make_rig: MakeRig, tmp_path: Path, workers: int, num_slots: int
) -> None:
    """A chunk is read in 2 s and copied in 1 s: copy k runs while chunk k + 1 is read, in [2k + 2, 2k + 3]."""
    rig = make_rig(read_bytes_per_s=TWO_SECONDS, copy_bytes_per_s=ONE_SECOND)

    report = await load(rig, tmp_path, workers=workers, num_slots=num_slots)

    # 8 reads of 2 s, one after the other; the copy of chunk 7 ends 1 s after its read. Not 8 * 2 + 8 * 1 = 24.
    assert report.wall_s == 17
    # No chunk ever waits for the copies, so the first 16 s are the disk's. What is left is the last copy.
    assert report.phases == {"preflight": 0, "disk": 16, "copy": 1, "bind": 0, "other": 0}
    # Reads are busy for 16 s, copies for 8 s; all copies but the last run beside a read: 7 s of the 8.
    assert report.overlap == 7 / 8
    assert report.throughput_bytes_per_s == NUM_CHUNKS * CHUNK / 17


async def test_copy_bound_load_takes_the_first_read_and_all_copies(make_rig: MakeRig, tmp_path: Path) -> None:
    """A chunk is read in 1 s and copied in 2 s, and there is a slot for each: chunk k is filled at k + 1."""
    rig = make_rig(read_bytes_per_s=ONE_SECOND, copy_bytes_per_s=TWO_SECONDS)

    report = await load(rig, tmp_path, workers=1, num_slots=NUM_CHUNKS)

    # The first copy can begin after 1 s; then 8 copies of 2 s, one after the other. Not 8 * 1 + 8 * 2 = 24.
    assert report.wall_s == 17
    # Until 4 one chunk is read and one waits, at most, beside the one that is copied, as it may be where the disk is
    # waited for: 4 s for the disk. From then on more of them wait, or everything is read: 13 s for the copies.
    assert report.phases == {"preflight": 0, "disk": 4, "copy": 13, "bind": 0, "other": 0}
    # Reads are busy in [0, 8], copies in [1, 17]: both in [1, 8]. 7 s of the reads' 8.
    assert report.overlap == 7 / 8


async def test_copy_bound_load_with_two_slots_reads_only_as_slots_come_back(make_rig: MakeRig, tmp_path: Path) -> None:
    """As above, with two slots: chunk k + 2 is read when copy k ends, in [2k + 3, 2k + 4]."""
    rig = make_rig(read_bytes_per_s=ONE_SECOND, copy_bytes_per_s=TWO_SECONDS)

    report = await load(rig, tmp_path, workers=1, num_slots=2)

    # Back-pressure costs nothing: chunk k + 2 is filled a second before copy k + 1 ends.
    assert report.wall_s == 17
    # Two seconds as above; then, of the two seconds of each copy, the first is spent reading the chunk that comes
    # after the next (6 times: no filled slot, so the disk's), in the second that chunk waits. 2 + 6 and 17 - 8.
    assert report.phases == {"preflight": 0, "disk": 8, "copy": 9, "bind": 0, "other": 0}
    # All reads but the first run beside a copy.
    assert report.overlap == 7 / 8


@several_slots
async def test_balanced_load_takes_one_stage_and_one_chunk(make_rig: MakeRig, tmp_path: Path, num_slots: int) -> None:
    """A chunk is read in 1 s and copied in 1 s: copy k runs in [k + 1, k + 2], exactly beside read k + 1."""
    rig = make_rig(read_bytes_per_s=ONE_SECOND, copy_bytes_per_s=ONE_SECOND)

    report = await load(rig, tmp_path, workers=1, num_slots=num_slots)

    # 8 reads and the last copy (or the first read and 8 copies). Not 16.
    assert report.wall_s == 9
    # A read is always in progress until 8, and nothing waits; then there is the last copy.
    assert report.phases == {"preflight": 0, "disk": 8, "copy": 1, "bind": 0, "other": 0}
    assert report.overlap == 7 / 8


async def test_reads_into_place_need_no_copies(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("host", read_bytes_per_s=TWO_SECONDS)
    report = await load(rig, tmp_path, workers=1, num_slots=2)
    assert report.wall_s == 16
    assert report.phases == {"preflight": 0, "disk": 16, "copy": 0, "bind": 0, "other": 0}
    assert (report.overlap, report.num_copies) == (0.0, 0)


async def test_two_loads_share_one_disk(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(read_bytes_per_s=ONE_SECOND, copy_bytes_per_s=8 * ONE_SECOND)
    _, path = checkpoint_of_chunks(tmp_path)
    async with rig.loader(chunk=CHUNK, workers=1, num_slots=4) as loader:
        reports = await asyncio.gather(*(loader.load(Layers(), path) for _ in range(2)))
    # 16 reads of 1 s and the last copy, of 1/8 s; whichever load read last has all of it.
    assert max(report.wall_s for report in reports) == 16.125


async def test_blocked_event_loop_does_not_slow_the_load(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig()
    tensors, path = checkpoint_of_chunks(tmp_path)
    model = Layers()
    gate = rig.disk.stop_at(0)
    num_ticks = 0

    async def tick() -> None:
        nonlocal num_ticks
        while True:
            num_ticks += 1
            await asyncio.sleep(0)

    async with rig.loader(chunk=CHUNK, num_slots=2) as loader:
        handle = await loader.start(model, path)
        ticker = asyncio.create_task(tick())
        await asyncio.sleep(0)

        # From here on this thread, which is the loop's, does nothing but wait.
        ticks_before = num_ticks
        gate.open()
        assert rig.disk.closed.wait(30)
        assert num_ticks == ticks_before
        for name, tensor in model.state_dict().items():
            assert_same(tensor, tensors[name])

        ticker.cancel()
        await handle.wait()
