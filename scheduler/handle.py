"""Handles: a running load, as the code that awaits it sees it."""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Self, TypeVar

import anyio
import torch

from weightstream.prefetch.readers import Thread
from weightstream.scheduler.clock import SystemClock
from weightstream.scheduler.consumer import ConsumerSink
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.job import Job
from weightstream.scheduler.report import LoadReport, Progress

__all__ = [
    "EVENT_INTERVAL_S",
    "LoadHandle",
    "TensorStream",
    "apart",
    "end_alone",
    "events",
    "in_own_thread",
    "insist",
    "outlast",
    "settle",
    "stop_and_settle",
]

T = TypeVar("T")

#: What threads of `in_own_thread` are called.
_CALL = "weightstream-call"

#: Events at most this often: twenty a second is more than anybody can read.
EVENT_INTERVAL_S = 0.05

#: Up to so many names are looked through on the event loop's own thread: half a millisecond's work.
_FEW_NAMES = 5000


async def settle(future: Future[T]) -> T:
    """Await a future of another thread. Cancelling the waiter leaves the future alone."""
    waiter = asyncio.wrap_future(future)
    try:
        return await waiter
    finally:
        _forget_result(waiter)


async def outlast(future: Future[T] | asyncio.Task[T], *, timeout_s: float | None = None) -> None:
    """Wait until a future of another thread, or a task, is done, or for so long; leave its result and its error alone."""
    if isinstance(future, asyncio.Task):
        await asyncio.wait([future], timeout=timeout_s)
        return
    waiter = asyncio.wrap_future(future)
    try:
        await asyncio.wait([waiter], timeout=timeout_s)
    finally:
        _forget_result(waiter)


def _forget_result(waiter: asyncio.Future[T]) -> None:
    """Want nothing more of a waiter: asyncio logs an error that nobody has looked at."""
    if not waiter.cancel() and not waiter.cancelled():
        waiter.exception()


async def insist(future: Future[T] | asyncio.Task[T], *, on_cancel: Callable[[], None] = lambda: None) -> None:
    """Wait until a future of another thread, or a task, is done, however often the waiting task is cancelled meanwhile.

    `on_cancel` is called each time, and must not block.

    anyio's shield keeps the cancellation of scopes away, but not `Task.cancel`, which servers and `asyncio.timeout` use:
    that is remembered, and raised at the end.
    """
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                await outlast(future)
            except asyncio.CancelledError as error:
                cancelled = error
                on_cancel()
    if cancelled is not None:
        raise cancelled


