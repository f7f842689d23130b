"""`weightstream bench`: what this machine can do at best, what a load reaches, and where its time goes.

Every round measures each thing once, one after the other, so that what changes in between hits all of them. The model is
made from the checkpoint, on meta, and new for each load. Importing this does not import torch.
"""

from __future__ import annotations

import errno
import functools
import gc
import importlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from weightstream import pagecache
from weightstream.config import LoaderConfig
from weightstream.display import Display, format_bytes
from weightstream.drawing import save_timeline
from weightstream.errors import MemoryBudgetError
from weightstream.prefetch.checkpoint import open_checkpoint
from weightstream.prefetch.memory import PAGE_BYTES, allocate, available_bytes, usable_cores
from weightstream.summary import print_facts, print_title
from weightstream.verdict import Findings, Kind, Row, Sample
from weightstream.warm import in_thread, reading

if TYPE_CHECKING:
    import torch
    from torch import nn

    from weightstream.prefetch.header import TensorSpec
    from weightstream.scheduler.timeline import Recorder

__all__ = ["Subject", "bench", "print_plan", "touch"]

#: Raw reads use up to this many threads; the loader's own choice ends there too.
_MOST_THREADS = 8
#: So much of a file may be left in the page cache for a read of it to count as cold.
_COLD_SHARE = 0.01
_WARM_SHARE = 0.99


@dataclass(frozen=True)
class Subject:
    """What is measured. `is_cold`: also with an empty page cache. Sizes are of the tensors, as stored."""

    config: LoaderConfig
    checkpoint: Path
    paths: tuple[Path, ...]
    specs: tuple[TensorSpec, ...]
    device: torch.device
    num_runs: int
    is_cold: bool

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)

    @property
    def needed_bytes(self) -> int:
        """Host memory that this takes: once for the page cache, once for what is read or loaded."""
        return 2 * sum(path.stat().st_size for path in self.paths)

    @property
    def thread_counts(self) -> list[int]:
        return sorted({1, 2, min(_MOST_THREADS, usable_cores())})


@dataclass(frozen=True)
class _Arm:
    """One thing that every round measures."""

    kind: Kind
    num_threads: int | None
    measure: Callable[[], Awaitable[Sample]]
    samples: list[Sample] = field(default_factory=list[Sample])

    @property
    def row(self) -> Row:
        return Row(self.kind, self.num_threads, tuple(self.samples))


async def bench(
    config: LoaderConfig,
    display: Display,
    *,
    num_runs: int,
    is_cold: bool,
    timeline: Path | None,
    on_plan: Callable[[Subject], None],
    on_findings: Callable[[Findings], None],
) -> None:
    """Measure the ceilings and the loads of a checkpoint.

    Args:
        config: names the checkpoint and the device.
        display: shows progress.
        num_runs: how often each thing is measured.
        is_cold: also measure with the page cache emptied of the checkpoint's files.
        timeline: a file for what happened when in one more load, of filled page cache. None: there is none.
        on_plan: told what will be done, before it is.
        on_findings: told the result.

    Raises:
        MemoryBudgetError: there is not memory enough.
        ConfigurationError: there is no such device.
        PlacementError: no torch module can have these tensors.
        WeightstreamError: the checkpoint cannot be loaded.
        OSError: it cannot be read.
    """
    with display.step("importing torch"):
        for module in ("weightstream.api", "weightstream.building", "weightstream.ceilings"):
            await in_thread(importlib.import_module, module)
    with display.step("checking the checkpoint"):
        subject = await in_thread(functools.partial(_examine, config, num_runs=num_runs, is_cold=is_cold))
    await in_thread(on_plan, subject)
    notes: list[str] = []
    arms = _arms(subject)
    with display.step("a first read and a first load, which do not count"):
        await in_thread(_fill_page_cache, subject, notes)
        await _load(subject)
    for run in range(1, num_runs + 1):
        await _round(subject, arms, display, f"run {run} of {num_runs}", notes)
    found = Findings(
        checkpoint=str(subject.checkpoint),
        num_bytes=subject.num_bytes,
        num_tensors=len(subject.specs),
        num_shards=len(subject.paths),
        device=str(subject.device),
        io=config.prefetch.io,
        workers=config.prefetch.workers,
        rows=tuple(arm.row for arm in arms if arm.samples),
        notes=tuple(dict.fromkeys(notes)),
    )
    if timeline is not None:
        with display.step(f"one more load, for {timeline}"):
            await _record(subject, timeline)
    await in_thread(on_findings, found)


