"""One load, from preflight to report, on a thread of its own.

A job knows no event loop: it is started, stopped and looked at from any thread, and its ends are futures of
`concurrent.futures`. That is why a busy event loop cannot slow a load, and why the blocking functions are the same code
as the awaitable ones.

What happens on failure, in this order: nothing more is granted; reads in hand return (or are given up) and copies in
flight complete; slots go back; replaced parameters get back what they had; blocks and descriptors are let go; then the
futures resolve.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack

import torch

from weightstream.device.accelerator import on_callers_device
from weightstream.device.claims import claim, num_ended
from weightstream.device.placement import Placement
from weightstream.errors import LoadCancelledError, MemoryBudgetError, ReadError, WeightstreamError
from weightstream.interpreter import quick_thread_switches
from weightstream.prefetch.attempts import Attempts
from weightstream.prefetch.checkpoint import Checkpoint, open_checkpoint
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.memory import Peak
from weightstream.prefetch.opening import files_hint, is_out_of_files
from weightstream.prefetch.source import Source
from weightstream.ranks import ranked_logger
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.exits import ended_at_exit
from weightstream.scheduler.files import Files
from weightstream.scheduler.flow import Flow
from weightstream.scheduler.ledger import Ledger
from weightstream.scheduler.pipeline import Pipeline
from weightstream.scheduler.pump import Pump
from weightstream.scheduler.readiness import Readiness
from weightstream.scheduler.report import LoadReport, Progress, State
from weightstream.scheduler.reporting import device_names, make_report
from weightstream.scheduler.sinks import Sink
from weightstream.scheduler.telemetry import Ended, Telemetry
from weightstream.scheduler.timeline import Recorder

__all__ = ["Job"]

logger = ranked_logger(__name__)

_NOT_ALL_ATOMIC = (
    "commit: atomic covers the tensors of modules that load themselves, and not what else their hooks may change"
)


class Job:
    """See the module.

    Args:
        engine: threads, ring and devices; must outlive the job.
        path: the checkpoint.
        sink: where the tensors go.
        streams: the caller's current stream on each device.
        recorder: told what happens to each chunk, if there is one.

    Attributes:
        started: resolves when the preflight has passed, or with its error.
        finished: resolves with the report, or with the load's error, after everything has been cleaned up.
        readiness: of single tensors and modules.
    """

    def __init__(
        self,
        engine: Engine,
        path: str | os.PathLike[str],
        sink: Sink,
        *,
        streams: Mapping[torch.device, object],
        recorder: Recorder | None = None,
    ) -> None:
        self.started: Future[None] = Future()
        self.finished: Future[LoadReport] = Future()
        for future in (self.started, self.finished):
            future.set_running_or_notify_cancel()  # a waiter that is cancelled must not cancel them for the others
        self.readiness = Readiness()
        self._engine = engine
        #: Who has it: its thread, or nobody, where it was ended without having run; see `_is_claimed_by`.
        self._claim: dict[str, str] = {}
        #: Re-entrant: the collector may stop a load in the middle of this.
        self._ending = threading.RLock()
        self._path = path
        self._sink: Sink | None = sink
        self._streams = streams
        self._ledger = Ledger(engine.clock.now, recorder)
        self._telemetry = Telemetry(os.fsdecode(path))
        self._begin = engine.clock.now()
        self._state: State = "preflight"
        timeout_s = engine.config.scheduler.timeout_s
        self._deadline = None if timeout_s is None else self._begin + timeout_s
        self._files: Files | None = None
        self._flow: Flow | None = None
        self._last_counts = (0, 0)
        self._total_bytes = self._mapped_bytes = 0
        self._fallbacks: list[str] = []
        self._num_retries = 0
        self._stop: BaseException | None = None

    def start(self) -> None:
        """Start the job's thread. To be called by the thread that asks for the load, whose current device counts.

        Raises:
            RuntimeError: the operating system has no thread left.
            BaseException: this thread was interrupted. In any case the job has ended then, for everybody who waits for
                it.
        """
        try:
            self._engine.clock.spawn(on_callers_device(self._run_to_the_end), "weightstream-load")
        except BaseException as error:
            self.end(error)  # the thread may be there all the same, if it was the wait for it that was interrupted
            raise

    @property
    def is_foreign(self) -> bool:
        """See `Engine.is_foreign`."""
        return self._engine.is_foreign

    def check_process(self) -> None:
        """See `Engine.check_process`."""
        self._engine.check_process()

    def end(self, error: BaseException | None = None) -> None:
        """Stop the load and wait until nothing is left of it. In a forked child, do nothing.

        Args:
            error: what a load ends with that does not run yet, and never will; None: LoadCancelledError.
        """
        if self.is_foreign:
            return
        self.stop(error)
        self.finished.exception()

    def stop(self, error: BaseException | None = None) -> None:
        """Ask the load to end, from any thread, without waiting. One that does not run yet has ended then, and never will.

        A load that has ended takes no notice, nor does one in the parent of a forked child. Where the calling thread was
        interrupted, it may be called again.
        """
        if self.is_foreign:
            return
        self._stop = self._stop or error or LoadCancelledError("the load was cancelled")
        if self._is_claimed_by("nobody"):
            with self._ending:
                if not self.finished.done():
                    self._end(None, self._stop)
        for waiting in (self._files, self._flow):
            if waiting is not None:
                waiting.stop(self._stop)

    def progress(self) -> Progress:
        """Return a snapshot, from any thread.

        Raises:
            RuntimeError: the process was forked from the engine's.
        """
        self.check_process()
        flow = self._flow
        if flow is not None:
            self._last_counts = (flow.bytes_read, flow.bytes_placed)
        elapsed_s = self._ledger.wall_s if self.finished.done() else self._engine.clock.now() - self._begin
        return Progress(
            self._state,
            *self._last_counts,
            self._total_bytes,
            self.readiness.num_ready,
            self.readiness.num_names,
            elapsed_s,
            self.readiness.last_module,
            self._mapped_bytes,
        )

    def fall_back(self, sentence: str) -> None:
        """Record a downgrade, and log it once."""
        if sentence not in self._fallbacks:
            self._fallbacks.append(sentence)
            logger.warning("%s: %s", self._path, sentence)

    def _is_claimed_by(self, whom: str) -> bool:
        """Give the load to whoever asks first, for good. Not a lock: who is interrupted here may ask again."""
        return self._claim.setdefault("by", whom) == whom

    def _run_to_the_end(self) -> None:
        with ended_at_exit(self.stop):
            self._run()

    def _run(self) -> None:
        if not self._is_claimed_by("its thread"):
            return
        sink = self._sink
        assert sink is not None
        report: LoadReport | None = None
        error: BaseException | None = None
        try:
            with self._engine.staging.account.watch() as peak, quick_thread_switches():
                report = self._load(sink, peak)
        except torch.OutOfMemoryError as exc:
            error = MemoryBudgetError(f"the device has no memory left: {exc}", hint="Free some, or load elsewhere")
            error.__cause__ = exc
        except OSError as exc:
            error = exc
            if is_out_of_files(exc):  # wherever something of the machine's or of the checkpoint's is looked at
                error = ReadError(f"cannot open a file: {exc.strerror}", file=exc.filename, hint=files_hint())
                error.__cause__ = exc
        except StopIteration as exc:  # no coroutine can be told of it
            error = RuntimeError("something raised StopIteration")
            error.__cause__ = exc
        except BaseException as exc:  # noqa: BLE001 (whatever it is belongs to those who wait for the load)
            error = exc
        if isinstance(error, WeightstreamError):
            error.fallbacks = tuple(self._fallbacks)
        if error is not None:
            # Its frames refer to the model, and whoever keeps the error keeps them. Not later than here: once others
            # can raise it, it collects frames of theirs, and to clear a coroutine's is to end it.
            _clear_frames(error)
        del sink
        try:
            self._end(report, error)
        finally:
            del error  # or this frame, which it refers to, would refer to it

    def _end(self, report: LoadReport | None, error: BaseException | None) -> None:
        try:
            self._tell(report, error)
        finally:  # also if a handler of the program's log raises: somebody waits for these
            if error is not None and not self.started.done():
                self.started.set_exception(error)
            if report is not None:
                self.finished.set_result(report)
            elif error is not None and not self.finished.done():
                self.finished.set_exception(error)

    def _tell(self, report: LoadReport | None, error: BaseException | None) -> None:
        """Let everything go, and tell all but those who wait for the end of the load."""
        bytes_read = self.progress().bytes_read  # the last counts outlive the flow
        self._flow = self._files = None
        if report is None:
            self._ledger.enter("other")  # ends the section that it failed in
        self._state = "failed" if report is None else "done"
        if self._sink is not None:
            self._sink.end(error)
        self._sink = None  # it refers to the model: who keeps a handle must not keep the model's old tensors alive
        self.readiness.end(error)
        wall_s, sections = self._ledger.wall_s, self._ledger.sections
        fallbacks = self._fallbacks if report is None else report.fallbacks
        self._telemetry.end(Ended(report, error, wall_s, sections, bytes_read, self._num_retries, tuple(fallbacks)))
        if report is not None:
            logger.info(
                "loaded %d tensors, %.2f GB, onto %s in %.2f s (%s)",
                *(report.num_tensors, report.num_bytes / 1e9, report.device, report.wall_s, report.strategy),
            )

    def _take(self, placement: Placement, ended: int, stack: ExitStack) -> None:
        self.readiness.expect(placement.names, placement.prefixes)
        stack.callback(placement.release)
        stack.enter_context(claim(placement, ended))

    def _load(self, sink: Sink, peak: Peak) -> LoadReport:
        engine = self._engine
        with ExitStack() as stack:
            files = self._files = Files(
                engine.clock,
                engine.stragglers,
                stall_s=engine.config.prefetch.stall_s,
                timeout_s=engine.config.scheduler.timeout_s,
                deadline=self._deadline,
            )
            stack.callback(files.close)
            self._check_stop()  # asked before there were files to stop at
            engine.staging.limit_budget(self.fall_back)
            checkpoint, source, attempts = files.call(functools.partial(self._open, files, sink.prefetch_config))
            ended = num_ended()
            prepared = sink.prepare(checkpoint, source, files)
            self._take(prepared.placement, ended, stack)
            landing = {device for device, backend in enumerate(prepared.backends) if backend.lands}
            if landing:
                strategy, io = prepared.decision.strategy, sink.prefetch_config.io
                ring_bytes = engine.staging.least_ring_bytes(prepared.plan, strategy, io)
                beside_bytes = prepared.beside_bytes(landing)
                stack.enter_context(engine.staging.borrow(beside_bytes, strategy, ring_bytes=ring_bytes))
            if prepared.placement.hooks_may_change_more:
                self.fall_back(_NOT_ALL_ATOMIC)
            self._total_bytes, self._mapped_bytes = prepared.plan.total_bytes, prepared.plan.given_bytes
            if self._ledger.recorder is not None:
                device, names = device_names(prepared.backends), [shard.path.name for shard in checkpoint.shards]
                self._ledger.recorder.describe(str(checkpoint.path), device, names)
            pipeline = Pipeline.open(
                engine,
                files,
                (checkpoint, source, attempts),
                sink,
                prepared,
                streams=self._streams,
                ledger=self._ledger,
                fall_back=self.fall_back,
            )
            stack.callback(pipeline.close)
            self._flow = pipeline.flow
            self._check_stop()  # asked before there was a flow to stop
            sink.open(prepared, pipeline.stage)
            self.started.set_result(None)
            try:
                check = functools.partial(files.call, checkpoint.check_unchanged)
                pump = Pump(sink, pipeline, self.readiness, self._ledger.recorder, self._check_stop)
                self._state = "loading"
                timeout_s = engine.config.scheduler.timeout_s
                pump.run(self._deadline, timeout_s, check if prepared.decision.strategy == "preload" else None)
                self._ledger.enter("bind")
                self._state = "finishing"
                check()
                if pipeline.verification is not None:
                    pipeline.verification.check_complete()
                pump.finish(self._deadline, timeout_s)
            except BaseException as error:
                pipeline.end(error)
                self._undo(sink, error)
                raise
            self._ledger.enter("other")
            pipeline.remember(checkpoint)
            pipeline.tell_lost()
            report = make_report(
                *(checkpoint, prepared, pipeline, self._ledger),
                host_peak_bytes=peak.value,
                num_retries=self._num_retries,
                fallbacks=self._fallbacks,
            )
            freed = pipeline.free_staged()
            return report if freed is None else dataclasses.replace(report, decisions=(*report.decisions, freed))

    def _open(self, files: Files, config: PrefetchConfig) -> tuple[Checkpoint, Source, Attempts]:
        """Open a checkpoint, and the source of its bytes; return both, and what says how often its files are tried.

        On the thread of `files`, which closes both.
        """
        attempts = Attempts(config.retries, pause=files.pause, on_retry=self._count_retry, on_begin=files.begin)
        checkpoint = open_checkpoint(
            self._path,
            variant=config.variant,
            allow_outside_links=config.allow_outside_links,
            hashes=config.verify == "sha256",
            attempts=attempts,
        )
        files.opened.callback(checkpoint.close)
        source = self._engine.machine.open_source(
            checkpoint, config, pause=self._pause, on_retry=self._count_retry, on_fallback=self.fall_back
        )
        files.opened.callback(source.close)
        return checkpoint, source, attempts

    def _undo(self, sink: Sink, error: BaseException) -> None:
        written = sink.rollback()
        if written:
            if isinstance(error, WeightstreamError):
                error.partly_written = written
            logger.warning("the model is partly written: %d of its tensors had storage and were changed", len(written))

    def _check_stop(self) -> None:
        if self._stop is not None:
            raise self._stop

    def _pause(self, seconds: float) -> bool:
        flow = self._flow
        return flow is not None and flow.pause(seconds)

    def _count_retry(self) -> None:
        self._num_retries += 1


def _clear_frames(error: BaseException) -> None:
    """Clear the frames of an error, and of those that it came of."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            todo += [one.__cause__, one.__context__]
