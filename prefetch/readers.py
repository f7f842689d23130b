"""Reader threads: long-lived, shared by all loads of a Loader, each doing one blocking read at a time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Protocol

__all__ = ["Condition", "ReadQueue", "ReaderPool", "Thread"]


class Condition(Protocol):
    """The part of `threading.Condition` that this package uses; tests bring one that runs in virtual time."""

    def __enter__(self) -> bool: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...
    def wait(self, timeout: float | None = None) -> bool: ...
    def notify(self, n: int = 1) -> None: ...
    def notify_all(self) -> None: ...


class Thread(Protocol):
    """A started thread."""

    def join(self, timeout: float | None = None) -> None: ...
    def is_alive(self) -> bool: ...


class ReadQueue(Protocol):
    """A load, seen from the reader threads. Both are used with the pool's lock held."""

    @property
    def has_part(self) -> bool:
        """Whether the next read needs nothing that it would have to wait for: it is of a chunk that is being read."""
        ...

    def take(self) -> Callable[[], None] | None:
        """Return the next read that may start now, or None. Must not block.

        The callable does the read, on the calling thread, and never raises.
        """
        ...


class ReaderPool:
    """Threads that take reads from the queues of all running loads in turn.

    Idle ones sleep until there may be something for them: for one slot that comes back, one is woken, and not all of
    them to find that another was faster. With 16 of them, and a ring that copies could not empty as fast, that was 25
    switches between threads for each chunk; on an H100's host, 16 took 0.57 s for what 12 did in 0.28 s, and 2.4 s with
    chunks of 4 MiB (2026-11-27).

    Threads are daemons, so that one that hangs in a dead file system cannot keep the process alive.

    Args:
        num_workers: how many threads, from the first `attach` or `widen` on: until then nobody may be there yet to end
            them. Where no more can be had than a few, those have to do.
        condition: guards the pool's state; `wake` notifies it.
        spawn: starts a daemon thread with a target and a name.

    Attributes:
        num_workers: how many there are that are not stuck.
    """

    def __init__(
        self, num_workers: int, condition: Condition, spawn: Callable[[Callable[[], None], str], Thread]
    ) -> None:
        self.num_workers = 0
        self._num_wished = num_workers
        self._condition = condition
        self._spawn = spawn
        self._queues: list[ReadQueue] = []
        self._turn = 0
        self._closed = False
        self._threads: dict[int, Thread] = {}
        self._num_started = 0
        #: The numbers of threads that are in a read, and how many of these hang there.
        self._reading: set[int] = set()
        self._num_stuck = 0
        #: Threads that are too many, because one came back that had been replaced.
        self._num_surplus = 0

    def attach(self, queue: ReadQueue) -> None:
        """Take reads from this queue too.

        Raises:
            RuntimeError: not one thread can be had.
        """
        with self._condition:
            self._start()
            self._queues.append(queue)
            self._condition.notify_all()

    def detach(self, queue: ReadQueue) -> None:
        """Take nothing more from this queue. Reads already taken go on."""
        with self._condition:
            if queue in self._queues:
                self._queues.remove(queue)

    def wake(self, num_reads: int | None = None) -> None:
        """Make idle threads look again: slots came back, or a consumer made room.

        Args:
            num_reads: so many of them, as no more than so many can go on, beside further parts of the same chunks; None:
                all.
        """
        with self._condition:
            if num_reads is None:
                self._condition.notify_all()
            else:
                self._condition.notify(num_reads)

    def widen(self, num_workers: int) -> None:
        """Have so many threads at least, and make idle ones look again: more reads may go on from now on.

        Raises:
            RuntimeError: not one thread can be had.
        """
        with self._condition:
            self._start()
            self._widen(num_workers)
            self._condition.notify_all()

    def replace_stuck(self, num_threads: int) -> None:
        """Start threads in place of ones that hang in the kernel. Should one return, see `come_back`."""
        with self._condition:
            self._num_stuck += num_threads
            self.num_workers -= num_threads
            self._widen(self.num_workers + num_threads)

    def come_back(self) -> None:
        """Say, on its thread, that a read has returned which was, or is about to be, replaced: one thread is too many."""
        with self._condition:
            self._num_stuck -= 1
            self._num_surplus += 1
            self._condition.notify_all()

    def close(self, timeout_s: float) -> None:
        """End all threads, and wait `timeout_s` seconds at most for each to do so, but not for those that are stuck."""
        with self._condition:
            self._closed = True
            self._queues.clear()
            self._condition.notify_all()
            while len(self._reading) > self._num_stuck and self._condition.wait(timeout_s):
                pass
            ending = [thread for number, thread in self._threads.items() if number not in self._reading]
        deadline = time.monotonic() + timeout_s
        for thread in ending:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self) -> None:
        if not self._num_started and not self._closed:
            self._add_thread()
            self.num_workers = 1
            self._widen(self._num_wished)

    def _widen(self, num_workers: int) -> None:
        with suppress(RuntimeError):  # this may be a reader's own thread, which must not end for it
            while self.num_workers < num_workers and not self._closed:
                self._add_thread()
                self.num_workers += 1

    def _add_thread(self) -> None:
        number = self._num_started
        self._threads = {other: thread for other, thread in self._threads.items() if thread.is_alive()}
        self._threads[number] = self._spawn(functools.partial(self._run, number), f"weightstream-reader-{number}")
        self._num_started += 1

    def _run(self, number: int) -> None:
        while True:
            with self._condition:
                self._reading.discard(number)
                if self._closed:
                    self._condition.notify_all()
                while (read := None if self._num_surplus else self._take()) is None:
                    if self._closed:
                        return
                    if self._num_surplus:
                        self._num_surplus -= 1
                        self._condition.notify()  # whoever woke this one meant one that reads
                        return
                    self._condition.wait()
                self._reading.add(number)
            read()
            del read  # it holds buffers that must not outlive the load

    def _take(self) -> Callable[[], None] | None:
        for step in range(len(self._queues)):
            index = (self._turn + step) % len(self._queues)
            read = self._queues[index].take()
            if read is not None:
                self._turn = index + 1
                # A read that has ended makes room for one more of its load; its thread may have taken another load's.
                if self._queues[index].has_part or len(self._queues) > 1:
                    self._condition.notify()
                return read
        return None