def _examine(config: LoaderConfig, *, num_runs: int, is_cold: bool) -> Subject:
    """Check checkpoint, device and memory."""
    import torch  # noqa: PLC0415 - see the module

    from weightstream.building import target_device  # noqa: PLC0415

    assert config.checkpoint is not None
    with open_checkpoint(
        config.checkpoint,
        variant=config.prefetch.variant,
        allow_outside_links=config.prefetch.allow_outside_links,
    ) as checkpoint:
        paths = tuple(shard.path for shard in checkpoint.shards)
        specs = tuple(checkpoint.tensors.values())
    device = target_device(config.device.target)
    torch.empty(1, device=device)  # starts the driver, which is no part of loading
    subject = Subject(reading(config), checkpoint.path, paths, specs, device, num_runs, is_cold)
    available = available_bytes()
    if subject.needed_bytes > available:
        raise MemoryBudgetError(
            "too little memory to measure with: the page cache and what is read from it must both fit",
            file=checkpoint.path,
            expected=f"{format_bytes(subject.needed_bytes)} free",
            actual=format_bytes(available),
            hint="Free some, or measure one shard of it: each .safetensors file is a checkpoint too",
        )
    return subject


def _arms(subject: Subject) -> list[_Arm]:
    """List what a round measures, in order: first what empties the page cache, then what needs it filled."""
    cold: list[Kind] = ["read cold"] if subject.is_cold else []
    reads: list[Kind] = [*cold, "read direct", "read cached"]
    arms = [
        _Arm(kind, count, functools.partial(_read, subject, count, direct=kind == "read direct"))
        for kind in reads
        for count in subject.thread_counts
    ]
    if subject.device.type != "cpu":
        arms.append(_Arm("copy", None, functools.partial(_copy, subject)))
    if subject.is_cold:
        arms.append(_Arm("load cold", None, functools.partial(_load, subject)))
    arms.append(_Arm("load cached", None, functools.partial(_load, subject)))
    return arms


def print_plan(console: Console, subject: Subject) -> None:
    """Print what is going to be measured, and what it takes."""
    tensors = f"{len(subject.specs):,} tensors" if len(subject.specs) != 1 else "1 tensor"
    shards = f"{len(subject.paths)} shards" if len(subject.paths) != 1 else "1 shard"
    *some, most = subject.thread_counts
    copies = [] if subject.device.type == "cpu" else ["raw copies to it from page-locked memory"]
    measured = [
        f"raw reads with {', '.join(map(str, some))} and {most} threads, through the page cache and past it (O_DIRECT)",
        *copies,
        "loads by weightstream into a model on meta that has just these tensors, new each time",
    ]
    times = "once" if subject.num_runs == 1 else f"{subject.num_runs} times in turn"
    cold = "; then also emptied of these files before each cold run" if subject.is_cold else "; --cold also empties it"
    print_title(console, f"Measuring {format_bytes(subject.num_bytes)}, {tensors} in {shards}, onto {subject.device}")
    print_facts(
        console,
        [
            ("checkpoint", str(subject.checkpoint)),
            ("measured", f"{times}: {'; '.join(measured)}"),
            ("page cache", f"filled by a first read, which does not count{cold}"),
            (
                "host memory",
                f"{format_bytes(subject.needed_bytes)} needed, {format_bytes(available_bytes())} available",
            ),
        ],
    )


