"""The functions of the front door: one-shot loading, awaited or blocking, and a blocking iterator."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from weightstream.config import LoaderConfig
from weightstream.device.accelerator import caller_streams
from weightstream.device.config import UserMap
from weightstream.scheduler import loader as scheduler
from weightstream.scheduler.consumer import ConsumerSink, drain
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.handle import EVENT_INTERVAL_S, end_alone, events
from weightstream.scheduler.job import Job
from weightstream.scheduler.machine import Machine
from weightstream.scheduler.report import LoadReport, Progress
from weightstream.scheduler.sinks import ModelSink
from weightstream.scheduler.timeline import Recorder

__all__ = ["Loader", "iter_tensors", "load", "load_sync"]

Path = str | os.PathLike[str]


class Loader(scheduler.Loader):
    """A `scheduler.loader.Loader` whose configuration, if none is given, comes from defaults and the environment."""

    def __init__(self, config: LoaderConfig | None = None, *, machine: Machine | None = None) -> None:
        super().__init__(LoaderConfig() if config is None else config, machine=machine)


async def load(
    model: nn.Module,
    path: Path | None = None,
    *,
    config: LoaderConfig | None = None,
    device_map: UserMap | None = None,
    on_progress: Callable[[Progress], object] | None = None,
    recorder: Recorder | None = None,
) -> LoadReport:
    """Load a checkpoint into a model. For more than one load, keep a `Loader`: it keeps threads and memory.

    Args:
        model: its parameters on meta get storage on `device.target`; those that have storage are written to.
        path: a folder, an `*.index.json` or a `.safetensors` file; None: what the configuration names.
        config: None: defaults and environment variables.
        device_map: devices by name of module, as `device.device_map` has it: names, numbers or `torch.device` objects.
        on_progress: called in this task when something has changed, at most twenty times a second, and at the end.
        recorder: notes what happens to each chunk, for a timeline.

    Cancellation: the load is cancelled, and everything is cleaned up, before this returns.

    Raises:
        WeightstreamError: see `weightstream.errors`; the model then is as it was before, except for what the error's
            `partly_written` names.
    """
    async with Loader(config) as loader:
        return await loader.load(model, path, device_map=device_map, on_progress=on_progress, recorder=recorder)


def load_sync(
    model: nn.Module,
    path: Path | None = None,
    *,
    config: LoaderConfig | None = None,
    device_map: UserMap | None = None,
    on_progress: Callable[[Progress], object] | None = None,
    recorder: Recorder | None = None,
) -> LoadReport:
    """Load a checkpoint into a model, and block until it is there. Needs no event loop; see `load`.

    An exception in the waiting thread (KeyboardInterrupt, or what `on_progress` raises) cancels the load and cleans up.
    """
    engine = Engine(LoaderConfig() if config is None else config)
    sink = ModelSink(engine, model, device_map)
    job = scheduler.make_job(engine, path, sink, caller_streams(), recorder)
    try:
        try:
            try:
                job.start()
                return _result(job, on_progress)
            finally:
                end_alone(job, engine)
        finally:  # once more, because this thread may be interrupted in the middle of it, or before
            end_alone(job, engine)
    finally:  # and then again: Ctrl-C may come twice
        end_alone(job, engine)


def iter_tensors(
    path: Path | None = None,
    config: LoaderConfig | None = None,
    *,
    on_progress: Callable[[Progress], object] | None = None,
    recorder: Recorder | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor on `device.target`) in the order of the files, blocking. For engines with loops of their own.

    Readers stay ahead by at most `prefetch.host_memory` bytes. Each tensor's memory is the consumer's; small tensors
    share memory (at most `prefetch.chunk` bytes of it), so copy what you keep. Closing the iterator early stops the
    load.

    Args:
        path: as in `load`.
        config: as in `load`.
        on_progress: called by whoever iterates, between two tensors, at most twenty times a second, and at the end.
        recorder: as in `load`.

    Raises:
        WeightstreamError: see `weightstream.errors`.
        RuntimeError: the process was forked, and this is the child. Closing the iterator there does nothing.
    """
    engine = Engine(LoaderConfig() if config is None else config)
    sink = ConsumerSink(engine)
    job = scheduler.make_job(engine, path, sink, caller_streams(), recorder)
    try:
        try:
            try:
                job.start()
                told_s = time.monotonic()
                for item in drain(sink, job.finished):
                    yield item
                    if on_progress is not None and time.monotonic() - told_s >= EVENT_INTERVAL_S:
                        told_s = time.monotonic()
                        on_progress(job.progress())
                _result(job, on_progress)
            finally:
                end_alone(job, engine)
        finally:  # as in load_sync
            end_alone(job, engine)
    finally:
        end_alone(job, engine)


def _result(job: Job, on_progress: Callable[[Progress], object] | None = None) -> LoadReport:
    if on_progress is not None:
        for progress in events(job):
            on_progress(progress)
    return job.finished.result()
