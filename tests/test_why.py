"""Why a load took so long: what each realistic load is told about its bound, and about what to change."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.builders import write_in_order, write_sums
from tests.cli.test_summary import REPORT
from tests.fakes.accelerator import FakeAccelerator
from tests.fakes.filesystem import Behaviour, mounted
from tests.fakes.fixtures import make_rig, requires_fuse
from tests.fakes.rig import KIB, Rig
from tests.models import SmallNet, tensors_of
from weightstream import LoaderConfig, load_sync
from weightstream.api import Loader
from weightstream.prefetch.ring import Ring, Segment
from weightstream.scheduler.clock import SystemClock
from weightstream.scheduler.machine import Machine
from weightstream.scheduler.report import LoadReport
from weightstream.why import Bound, explain, find_bound

__all__ = ["make_rig"]

MakeRig = Callable[..., Rig]

CHUNK = 64 * KIB
NUM_CHUNKS = 24
#: A chunk takes so long.
ONE_SECOND, FOUR_SECONDS = CHUNK, CHUNK // 4
CORES = 4


class Layers(nn.Module):
    """One tensor for each chunk."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.layers = nn.ParameterList(
            nn.Parameter(torch.empty(CHUNK // 4, device=device), requires_grad=False) for _ in range(NUM_CHUNKS)
        )


def written(folder: Path, *, num_shards: int = 1) -> Path:
    return write_in_order(
        folder, {f"layers.{i}": torch.rand(CHUNK // 4) for i in range(NUM_CHUNKS)}, num_shards=num_shards
    )


async def loaded(rig: Rig, folder: Path, model: nn.Module | None = None, **settings: Any) -> LoadReport:
    async with rig.loader(chunk=CHUNK, **settings) as loader:
        return await loader.load(model or Layers(), written(folder))


def settings(**sections: object) -> LoaderConfig:
    return LoaderConfig.model_validate({"device": {"target": "cpu"}, **sections})


def load_small(folder: Path, *, num_shards: int = 1, **sections: Any) -> LoadReport:
    """A real load, in real time."""
    path = write_in_order(folder, tensors_of(SmallNet()), num_shards=num_shards)
    if "prefetch" in sections:
        write_sums(folder)
    with torch.device("meta"):
        model = SmallNet()
    return load_sync(model, path, config=settings(**sections))


def phases(**seconds: float) -> dict[str, float]:
    return {**dict.fromkeys(["preflight", "disk", "copy", "bind", "other"], 0.0), **seconds}


def waiting(report: LoadReport, **seconds: float) -> LoadReport:
    """The report of a real load, with the times of a load that waits for something: they differ from run to run."""
    return dataclasses.replace(report, phases=phases(**seconds))


# Reading


async def test_cold_disk(make_rig: MakeRig, tmp_path: Path) -> None:
    report = await loaded(make_rig("host", io="direct", read_bytes_per_s=ONE_SECOND), tmp_path)
    assert explain(report) == (
        "It waited for reading most, 100% of the time: what was not in the page cache came from storage (direct, 2 workers,"
        " reads of 0.0625 MiB); `weightstream bench --cold` measures what the storage can do, and with which settings, and after"
        " `weightstream warm --to page-cache`, where memory has room for the files, a load need not wait for it."
    )


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("host", "everything was in the page cache, so this is memory's speed, and that of the kernel that finds new"),
        ("fake", "everything was in the page cache, so this is memory's speed; more cores, or faster memory"),
    ],
)
async def test_warm_cache(make_rig: MakeRig, tmp_path: Path, device: str, said: str) -> None:
    rig = make_rig(device, read_bytes_per_s=ONE_SECOND)
    rig.disk.is_cached = True
    report = await loaded(rig, tmp_path, strategy="stream")
    if device == "fake":
        report = dataclasses.replace(report, device="cuda:0")
    text = explain(report)
    assert said in text
    assert "bench" not in text, "storage is not to blame"
    assert ("`strategy: map`" in text) == (device == "host")


@pytest.mark.parametrize(
    ("cached_s", "storage_s", "said"),
    [
        (
            3.0,
            1.0,
            "3 of 4 chunks were in the page cache, and readers spent 75% of their time on these, so this is memory's",
        ),
        (1.0, 3.0, "what was not in the page cache came from storage"),
        (0.0, 0.0, "what was not in the page cache came from storage"),
    ],
)
def test_what_was_in_the_page_cache_in_part_goes_by_the_time_that_each_took(
    cached_s: float, storage_s: float, said: str
) -> None:
    had = ("page cache: 3 of 4 chunks are in it and are read from there",)
    report = dataclasses.replace(REPORT, decisions=had, cached_read_s=cached_s, storage_read_s=storage_s)
    assert said in explain(dataclasses.replace(report, phases=phases(disk=1.0)))


async def test_times_of_reads_are_those_of_where_they_came_from(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("host", read_bytes_per_s=ONE_SECOND)
    cold = await loaded(rig, tmp_path, strategy="stream", workers=1)
    rig.disk.is_cached = True
    warm = await loaded(rig, tmp_path, strategy="stream", workers=1)
    assert (cold.cached_read_s, cold.storage_read_s) == (0, NUM_CHUNKS)
    assert (warm.cached_read_s, warm.storage_read_s) == (NUM_CHUNKS, 0)
    assert cold.storage_cpu_s > 0 == warm.storage_cpu_s


@pytest.mark.parametrize(
    ("cpu_s", "num_cores", "is_memory"), [(11, 2, True), (9, 2, False), (30, 64, False), (45, 64, True)]
)
def test_cold_reads_that_keep_the_cores_busy_are_bound_by_memory(
    cpu_s: float, num_cores: int, *, is_memory: bool
) -> None:
    """In ten seconds, by eight readers: two cores have 20 s of processor time, and 64 have 80 that readers can use."""
    read = ("read in the end: buffered, 8 workers, reads of 4 MiB",)
    report = dataclasses.replace(REPORT, decisions=read, storage_read_s=70.0, storage_cpu_s=cpu_s)
    text = explain(dataclasses.replace(report, phases=phases(disk=10.0)), num_cores=num_cores)
    assert ("this is memory's speed, and not the storage's" in text) == is_memory
    assert ("bench --cold" in text) != is_memory


def test_page_cache_that_is_not_known_is_said_to_be_so() -> None:
    unknown = ("what is in the page cache is unknown, because the files belong to somebody else",)
    text = explain(dataclasses.replace(REPORT, fallbacks=unknown, phases=phases(disk=1.0)))
    assert "how much the page cache had is not known here; what was not" in text


async def test_readers_that_never_idle(make_rig: MakeRig, tmp_path: Path) -> None:
    """Four reads of 4 s end at once, and are copied in 3.5 s: most of the time some wait, and yet reads are the bound."""
    rig = make_rig(latency_s=4.0, copy_bytes_per_s=CHUNK / 0.875)
    report = await loaded(rig, tmp_path, workers=4, num_slots=16)
    assert report.wall_s == NUM_CHUNKS / 4 * 4 + 3.5
    assert find_bound(report.phases) == "disk"
    assert report.phases["disk"] == 24
    # One slot less than two for each reader: one of them waits for it after the first four reads, and never again.
    report = await loaded(make_rig(latency_s=4.0, copy_bytes_per_s=CHUNK / 0.875), tmp_path, workers=4, num_slots=7)
    assert find_bound(report.phases) == "disk"


async def test_readers_that_idle_for_want_of_a_slot(make_rig: MakeRig, tmp_path: Path) -> None:
    """Of eight, two read: a slot comes back each second, with each copy, and a read takes two."""
    report = await loaded(make_rig(latency_s=2.0, copy_bytes_per_s=ONE_SECOND), tmp_path, workers=8, num_slots=4)
    assert report.wall_s == NUM_CHUNKS + 2
    assert find_bound(report.phases) == "copy"


async def test_page_cache_that_is_warmed(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("host", read_bytes_per_s=ONE_SECOND)
    path = written(tmp_path)
    async with rig.loader(chunk=CHUNK) as loader:
        cold = await (await loader.start_warm(path)).wait()
        rig.disk.is_cached = True
        warm = await (await loader.start_warm(path)).wait()
    assert "the next load finds it there." in explain(cold)
    assert "there was little to warm" in explain(warm)


@requires_fuse
def test_network_file_system(tmp_path: Path) -> None:
    written(tmp_path)
    with mounted(tmp_path, Behaviour(is_cached=False)) as mount:
        report = load_sync(Layers(), mount.path, config=settings())
    text = explain(waiting(report, disk=9.0))
    assert "over a network (fuse" in text
    assert "a copy on a disk of this machine would be nearer" in text


async def test_small_host_memory(make_rig: MakeRig, tmp_path: Path) -> None:
    """Each read waits for the disk alone, so more of them at a time would be faster."""
    few = await loaded(make_rig(latency_s=1.0), tmp_path / "few", workers=8, num_slots=3)
    many = await loaded(make_rig(latency_s=1.0), tmp_path / "many", workers=8)
    assert many.wall_s < few.wall_s / 2
    assert "there was room for 3 chunks at a time, and 8 reads wanted some; raise prefetch.host_memory" in explain(few)
    assert "host_memory" not in explain(many)


async def test_direct_and_preload_read_and_copy_in_turn(make_rig: MakeRig, tmp_path: Path) -> None:
    for strategy, said in [
        ("direct", "`direct` has room for one chunk"),
        ("preload", "`preload` copies nothing before"),
    ]:
        rig = make_rig(read_bytes_per_s=ONE_SECOND, copy_bytes_per_s=2 * ONE_SECOND)
        report = await loaded(rig, tmp_path / strategy, strategy=strategy)
        assert find_bound(report.phases) == "disk"
        assert said in explain(report)
        assert "with `strategy: stream` both go on at once" in explain(report).replace(
            "and `strategy", "with `strategy"
        )


def test_direct_reads_that_are_refused() -> None:
    text = explain(dataclasses.replace(REPORT, phases=phases(disk=1.0)))
    assert "this had a part in it: direct I/O refused by the file system: buffered reads used instead;" in text
    assert "reads failed and were repeated, 2 in all" in text


@pytest.mark.parametrize("where", ["disk", "copy", "bind"])
def test_not_knowing_the_page_cache_is_not_blamed(where: str) -> None:
    unknown = (
        "what is in the page cache is unknown, because the files belong to somebody else: found out by measuring",
    )
    assert "had a part" not in explain(dataclasses.replace(REPORT, fallbacks=unknown, phases=phases(**{where: 1.0})))


# Hashing


def test_hashing_with_one_core_one_shard_or_several(tmp_path: Path) -> None:
    one = load_small(tmp_path / "one", prefetch={"verify": "sha256"})
    assert one.hash_s > 0
    one = dataclasses.replace(one, num_bytes=3 * 10**9, hash_s=2.0, phases=phases(verify=2.0, disk=0.1))
    assert explain(one, num_cores=CORES).startswith(
        "It waited for hashing most, 95% of the time: a core hashes one shard at a time, from its first byte to its last, and"
        " does 1.5 GB/s here; there is one shard, and of a checkpoint with several, up to eight are hashed side by side;"
    )
    assert "there is one core, and with more, shards are hashed side by side" in explain(one, num_cores=1)
    several = dataclasses.replace(one, num_shards=4)
    assert "with more cores, more shards are hashed side by side, up to eight" in explain(several, num_cores=CORES)
    assert "`weightstream verify` does it once, before" in explain(several, num_cores=CORES)


# Copies


async def test_bus(make_rig: MakeRig, tmp_path: Path) -> None:
    report = await loaded(make_rig(read_bytes_per_s=ONE_SECOND, copy_bytes_per_s=FOUR_SECONDS), tmp_path)
    report = dataclasses.replace(report, device="cuda:0")
    text = explain(report)
    assert text.startswith("It waited for copies most, ")
    assert text.endswith("only fewer bytes, or another bus, would be faster.")


async def test_pageable_memory(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(
        read_bytes_per_s=ONE_SECOND,
        copy_bytes_per_s=FOUR_SECONDS,
        accelerator=lambda clock, **speed: FakeAccelerator(clock, refuses_pinning=True, **speed),
    )
    text = explain(dataclasses.replace(await loaded(rig, tmp_path), device="cuda:0"))
    assert "not page-locked, which is slower; raise the limit for that (ulimit -l" in text
    assert "this had a part in it: page-locking host memory was refused" in text


def test_page_locking_that_takes_long(tmp_path: Path) -> None:
    """It is done when the load's thread has waited for it: three seconds, on a clock that is set by hand."""

    class Hands(SystemClock):
        time_s = 0.0

        def now(self) -> float:
            return self.time_s

    clock, waited_for = Hands(), threading.Event()

    class Settled(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            clock.time_s += 3.0
            waited_for.set()
            return super().wait(timeout)

    class SlowRing(Ring):
        def grow(self, num_slots: int, *, numa_node: int | None = None) -> list[Segment]:
            segments = super().grow(num_slots, numa_node=numa_node)
            for segment in segments:
                segment.settled = Settled()
            return segments

    class Accelerator(FakeAccelerator):
        def pin(self, memory: Any) -> Callable[[], None] | None:
            assert waited_for.wait(20)
            return super().pin(memory)

    accelerator = Accelerator()
    machine = Machine(clock=clock, open_backend=lambda _: accelerator, ring=SlowRing)
    config = settings(strategy="stream", prefetch={"chunk": CHUNK})

    async def load() -> LoadReport:
        async with Loader(config, machine=machine) as loader:
            return await loader.load(Layers(), written(tmp_path))

    report = asyncio.run(load())
    accelerator.close()
    text = explain(dataclasses.replace(waiting(report, copy=4.0), device="cuda:0"))
    assert (
        "for 3.00 s of these they waited until memory was page-locked, which a `Loader` that is kept does once" in text
    )


async def test_copies_on_the_host_of_what_has_storage(make_rig: MakeRig, tmp_path: Path) -> None:
    report = await loaded(make_rig("host", read_bytes_per_s=ONE_SECOND), tmp_path, Layers("cpu"))
    assert report.num_copies == NUM_CHUNKS
    assert "comes from storage for parameters that have storage of their own" in explain(waiting(report, copy=1.0))


async def test_copies_by_readers_past_the_page_cache(make_rig: MakeRig, tmp_path: Path) -> None:
    report = await loaded(make_rig("host", io="direct", read_bytes_per_s=ONE_SECOND), tmp_path)
    assert "copied to its place by the readers, which took more of their time than" in explain(
        waiting(report, copy=1.0)
    )


def test_casts_on_the_host(tmp_path: Path) -> None:
    """They are what copies take their time with, and no way of reading changes that."""
    report = load_small(tmp_path, device={"target": "cpu", "dtype": "float64"})
    assert report.cast_bytes > 0.99 * report.num_bytes
    text = explain(waiting(report, copy=1.0))
    assert "100% of the bytes were cast to another dtype on the way (in the end it is float64, " in text
    assert "saved once in the dtype of the model" in text
    assert "prefetch.io" not in text
    few = dataclasses.replace(report, cast_bytes=report.num_bytes // 4)
    assert "cast" not in explain(waiting(few, copy=1.0))


# The consumer of a stream


@pytest.mark.parametrize("device", ["host", "fake"])
async def test_slow_consumer(make_rig: MakeRig, tmp_path: Path, device: str) -> None:
    """It takes ten seconds for each tensor; the disk does one in a second."""
    rig = make_rig(device, read_bytes_per_s=ONE_SECOND)
    path = written(tmp_path)
    async with rig.loader(chunk=CHUNK, host_memory=8 * (CHUNK + 8192)) as loader, loader.stream(path) as stream:
        async for _ in stream:
            rig.clock.wait_idle()
            rig.clock.spawn(lambda: rig.clock.sleep(10), "consumer").join()
        report = await stream.report()
    assert find_bound(report.phases) == "consumer"
    assert sum(report.phases.values()) == report.wall_s
    assert "for whoever takes the tensors most" in explain(report)
    assert "take the tensors faster" in explain(report)


async def test_fast_consumer_is_not_waited_for(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("host", read_bytes_per_s=ONE_SECOND)
    path = written(tmp_path)
    async with rig.loader(chunk=CHUNK) as loader, loader.stream(path) as stream:
        assert len([name async for name, _ in stream]) == NUM_CHUNKS
        report = await stream.report()
    assert report.phases == {**phases(disk=NUM_CHUNKS), "consumer": 0}


# Python


def test_tiny_load_of_which_starting_is_most(tmp_path: Path) -> None:
    report = waiting(load_small(tmp_path), preflight=0.004, disk=0.0004, bind=0.001, other=0.0003)
    assert explain(report).startswith(
        "It waited for work in Python most, 93% of the time: these 5 ms are what any load takes to start, to check files"
    )
    assert "nothing to gain" in explain(report)


@pytest.mark.parametrize("seconds", [{"other": 9.0, "disk": 1.0}, {"preflight": 1.0}, {"bind": 1.0}])
def test_nobody_takes_tensors_where_a_model_is_filled(seconds: dict[str, float], tmp_path: Path) -> None:
    report = waiting(load_small(tmp_path), **seconds)
    assert find_bound(report.phases) == "python"
    assert "whoever" not in explain(report)


def test_many_small_tensors() -> None:
    report = dataclasses.replace(REPORT, phases=phases(preflight=0.2, bind=0.1, disk=0.05), num_tensors=46_000)
    assert "it checks and places 46,000 tensors, 7 µs each" in explain(report)
    assert "only fewer and larger tensors would" in explain(report)


def test_files_that_answer_slowly() -> None:
    report = dataclasses.replace(REPORT, phases=phases(preflight=9.0, disk=1.0), num_tensors=300, num_shards=50)
    assert "long for 300 tensors; files were opened and their headers read, 50 in all" in explain(report)


def test_modules_that_load_themselves(tmp_path: Path) -> None:
    path = write_in_order(tmp_path, {name: torch.rand(4) for name in ("weight", "bias", "running_mean", "running_var")})
    with torch.device("meta"):
        model = nn.BatchNorm1d(4)
    report = load_sync(model, path, config=settings(device={"target": "cpu", "strict": False}))
    text = explain(waiting(report, bind=3.0))
    assert "modules that load themselves copy comes after the last byte" in text
    assert "this had a part in it: 1 modules were loaded through hooks of their own" in text


def test_mapped_files_are_still_to_be_read(tmp_path: Path) -> None:
    report = waiting(load_small(tmp_path, strategy="map"), preflight=0.004)
    assert explain(report).endswith("what was not in the page cache is still to come, when it is used.")


# The sentence


@pytest.mark.parametrize(
    ("spent", "bound", "said"),
    [
        (phases(disk=9.0, bind=1.0), "disk", "It waited for reading most, 90% of the time: what was not"),
        (phases(copy=6.0, disk=4.0), "copy", "for copies most, 60% of the time (40% for reading): only fewer bytes"),
        ({**phases(disk=3.0), "consumer": 7.0}, "consumer", "for whoever takes the tensors most, 70% of the time"),
        (phases(preflight=3.0, bind=3.0, disk=4.0), "python", "for work in Python most, 60% of the time"),
        (phases(verify=9.0, disk=1.0), "verify", "for hashing most, 90% of the time: a core hashes"),
    ],
    ids=["disk", "copy", "consumer", "python", "verify"],
)
def test_sentence_names_what_was_waited_for(spent: dict[str, float], bound: Bound, said: str) -> None:
    assert find_bound(spent) == bound
    assert said in explain(dataclasses.replace(REPORT, phases=spent, fallbacks=()))


def test_downgrades_that_do_not_concern_it_are_not_named() -> None:
    assert "had a part" not in explain(dataclasses.replace(REPORT, phases=phases(bind=1.0)))


def test_who_has_measured_says_it_better() -> None:
    report = dataclasses.replace(REPORT, phases=phases(disk=1.0), fallbacks=(), num_retries=0)
    assert explain(report, reading="buy a disk") == "It waited for reading most, 100% of the time: buy a disk."


def test_load_that_took_no_time_is_explained_too() -> None:
    assert explain(dataclasses.replace(REPORT, phases=phases(), fallbacks=())).startswith(
        "It waited for reading most, 0%"
    )