async def _round(subject: Subject, arms: list[_Arm], display: Display, name: str, notes: list[str]) -> None:
    """Measure every arm once."""
    is_filled = True
    for arm in arms:
        with display.step(f"{name}: {arm.row.name}"):
            if arm.kind.endswith("cold"):
                is_filled = False
                if not await in_thread(_empty_page_cache, subject, notes):
                    continue
            elif arm.kind.endswith("cached") and not is_filled:
                await in_thread(_fill_page_cache, subject, notes)
                is_filled = True
            await in_thread(touch, subject.needed_bytes // 2)
            try:
                arm.samples.append(await arm.measure())
            except OSError as error:
                if arm.kind != "read direct" or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                notes.append("O_DIRECT was not measured: the file system refuses it")


def touch(num_bytes: int) -> None:
    """Write to so much fresh memory, and free it, so that the next measurement finds memory that the machine has.

    Without this, what ran before decides: on a virtual machine, pages that were never touched, or were free for a while,
    have to come from its host, and filling 2.5 GB was seen to take from 0.25 to 2.4 s.
    """
    with Path("/dev/zero").open("rb", buffering=0) as zeros:
        memory = memoryview(allocate(-(-num_bytes // PAGE_BYTES) * PAGE_BYTES))
        done = 0
        while done < len(memory):  # reads let the event loop's thread run, which answers Ctrl-C; memset would not
            done += zeros.readinto(memory[done:]) or 0


def _fill_page_cache(subject: Subject, notes: list[str]) -> None:
    from weightstream.ceilings import read_ceiling  # noqa: PLC0415

    read_ceiling(subject.paths, num_threads=subject.thread_counts[-1], direct=False)
    share = pagecache.resident_share(subject.paths)
    if share < _WARM_SHARE:
        notes.append(
            f"the page cache kept only {share:.0%} of the files: rows that say cached are partly from the disk"
        )


def _empty_page_cache(subject: Subject, notes: list[str]) -> bool:
    """Drop the files from the page cache; return whether they are gone."""
    pagecache.drop(subject.paths)
    share = pagecache.resident_share(subject.paths)
    if share > _COLD_SHARE:
        notes.append(
            f"cold reads were not measured: {share:.0%} of the files stayed in the page cache (others use them), or"
            " this user may not see whether they did (only their owner may)"
        )
    return share <= _COLD_SHARE


async def _read(subject: Subject, num_threads: int, *, direct: bool) -> Sample:
    from weightstream.ceilings import read_ceiling  # noqa: PLC0415

    gauge = _Gauge()
    found = await in_thread(functools.partial(read_ceiling, subject.paths, num_threads=num_threads, direct=direct))
    return Sample(found.num_bytes, found.wall_s, gauge.cpu_s, gauge.peak_bytes)


async def _copy(subject: Subject) -> Sample:
    from weightstream.ceilings import copy_ceiling  # noqa: PLC0415

    gauge = _Gauge()
    found = await in_thread(
        functools.partial(
            copy_ceiling, subject.device, num_bytes=subject.num_bytes, chunk_bytes=subject.config.prefetch.chunk
        )
    )
    return Sample(found.num_bytes, found.wall_s, gauge.cpu_s, gauge.peak_bytes)


async def _record(subject: Subject, timeline: Path) -> None:
    """Load once more, and save what happened when: what was measured before was not recorded."""
    from weightstream.scheduler.timeline import Recorder  # noqa: PLC0415

    recorder = Recorder()
    await in_thread(touch, subject.needed_bytes // 2)
    await _load(subject, recorder)
    await in_thread(save_timeline, recorder.timeline(), timeline)


async def _load(subject: Subject, recorder: Recorder | None = None) -> Sample:
    from weightstream.api import load  # noqa: PLC0415

    model = await in_thread(_prepare_load, subject)
    gauge = _Gauge()
    report = await load(model, subject.checkpoint, config=subject.config, recorder=recorder)
    return Sample(report.num_bytes, report.wall_s, gauge.cpu_s, gauge.peak_bytes, report)


def _prepare_load(subject: Subject) -> nn.Module:
    """Return a new model, and leave nothing of the last one: not to the collector, nor in torch's cache of memory."""
    import torch  # noqa: PLC0415

    from weightstream.building import model_for  # noqa: PLC0415

    if subject.device.type != "cpu":
        torch.get_device_module(subject.device).empty_cache()
    model = model_for(subject.specs)
    gc.collect()
    return model


class _Gauge:
    """CPU time and growth of this process since this was made."""

    def __init__(self) -> None:
        self._rss_bytes = self._reset_peak()
        self._begin_s = time.process_time()

    @property
    def cpu_s(self) -> float:
        return time.process_time() - self._begin_s

    @property
    def peak_bytes(self) -> int | None:
        return None if self._rss_bytes is None else max(0, _memory_bytes("VmHWM") - self._rss_bytes)

    @staticmethod
    def _reset_peak() -> int | None:
        """Set the peak to what is held now, and return that; None where the kernel does not let us."""
        try:
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
        except OSError:
            return None
        return _memory_bytes("VmRSS")


def _memory_bytes(line: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(found.split()[1]) * 1024 for found in lines if found.startswith(f"{line}:"))
