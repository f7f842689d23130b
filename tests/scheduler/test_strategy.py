"""What `auto` decides in which situation: the table in docs/strategies.md, row by row; and how a situation is found out.

`python -m tests.scheduler.test_strategy` prints the table.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import assert_same, write_in_order
from tests.fakes.rig import KIB, Rig
from tests.fakes.source import PacedSource
from weightstream.device.layout import padded
from weightstream.prefetch.filesystem import FileSystem
from weightstream.scheduler import staging, survey
from weightstream.scheduler.strategy import Situation, decide

MakeRig = Callable[..., Rig]

DOCUMENT = Path(__file__).parents[2] / "docs" / "strategies.md"
MIB, GIB = 2**20, 2**30
EXT4, NFS, TMPFS = FileSystem("local", "ext4"), FileSystem("network", "nfs"), FileSystem("memory", "tmpfs")

#: A model on meta, of 16 GiB, for an accelerator, from a cold local disk, on a host with 64 GiB free.
ACCELERATOR = Situation(
    device="cuda:0",
    is_host=False,
    num_bytes=16 * GIB,
    new_bytes=16 * GIB,
    in_place=False,
    can_stay=False,
    staged_bytes=16 * GIB,
    preload_bytes=16 * GIB,
    host_memory_bytes=GIB,
    left_bytes=GIB,
    beside_bytes=0,
    spared_bytes=0,
    held_bytes=0,
    chunk_bytes=16 * MIB,
    slot_bytes=16 * MIB + 8192,
    least_slots=2,
    num_slots=1024,
    free_host_bytes=64 * GIB,
    free_device_bytes=70 * GIB,
    num_ranks=1,
    file_system=EXT4,
    resident_share=None,
)
#: The same for the CPU.
CPU = dataclasses.replace(
    ACCELERATOR,
    device="cpu",
    is_host=True,
    can_stay=True,
    staged_bytes=0,
    preload_bytes=0,
    least_slots=0,
    num_slots=16,
    free_device_bytes=None,
    resident_share=0.0,
)
#: Weights that are there already: they are copied through slots, but for those on the CPU that are not cast.
FILL = {
    "in_place": True,
    "can_stay": False,
    "new_bytes": 0,
    "staged_bytes": 16 * GIB,
    "preload_bytes": 16 * GIB,
    "least_slots": 2,
    "num_slots": 1024,
}
LAND = FILL | {"staged_bytes": 0, "num_slots": 16}
CAST = {"can_stay": False, "staged_bytes": 16 * GIB, "least_slots": 2, "num_slots": 1024}
ROOMY = {"host_memory_bytes": 20 * GIB, "left_bytes": 20 * GIB}


class Row(NamedTuple):
    situation: str
    strategy: str
    values: Situation


def accelerator(**changes: Any) -> Situation:
    return dataclasses.replace(ACCELERATOR, **changes)


def cpu(**changes: Any) -> Situation:
    return dataclasses.replace(CPU, **changes)


ROWS = [
    Row("accelerator, model on meta", "stream", accelerator()),
    Row("accelerator, less free host memory than the ring may take", "stream", accelerator(free_host_bytes=GIB // 2)),
    Row("the same, but eight ranks share it", "stream", accelerator(free_host_bytes=GIB // 2, num_ranks=8)),
    Row("accelerator, no free host memory for two chunks", "direct", accelerator(free_host_bytes=31 * MIB)),
    Row("the same, but a `Loader` that has its ring", "stream", accelerator(free_host_bytes=31 * MIB, held_bytes=GIB)),
    Row(
        "accelerator, enough host memory for one rank but not for eight",
        "direct",
        accelerator(free_host_bytes=240 * MIB, num_ranks=8),
    ),
    Row(
        "accelerator, hardly more free device memory than weights",
        "direct",
        accelerator(free_device_bytes=16 * GIB + 31 * MIB),
    ),
    Row("accelerator, parameters in use, network file system", "stream", accelerator(**FILL, file_system=NFS)),
    Row(
        "the same, and `host_memory` allows for the whole checkpoint",
        "preload",
        accelerator(**FILL, **ROOMY, file_system=NFS),
    ),
    Row(
        "the same, but that is more than half of the free host memory",
        "stream",
        accelerator(**FILL, **ROOMY, file_system=NFS, free_host_bytes=31 * GIB),
    ),
    Row(
        "the same, but four ranks share the free host memory",
        "stream",
        accelerator(**FILL, **ROOMY, file_system=NFS, num_ranks=4, free_host_bytes=96 * GIB),
    ),
    Row(
        "accelerator, parameters in use, local file system, `host_memory` allows for all",
        "stream",
        accelerator(**FILL, **ROOMY),
    ),
    Row("CPU, model on meta, local files in the page cache", "map", cpu(resident_share=0.98)),
    Row("CPU, model on meta, local files not in the page cache", "stream", cpu()),
    Row("CPU, model on meta, page cache unknown (files of somebody else)", "stream", cpu(resident_share=None)),
    Row("CPU, model on meta, local files, more weights than free memory", "map", cpu(free_host_bytes=15 * GIB)),
    Row("CPU, model on meta, local files, more weights than a rank's share", "map", cpu(num_ranks=5)),
    Row("CPU, model on meta, files in memory (tmpfs)", "map", cpu(file_system=TMPFS, resident_share=None)),
    Row("CPU, model on meta, network file system", "stream", cpu(file_system=NFS, resident_share=None)),
    Row("CPU, parameters that have storage", "stream", cpu(**LAND)),
    Row("CPU, parameters that have storage and are cast", "stream", cpu(**FILL)),
    Row("the same, no free memory for two chunks", "direct", cpu(**FILL, free_host_bytes=36 * MIB)),
    Row(
        "CPU, model on meta, cast, 0.1 GiB more free than the weights take",
        "stream",
        cpu(**CAST, free_host_bytes=19 * GIB),
    ),
    Row("the same, hardly more free", "direct", cpu(**CAST, free_host_bytes=18 * GIB)),
    Row(
        "CPU, parameters that have storage, 2 GiB of them of modules that load themselves",
        "direct",
        cpu(**LAND, beside_bytes=2 * GIB, spared_bytes=2 * GIB - 64 * MIB),
    ),
    Row(
        "the same, but they are of one module, are cast, and 20 MiB less than `host_memory`",
        "direct",
        cpu(**FILL | {"staged_bytes": 15 * GIB}, beside_bytes=GIB - 20 * MIB),
    ),
    Row(
        "the same, but they are of many modules, and 0.5 GiB",
        "stream",
        cpu(**FILL | {"staged_bytes": 15 * GIB}, beside_bytes=GIB // 2, spared_bytes=GIB // 2 - 64 * MIB),
    ),
    Row(
        "CPU, parameters in use, network file system, `host_memory` allows for all",
        "preload",
        cpu(**LAND, **ROOMY, file_system=NFS, resident_share=None),
    ),
]


def table() -> str:
    """The table in the document."""
    lines = ["| situation | strategy | because |", "| --- | --- | --- |"]
    for row in ROWS:
        why = re.sub(r"^auto: (.*?) \(.*", r"\1", decide(row.values).reason)
        lines.append(f"| {row.situation} | `{row.strategy}` | {why} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("row", [pytest.param(row, id=row.situation) for row in ROWS])
def test_row_of_the_table(row: Row) -> None:
    decision = decide(row.values)
    assert decision.strategy == row.strategy
    assert f"| {row.situation} | `{row.strategy}` |" in DOCUMENT.read_text()


def test_document_has_the_table_as_it_is_and_no_row_more() -> None:
    assert f"\n\n{table()}\n" in DOCUMENT.read_text(), "python -m tests.scheduler.test_strategy prints it"


def test_rows_are_different_situations() -> None:
    assert len({row.values for row in ROWS}) == len(ROWS)


def test_reason_has_the_numbers_it_was_decided_on() -> None:
    assert decide(accelerator(num_ranks=2)).reason == (
        "auto: reading and copying overlap, through a ring of at most 1.06 GB (17.18 GB for cuda:0, on ext4, local;"
        " 68.72 GB of host memory free for 2 ranks, 75.16 GB free on cuda:0)"
    )
    assert decide(cpu(resident_share=0.98)).reason == (
        "auto: the page cache has the files, and parameters can be views of them without a copy"
        " (17.18 GB for cpu, on ext4, local, 98% in the page cache; 68.72 GB of host memory free)"
    )


def test_auto_never_takes_more_than_is_free() -> None:
    """Whatever is free: what is staged, and new weights in host memory that cannot stay in their files, fit."""
    for row, beside in itertools.product(ROWS, (0, GIB // 2, 8 * GIB)):
        for free in (0, 64 * MIB, GIB, 16 * GIB, 40 * GIB):
            s = dataclasses.replace(row.values, free_host_bytes=free, beside_bytes=row.values.beside_bytes + beside)
            strategy = decide(s).strategy
            if strategy == "stream":
                assert s.ring_bytes - s.held_bytes <= s.room_bytes or not s.staged_bytes
                assert s.ring_bytes + s.beside_bytes <= s.left_bytes or not s.staged_bytes
            if strategy == "preload":
                assert s.preload_bytes <= s.room_bytes // 2
                assert s.preload_bytes + s.beside_bytes <= s.left_bytes


# How it is found out


@pytest.fixture(name="tensors")
def fixture_tensors() -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.randint(256, (40_000 + i,), dtype=torch.uint8) for i in range(8)}


@pytest.fixture(name="path")
def fixture_path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return write_in_order(tmp_path / "c", tensors, num_shards=2)


def model_for(tensors: dict[str, torch.Tensor], device: str = "meta") -> nn.Module:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, torch.zeros_like(tensor, device=device))
    return model


def set_up(monkeypatch: pytest.MonkeyPatch, *, system: FileSystem = EXT4, free: int = 2**40, ranks: int = 1) -> None:
    """Put a load into another situation than that of the machine that runs the test."""
    monkeypatch.setattr(survey, "file_system_of", lambda _: system)
    for module in (survey, staging):
        monkeypatch.setattr(module, "available_bytes", lambda: free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))


async def load(rig: Rig, path: Path, tensors: dict[str, torch.Tensor], device: str = "meta", **options: Any) -> Any:
    model = model_for(tensors, device)
    async with rig.loader(**options) as loader:
        report = await loader.load(model, path)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])
    return report


def cpu_config(**sections: Any) -> ws.LoaderConfig:
    return ws.LoaderConfig(**{"device": {"target": "cpu"}, **sections})


async def test_file_system_that_does_not_say_what_it_is_is_read_from(
    make_rig: Callable[..., Rig], path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> FileSystem:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    set_up(monkeypatch)
    monkeypatch.setattr(survey, "file_system_of", refuse)
    report = await load(make_rig("host"), path, tensors)
    assert report.strategy == "stream"
    assert "a file system that does not say what it is (Stale file handle)" in report.reason


def test_files_in_the_page_cache_are_mapped(
    monkeypatch: pytest.MonkeyPatch, path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    set_up(monkeypatch)
    report = ws.load_sync(model_for(tensors), path, config=cpu_config())
    assert report.strategy == "map"
    assert "0.3 MB for cpu, on ext4, local, 100% in the page cache" in report.reason


@pytest.mark.parametrize("prefetch", [{"page_cache": "drop"}, {"io": "direct"}], ids=["drop", "direct"])
def test_page_cache_that_shall_not_be_used_is_not_mapped(
    monkeypatch: pytest.MonkeyPatch, path: Path, tensors: dict[str, torch.Tensor], prefetch: dict[str, str]
) -> None:
    set_up(monkeypatch)
    assert ws.load_sync(model_for(tensors), path, config=cpu_config(prefetch=prefetch)).strategy == "stream"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({}, "stream", id="cold"),
        pytest.param({"system": TMPFS}, "map", id="memory"),
        pytest.param({"system": NFS}, "stream", id="network"),
        pytest.param({"free": 640_000, "ranks": 3}, "map", id="too large for a rank's share"),
    ],
)
async def test_host(
    make_rig: MakeRig,
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    tensors: dict[str, torch.Tensor],
    change: dict[str, Any],
    expected: str,
) -> None:
    set_up(monkeypatch, **change)
    assert (await load(make_rig("host"), path, tensors)).strategy == expected


@pytest.mark.parametrize(
    ("device", "change", "options", "expected"),
    [
        pytest.param("meta", {}, {}, "stream", id="meta"),
        pytest.param("meta", {"free": 100_000}, {"host_memory": 10 * MIB}, "direct", id="little memory"),
        pytest.param("meta", {"free": 400_000, "ranks": 4}, {"host_memory": 10 * MIB}, "direct", id="many ranks"),
        pytest.param("meta", {"free": 400_000}, {"host_memory": 10 * MIB}, "stream", id="one rank of as much"),
        pytest.param("cpu", {"system": NFS}, {}, "preload", id="in place from the network"),
        pytest.param("cpu", {"system": NFS}, {"host_memory": 325_000}, "stream", id="in place, just not enough slots"),
        pytest.param("cpu", {}, {}, "stream", id="in place from a disk"),
    ],
)
async def test_accelerator(
    make_rig: MakeRig,
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    tensors: dict[str, torch.Tensor],
    device: str,
    change: dict[str, Any],
    options: dict[str, Any],
    expected: str,
) -> None:
    """320,028 bytes, which eight slots of whole pages hold: 327,680 bytes."""
    set_up(monkeypatch, **change)
    report = await load(make_rig("fake"), path, tensors, device, **options)
    assert report.strategy == expected
    assert report.reason.startswith("auto: ")


@pytest.mark.parametrize("in_use", [0, 4, 8], ids=["meta", "half in use", "in use"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["", "cast"])
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["cold", "warm"])
@pytest.mark.parametrize("extra", [20 * KIB, 70 * KIB, 150 * KIB, 400 * KIB])
async def test_host_memory_that_is_free_is_enough_or_the_load_is_refused(
    make_rig: MakeRig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    in_use: int,
    dtype: torch.dtype,
    share: float,
    extra: int,
) -> None:
    """Slots come on top of what the weights themselves take; and where `direct` can do with what there is, so can `auto`."""
    tensors = {f"t{i}": torch.rand(10_000) for i in range(8)}
    path = write_in_order(tmp_path / "c", tensors, num_shards=2)
    monkeypatch.setattr(PacedSource, "resident_shares", lambda self, wanted: [share] * len(wanted))
    weights = sum(padded(10_000 * dtype.itemsize) for i in range(in_use, 8))
    free = weights + extra
    set_up(monkeypatch, free=free)
    peaks: dict[str, int | None] = {}
    for strategy in ("auto", "direct"):
        model = nn.Module()
        for i in range(8):
            model.register_buffer(f"t{i}", torch.zeros(10_000, dtype=dtype, device="cpu" if i < in_use else "meta"))
        async with make_rig("host").loader(strategy=strategy, chunk=64 * KIB) as loader:
            try:
                peaks[strategy] = (await loader.load(model, path)).host_peak_bytes
            except ws.MemoryBudgetError:
                peaks[strategy] = None
            else:
                assert all(torch.equal(getattr(model, name), tensor.to(dtype)) for name, tensor in tensors.items())
    peak = peaks["auto"]
    if peak is None:
        assert peaks["direct"] is None
    else:
        assert peak <= free


async def test_several_devices_are_decided_on_with_numbers(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    """One ring feeds both, which is of no use where it has no room for two chunks."""
    device_map = {"": "cpu:1", "t0": "cpu:2"}
    reports = []
    for free in (2**40, 100_000):
        set_up(monkeypatch, free=free)
        rig = make_rig("host", several=["cpu:1", "cpu:2"])
        reports.append(await load(rig, path, tensors, "meta", host_memory=10 * MIB, device_map=device_map))
    assert [report.strategy for report in reports] == ["stream", "direct"]
    assert all(report.reason.startswith("auto: ") and " free" in report.reason for report in reports)


async def test_consumer_is_given_nothing_mapped(
    monkeypatch: pytest.MonkeyPatch, path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    set_up(monkeypatch)
    async with ws.Loader(cpu_config()) as loader, loader.stream(path) as stream:
        async for name, tensor in stream:
            assert_same(tensor, tensors[name])
        assert (await stream.report()).strategy == "stream"


async def test_consumer_on_a_host_with_little_memory_gets_tensor_by_tensor(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    set_up(monkeypatch, free=100_000)
    async with make_rig("fake").loader(chunk=64 * KIB) as loader, loader.stream(path) as stream:
        async for _ in stream:
            pass
        assert (await stream.report()).strategy == "direct"


if __name__ == "__main__":
    print(table())  # noqa: T201
