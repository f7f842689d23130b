"""`weightstream bench`: what this machine can do at best, what a load reaches, and where its time goes.

Every round measures each thing once, one after the other, so that what changes in between hits all of them. The model is
made from the checkpoint, on meta, and new for each load: one measurement is in `samples`. Importing this does not import
torch.
"""

from __future__ import annotations

import errno
import functools
import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from weightstream.config import LoaderConfig
from weightstream.display import Display, format_bytes
from weightstream.errors import MemoryBudgetError, ReadError
from weightstream.outputs import Kind, Sample
from weightstream.prefetch.memory import available_bytes
from weightstream.samples import (
    Subject,
    empty_page_cache,
    fill_page_cache,
    record,
    sample_copy,
    sample_load,
    sample_read,
    touch,
)
from weightstream.scheduler.looking import look
from weightstream.summary import print_facts, print_title
from weightstream.verdict import Findings, Row
from weightstream.warm import in_thread, reading

__all__ = ["bench", "print_plan"]


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
        await in_thread(fill_page_cache, subject, notes)
        await sample_load(subject)
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
            await record(subject, timeline)
    await in_thread(on_findings, found)


def _examine(config: LoaderConfig, *, num_runs: int, is_cold: bool) -> Subject:
    """Check checkpoint, device and memory."""
    import torch  # noqa: PLC0415 - see the module

    from weightstream.building import target_device  # noqa: PLC0415

    assert config.checkpoint is not None
    checkpoint = look(config)
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
        _Arm(kind, count, functools.partial(sample_read, subject, count, direct=kind == "read direct"))
        for kind in reads
        for count in subject.thread_counts
    ]
    if subject.device.type != "cpu":
        arms.append(_Arm("copy", None, functools.partial(sample_copy, subject)))
    if subject.is_cold:
        arms.append(_Arm("load cold", None, functools.partial(sample_load, subject)))
    arms.append(_Arm("load cached", None, functools.partial(sample_load, subject)))
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
                if not await in_thread(empty_page_cache, subject, notes):
                    continue
            elif arm.kind.endswith("cached") and not is_filled:
                await in_thread(fill_page_cache, subject, notes)
                is_filled = True
            await in_thread(touch, subject.needed_bytes // 2)
            try:
                arm.samples.append(await arm.measure())
            except ReadError as error:
                number = getattr(error.__cause__, "errno", None)
                if arm.kind != "read direct" or number not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                notes.append("O_DIRECT was not measured: the file system refuses it")
