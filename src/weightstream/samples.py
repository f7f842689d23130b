"""One measurement of `weightstream bench`: a raw read, a raw copy or a load, and how memory is made ready for it.

The model is made from the checkpoint, on meta, and new for each load. Importing this does not import torch.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from weightstream import pagecache
from weightstream.config import LoaderConfig
from weightstream.drawing import save_timeline
from weightstream.outputs import Sample
from weightstream.prefetch.attempts import Attempts, refused
from weightstream.prefetch.memory import PAGE_BYTES, allocate, usable_cores
from weightstream.scheduler.files import Files
from weightstream.scheduler.looking import looking
from weightstream.warm import in_thread

if TYPE_CHECKING:
    import torch
    from torch import nn

    from weightstream.ceilings import ReadCeiling
    from weightstream.prefetch.header import TensorSpec
    from weightstream.scheduler.timeline import Recorder

__all__ = [
    "Subject",
    "empty_page_cache",
    "fill_page_cache",
    "record",
    "sample_copy",
    "sample_load",
    "sample_read",
    "touch",
]

T = TypeVar("T")

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


def fill_page_cache(subject: Subject, notes: list[str]) -> None:
    """Read the files into the page cache, and note where it does not keep them."""
    _read_all(subject, num_threads=subject.thread_counts[-1], direct=False)
    share = _resident_share(subject)
    if share is None:
        notes.append(
            "whether the page cache kept the files is unknown, since they are somebody else's: rows that say cached may"
            " be partly from the disk"
        )
    elif share < _WARM_SHARE:
        notes.append(
            f"the page cache kept only {share:.0%} of the files: rows that say cached are partly from the disk"
        )


def empty_page_cache(subject: Subject, notes: list[str]) -> bool:
    """Drop the files from the page cache; return whether they are gone."""
    _within_limits(subject, lambda _, __: pagecache.drop(subject.paths))
    share = _resident_share(subject)
    if share is None:
        notes.append(
            "cold reads were not measured: whether the files left the page cache is unknown, since they are somebody else's"
        )
    elif share > _COLD_SHARE:
        notes.append(
            f"cold reads were not measured: {share:.0%} of the files stayed in the page cache (others use them)"
        )
    return share is not None and share <= _COLD_SHARE


def _resident_share(subject: Subject) -> float | None:
    """Return how much of the files is in the page cache; None: the kernel does not tell this user."""
    try:
        return _within_limits(subject, lambda _, __: pagecache.resident_share(subject.paths))
    except pagecache.ResidencyUnknownError:
        return None


def _within_limits(subject: Subject, action: Callable[[Files, Attempts], T]) -> T:
    """Do something with the files, and give it up where one load would: see `looking`."""
    with looking(subject.config) as (files, attempts):
        files.begin(subject.checkpoint)
        return files.call(functools.partial(action, files, attempts))


def _read_all(subject: Subject, *, num_threads: int, direct: bool) -> ReadCeiling:
    """Read all files raw; anew from the beginning, as often as a load would try, where that fails for a moment.

    Raises:
        ReadError: they cannot be read.
        LoadTimeoutError: a read does not return, or all of them take too long.
    """
    from weightstream.ceilings import WINDOW_BYTES, read_ceiling  # noqa: PLC0415

    window = None if subject.device.type == "cpu" else WINDOW_BYTES

    def read(files: Files) -> ReadCeiling:
        try:
            return read_ceiling(
                subject.paths, num_threads=num_threads, direct=direct, window_bytes=window, on_begin=files.begin
            )
        except OSError as error:
            raise refused("read the file", error, file=error.filename or subject.checkpoint) from error

    return _within_limits(subject, lambda files, attempts: attempts.call(lambda: read(files), subject.checkpoint))


async def sample_read(subject: Subject, num_threads: int, *, direct: bool) -> Sample:
    """Measure a raw read of all files with so many threads, through the page cache or past it."""
    gauge = _Gauge()
    found = await in_thread(functools.partial(_read_all, subject, num_threads=num_threads, direct=direct))
    return Sample(found.num_bytes, found.wall_s, gauge.cpu_s, gauge.peak_bytes)


async def sample_copy(subject: Subject) -> Sample:
    """Measure raw copies to the device, of as many bytes as the tensors have, from page-locked memory."""
    from weightstream.ceilings import copy_ceiling  # noqa: PLC0415

    gauge = _Gauge()
    found = await in_thread(
        functools.partial(
            copy_ceiling, subject.device, num_bytes=subject.num_bytes, chunk_bytes=subject.config.prefetch.chunk
        )
    )
    return Sample(found.num_bytes, found.wall_s, gauge.cpu_s, gauge.peak_bytes)


async def record(subject: Subject, timeline: Path) -> None:
    """Load once more, and save what happened when: what was measured before was not recorded."""
    from weightstream.scheduler.timeline import Recorder  # noqa: PLC0415

    recorder = Recorder()
    await in_thread(touch, subject.needed_bytes // 2)
    await sample_load(subject, recorder)
    await in_thread(save_timeline, recorder.timeline(), timeline)


async def sample_load(subject: Subject, recorder: Recorder | None = None) -> Sample:
    """Measure a load into a new model; `recorder` notes what happens when."""
    from weightstream.api import load  # noqa: PLC0415

    model = await in_thread(_prepare_load, subject)
    gauge = _Gauge()
    report = await load(model, subject.checkpoint, config=subject.config, recorder=recorder)
    moved_bytes = report.num_bytes - report.mapped_bytes
    return Sample(moved_bytes, report.wall_s, gauge.cpu_s, gauge.peak_bytes, report)


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
