"""The loader: what an async program holds on to. Loads run in it, and end before it does."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Self

import torch
from torch import nn

from weightstream.device.accelerator import caller_streams
from weightstream.device.config import UserMap
from weightstream.ranks import ranked_logger
from weightstream.scheduler.config import Settings
from weightstream.scheduler.consumer import ConsumerSink
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.handle import (
    LoadHandle,
    TensorStream,
    in_own_thread,
    insist,
    settle,
    stop_and_settle,
)
from weightstream.scheduler.job import Job
from weightstream.scheduler.machine import Machine
from weightstream.scheduler.report import LoadReport, Progress
from weightstream.scheduler.sinks import ModelSink, NowhereSink, Sink
from weightstream.scheduler.timeline import Recorder

__all__ = ["Loader", "make_job"]

logger = ranked_logger(__name__)

Path = str | os.PathLike[str]


def make_job(
    engine: Engine,
    path: Path | None,
    sink: Sink,
    streams: Mapping[torch.device, object],
    recorder: Recorder | None = None,
) -> Job:
    """Make a job for the checkpoint at `path`, or for the one that the configuration names; it has not been started.

    Args:
        engine: see `Job`.
        path: None: what the configuration names.
        sink: see `Job`.
        streams: see `Job`.
        recorder: see `Job`.

    Raises:
        ValueError: neither names one; or the recorder has recorded a load before.
        RuntimeError: the process was forked from the engine's.
    """
    engine.check_process()
    checkpoint = path if path is not None else engine.config.checkpoint
    if checkpoint is None:
        raise ValueError("no checkpoint: pass a path, or set `checkpoint` in the configuration")
    return Job(engine, os.fsdecode(checkpoint), sink, streams=streams, recorder=recorder)


class Loader:
    """Loads checkpoints into models. Owns reader threads, host memory and copy streams; many loads, one budget.

    Use it as an async context: `async with Loader(config) as loader`. It may be entered in one task and left in
    another. Leaving cancels what still runs and waits for it, and for a few seconds for reads that are slow, unless the
    context is left by a cancellation. Everything it does happens on threads; the event loop
    (asyncio or uvloop) only starts, awaits and cancels.

    Args:
        config: a `LoaderConfig`.
        machine: for tests: replaces parts of the machine.
    """

    def __init__(self, config: Settings, *, machine: Machine | None = None) -> None:
        self._config = config
        self._machine = machine
        self._engine: Engine | None = None
        self._supervisor: asyncio.Task[None] | None = None
        #: Those that run, and maybe some that have ended. None: this is not open.
        self._jobs: list[Job] | None = None
        self._closing = asyncio.Event()

    async def __aenter__(self) -> Self:
        if self._supervisor is not None:
            raise RuntimeError("this Loader was entered before: make a new one")
        self._engine = Engine(self._config, self._machine)
        opened = asyncio.Event()
        self._supervisor = asyncio.create_task(self._supervise(self._engine, opened), name="weightstream-supervisor")
        try:
            await opened.wait()
        except BaseException as error:
            await self._close(type(error))
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close(kind)

    async def _close(self, ended_by: type[BaseException] | None) -> None:
        """End every load and every thread, however often the closing task is cancelled meanwhile; see `Engine.close`.

        In a forked child, do nothing: there are no such threads, and no event loop that runs.
        """
        engine = self._engine
        assert self._supervisor is not None
        assert engine is not None
        if engine.is_foreign:
            return
        engine.hurry(ended_by)
        self._closing.set()
        await insist(self._supervisor, on_cancel=engine.stragglers.hurry)  # loads still run

    async def start(
        self,
        model: nn.Module,
        path: Path | None = None,
        *,
        device_map: UserMap | None = None,
        recorder: Recorder | None = None,
    ) -> LoadHandle:
        """Start to load a checkpoint into a model; return once the preflight has passed.

        Args:
            model: its parameters on meta get storage on `device.target`; those that have storage are written to.
            path: a folder, an `*.index.json` or a `.safetensors` file; None: what the configuration names.
            device_map: devices by name of module, as `device.device_map`; goes before that and `device.target`.
            recorder: notes what happens to each chunk, for a timeline.

        Cancellation: the load is cancelled, and the model is as it was before.

        Raises:
            CheckpointError, PlacementError, MemoryBudgetError, ReadError: the preflight failed; nothing has changed.
            ValueError: no checkpoint is named; or the recorder has recorded a load before.
            RuntimeError: the loader is not open, or the process was forked.
        """
        return await self._begin(self._job(ModelSink(self._open_engine(), model, device_map), path, recorder))

    async def load(
        self,
        model: nn.Module,
        path: Path | None = None,
        *,
        device_map: UserMap | None = None,
        on_progress: Callable[[Progress], object] | None = None,
        recorder: Recorder | None = None,
    ) -> LoadReport:
        """Load a checkpoint into a model, and wait until every tensor is in place. See `start`.

        Args:
            model: as in `start`.
            path: as in `start`.
            recorder: as in `start`.
            device_map: as in `start`.
            on_progress: called in this task when something has changed, at most twenty times a second, and at the end.

        Cancellation: the load is cancelled and cleaned up before this returns. One that has just come to its end stays.

        Raises:
            WeightstreamError: the load failed. See `LoadHandle.wait` for what is true of the model then.
            Exception: whatever `on_progress` raises; the load has been cancelled.
        """
        job = self._job(ModelSink(self._open_engine(), model, device_map), path, recorder)
        return await self._complete(job, on_progress)

    async def warm(self, path: Path | None = None) -> LoadReport:
        """Read a checkpoint into the page cache and nowhere else. Errors and cancellation as in `load`."""
        return await self._complete(self._job(NowhereSink(self._open_engine()), path, None))

    async def start_warm(self, path: Path | None = None, *, recorder: Recorder | None = None) -> LoadHandle:
        """Start what `warm` does; return once the preflight has passed. Errors and cancellation as in `start`."""
        return await self._begin(self._job(NowhereSink(self._open_engine()), path, recorder))

    def stream(self, path: Path | None = None, *, recorder: Recorder | None = None) -> TensorStream:
        """Read a checkpoint tensor by tensor, without a model, in the order of its files.

        Readers stay ahead of the consumer by at most `prefetch.host_memory` bytes.

        Returns:
            An asynchronous iterator of (name, tensor on `device.target`). Errors are raised while iterating.
        """
        sink = ConsumerSink(self._open_engine())
        job = self._job(sink, path, recorder)
        stream = TensorStream(job, sink)
        try:
            self._launch(job)
        except BaseException:
            job.stop()
            raise
        return stream

    def _open_engine(self) -> Engine:
        if self._engine is None or self._jobs is None:
            raise RuntimeError("the Loader is not open: use it inside `async with`")
        return self._engine

    def _job(self, sink: Sink, path: Path | None, recorder: Recorder | None) -> Job:
        return make_job(self._open_engine(), path, sink, caller_streams(), recorder)

    def _launch(self, job: Job) -> None:
        """Start a job that the supervisor ends, whatever interrupts this thread, before the loader ends."""
        jobs = self._jobs
        assert jobs is not None
        jobs.append(job)
        job.finished.add_done_callback(functools.partial(_remove, jobs))
        job.start()

    async def _begin(self, job: Job) -> LoadHandle:
        handle = LoadHandle(job)
        try:
            self._launch(job)
            await settle(job.started)
        except BaseException:
            await stop_and_settle(job)
            raise
        return handle

    async def _complete(self, job: Job, on_progress: Callable[[Progress], object] | None = None) -> LoadReport:
        try:
            handle = await self._begin(job)
            if on_progress is not None:
                async for progress in handle.events():
                    on_progress(progress)
            return await settle(job.finished)
        except BaseException:
            await stop_and_settle(job)
            raise

    async def _supervise(self, engine: Engine, opened: asyncio.Event) -> None:
        """Own this loader's loads, and its engine, in a task of its own, until the loader is closed.

        What `__aenter__` entered would bind the loader to the task that opened it. When the event loop
        itself is shut down, this task is cancelled like all others, and so every load and every thread ends before the
        loop does: also where Ctrl-C has come out of the loop in the middle of anything.
        """
        jobs: list[Job] = []
        try:
            try:
                self._jobs = jobs
                opened.set()
                await self._closing.wait()
            finally:
                self._jobs = None
                await _close(engine, jobs)
        finally:  # once more, because this thread may be interrupted in the middle of it, or before
            await _close(engine, jobs)


def _remove(jobs: list[Job], finished: Future[LoadReport]) -> None:
    """Let go of a job that has ended: it knows its error, and that the frames of those who got it."""
    for job in list(jobs):
        if job.finished is finished:
            jobs.remove(job)


async def _close(engine: Engine, jobs: list[Job]) -> None:
    """End loads, and then the engine, on a thread that no signal interrupts. Errors of loads belong to their handles.

    Not where the interpreter goes, and this is closed for being collected: see `end_alone`.
    """
    if engine.is_closed or sys.is_finalizing():
        return

    def close() -> None:
        running = list(jobs)  # nobody adds any
        for job in running:
            job.stop()
        for job in running:
            job.end()
        closed, thread = in_own_thread(engine.close, spawn=engine.clock.spawn)  # and the clock goes on until then
        thread.join()
        closed.result()

    engine.hurry(sys.exc_info()[0])
    closed, thread = in_own_thread(close)
    await insist(closed, on_cancel=engine.stragglers.hurry)
    thread.join()