def in_own_thread(
    action: Callable[[], T], *, spawn: Callable[[Callable[[], None], str], Thread] | None = None
) -> tuple[Future[T], Thread]:
    """Call something on a thread of its own: the event loop's executor may be full of other people's work.

    Args:
        action: what is called.
        spawn: starts the thread, if it waits on a clock of its own.

    Returns:
        Its result, and the thread, which ends right after that is there. Where no thread can be had, it has been called
        here: late is better than never.

    Raises:
        BaseException: the calling thread was interrupted. The action is called all the same.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    once = threading.Lock()

    def run() -> None:
        if not once.acquire(blocking=False):
            return
        try:
            result = action()
        except BaseException as error:  # noqa: BLE001 (it belongs to who waits for the future)
            future.set_exception(error)
        else:  # not above: an interrupt that comes here belongs to nobody but this thread
            future.set_result(result)

    try:
        return future, (spawn or SystemClock().spawn)(run, _CALL)
    except RuntimeError:  # the operating system has none left
        run()
        return future, _Ended()
    except BaseException:  # it is not known whether the thread is there
        run()
        raise


def apart(action: Callable[[], T]) -> T:
    """Call something on a thread of its own, which no signal interrupts, and wait for its result."""
    result, _ = in_own_thread(action)
    return result.result()


class _Ended:
    """Stands for a thread that has ended."""

    def join(self, timeout: float | None = None) -> None:
        """Nothing to wait for."""

    def is_alive(self) -> bool:
        return False


async def stop_and_settle(job: Job) -> None:
    """Stop a job and wait until it has cleaned up, whatever happens to the waiting task meanwhile.

    In a forked child, do nothing; see `Engine.is_foreign`.
    """
    if job.is_foreign:
        return
    job.stop()
    await insist(job.finished)
    job.finished.exception()


def end_alone(job: Job, engine: Engine) -> None:
    """End a load and the engine that it has for itself, and wait for that. In a forked child, do nothing.

    It is done on a thread of its own, which no signal interrupts. The caller may be interrupted before that is there: so
    it is called three times, by three `finally` in each other, for two Ctrl-C, and does nothing once it is done.

    Nor does it where the interpreter goes and collects an iterator that was left open: no thread runs any more, or can be
    waited for, and the load was ended before (`exits`).
    """
    if engine.is_closed or sys.is_finalizing():
        return
    engine.hurry(sys.exc_info()[0])

    def end() -> None:
        job.end()
        engine.close()

    ended, thread = in_own_thread(end)
    # The garbage collector closes a forgotten iterator on whatever thread it runs, even one that must end first. Those of
    # `in_own_thread` need not: they are no part of an engine.
    name = threading.current_thread().name
    if name == _CALL or not name.startswith("weightstream-"):
        thread.join()
        ended.result()


class LoadHandle:
    """A load that has passed its preflight. From `Loader.start`. In a forked child, all of it raises RuntimeError."""

    def __init__(self, job: Job) -> None:
        self._job = job

    @property
    def progress(self) -> Progress:
        """How far the load is, now. Can be read from any thread."""
        return self._job.progress()

    async def ready(self, name: str = "") -> None:
        """Wait until a tensor, or every tensor of a module, holds its final values and any stream may use it.

        Args:
            name: as in `named_parameters` or `named_modules`; "" waits for the whole model.

        Cancellation: cancels this wait alone.

        Raises:
            ValueError: there is no such tensor or module.
            WeightstreamError: the load failed or was cancelled.
        """
        self._job.check_process()
        readiness = self._job.readiness
        if readiness.num_names <= _FEW_NAMES:
            await settle(readiness.wait_for(name))
        else:
            looked_up, _ = in_own_thread(lambda: readiness.wait_for(name))
            await settle(await settle(looked_up))

    async def wait(self) -> LoadReport:
        """Wait for the end of the load.

        Cancellation: cancels this wait alone; the load goes on.

        Raises:
            WeightstreamError: the load failed; LoadCancelledError if somebody cancelled it. The model then is as it
                was before, except for what `error.partly_written` names.
        """
        self._job.check_process()
        return await settle(self._job.finished)

    async def cancel(self) -> None:
        """Cancel the load, and wait until nothing of it is left: readers, copies, slots, descriptors, parameters.

        Does nothing if the load has ended. Cancellation: the load is cancelled and cleaned up all the same.
        """
        self._job.check_process()
        await stop_and_settle(self._job)

    async def events(self) -> AsyncIterator[Progress]:
        """Yield a snapshot whenever something has changed, at most twenty a second, and the last one at the end."""
        for progress in _changes(self._job):
            if progress is None:
                await outlast(self._job.finished, timeout_s=EVENT_INTERVAL_S)
            else:
                yield progress


class TensorStream:
    """Named tensors in the order of the files, on the device, as they arrive. From `Loader.stream`.

    One consumer iterates it with `async for`, inside `async with` or followed by `aclose()` if the iteration may stop
    early; a stream that nobody refers to any more stops by itself, without being waited for. Each tensor's memory is the consumer's. Small tensors share memory (at most `prefetch.chunk` bytes of it), so keeping
    one of them keeps its neighbours: copy what you keep.
    """

    def __init__(self, job: Job, sink: ConsumerSink) -> None:
        self._job = job
        self._sink = sink
        self._is_waited_for = False
        # What the finaliser refers to stays for as long as this stream. The job knows the load's error, and that the frames
        # of those who got it, which refer to this stream.
        weakref.finalize(self, _forget, weakref.ref(job), sink).atexit = False

    @property
    def progress(self) -> Progress:
        """How far the load is, now."""
        return self._job.progress()

    async def report(self) -> LoadReport:
        """Wait for the end of the load, which comes after the last tensor was taken, and return its report."""
        self._job.check_process()
        return await settle(self._job.finished)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, torch.Tensor]:
        """Return the next tensor.

        Cancellation: no tensor is lost; the stream can be iterated on.

        Raises:
            WeightstreamError: the load failed.
            RuntimeError: another task waits for the next tensor; or the process was forked, and this is the child.
        """
        if self._is_waited_for:  # the sink tells one waiter, and the other would wait for ever
            raise RuntimeError(
                "this stream is iterated by another task already: give each consumer a stream of its own"
            )
        while True:
            item = self._sink.next_nowait()
            if item is not None:
                return item
            if self._sink.ended:
                await settle(self._job.finished)
                raise StopAsyncIteration
            self._is_waited_for = True
            try:
                await settle(self._sink.wait())
            finally:
                self._is_waited_for = False

    async def aclose(self) -> None:
        """Stop reading, and wait until nothing of the load is left, nor of what it has not delivered.

        In a forked child, do nothing: the parent's stream goes on.
        """
        if self._job.is_foreign:
            return
        self._sink.forget()
        await stop_and_settle(self._job)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _forget(reference: weakref.ref[Job], sink: ConsumerSink) -> None:
    if not sink.is_foreign:  # or its lock may be held by a thread that does not exist here
        sink.forget()
        job = reference()  # its thread holds it while it runs
        if job is not None:
            job.stop()


def events(job: Job) -> Iterator[Progress]:
    """Yield what `LoadHandle.events` does, and block the calling thread in between."""
    for progress in _changes(job):
        if progress is None:
            wait([job.finished], EVENT_INTERVAL_S)
        else:
            yield progress


def _changes(job: Job) -> Iterator[Progress | None]:
    """Yield a snapshot where it differs from the one before, and None where there is time to wait; end with the job."""
    last: Progress | None = None
    while True:
        over = job.finished.done()
        progress = job.progress()
        if last is None or over or _counts(progress) != _counts(last):
            last = progress
            yield progress
        if over:
            return
        yield None


def _counts(progress: Progress) -> tuple[str, int, int, int]:
    return progress.state, progress.bytes_read, progress.bytes_placed, progress.tensors_ready
