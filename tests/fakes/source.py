"""A disk with a speed of its own, which fails or stops where a test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Literal

from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.memory import PAGE_BYTES
from weightstream.prefetch.source import ByteRange, FileSource
from weightstream.scheduler.clock import Clock, SystemClock

__all__ = ["Disk", "Gate", "PacedSource"]


class Gate:
    """A point that a thread reaches and does not pass until the gate is open.

    Args:
        clock: None: who waits at the gate counts as running, so virtual time stands still. A clock: it counts as
            blocked, as in a file system that does not answer, and time goes on without it.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock
        self._condition = threading.Condition() if clock is None else clock.condition()
        self._reached = threading.Event()
        self._is_open = False

    def pass_through(self) -> None:
        self._reached.set()
        with self._condition:
            while not self._is_open:
                if not self._condition.wait(30 if self._clock is None else None):
                    raise TimeoutError("nobody opened the gate")

    def wait_reached(self) -> None:
        """Block until a thread has come to the gate."""
        if not self._reached.wait(30):
            raise TimeoutError("nobody came to the gate")

    def open(self) -> None:
        with self._condition:
            self._is_open = True
            self._condition.notify_all()


class Disk:
    """A serial disk that all readers share; `open` is for `Machine.open_source`.

    Reads are numbered from 0 in the order in which they begin, over all sources.

    Args:
        clock: whose time reads take.
        bytes_per_s: how fast the disk is; None: reads take no time.
        latency_s: what each read waits before that, beside all others.
        io: `direct` forces chunks in the layout of the file, whether or not the file system has direct I/O.

    Attributes:
        is_cached: whether everything is said to be in the page cache.
    """

    def __init__(
        self,
        clock: Clock | None = None,
        *,
        bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        io: Literal["buffered", "direct"] = "buffered",
    ) -> None:
        self.num_begun = 0
        self.num_bytes_begun = 0
        self.num_open = 0
        #: Set whenever a source has been closed: a load lets go of its source after everything else.
        self.closed = threading.Event()
        self.is_cached = False
        self._io = io
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._clock = clock or SystemClock()
        self._condition = self._clock.condition()
        self._free_at = 0.0
        self._gates: dict[int, Gate] = {}
        self._errors: dict[int, BaseException] = {}

    def stop_at(self, read: int, *, is_stuck: bool = False) -> Gate:
        """Let a read wait at a gate. `is_stuck`: virtual time goes on while it waits."""
        gate = self._gates[read] = Gate(self._clock if is_stuck else None)
        return gate

    def fail_at(self, read: int, error: BaseException) -> None:
        """Let a read fail."""
        self._errors[read] = error

    def open(
        self,
        checkpoint: Checkpoint,
        config: PrefetchConfig,
        *,
        pause: Callable[[float], bool],
        on_retry: Callable[[], None],
        on_fallback: Callable[[str], None],
    ) -> PacedSource:
        self.num_open += 1
        self.closed.clear()
        inner = FileSource(checkpoint, config, pause=pause, on_retry=on_retry, on_fallback=on_fallback)
        return PacedSource(self, inner, is_direct=self._io == "direct")

    def transfer(self, num_bytes: int) -> None:
        """Take as long as a read of so many bytes does, behind all reads that began earlier."""
        with self._condition:
            number = self.num_begun
            self.num_begun += 1
            self.num_bytes_begun += num_bytes
            answers_at = self._clock.now() + self._latency_s
            while (left := answers_at - self._clock.now()) > 0:
                self._condition.wait(left)
            if self._bytes_per_s is not None:
                until = max(self._clock.now(), self._free_at) + num_bytes / self._bytes_per_s
                self._free_at = until
                while (left := until - self._clock.now()) > 0:
                    self._condition.wait(left)
        gate = self._gates.get(number)
        if gate is not None:
            gate.pass_through()
        if number in self._errors:
            raise self._errors[number]

    def let_go(self) -> None:
        self.num_open -= 1
        self.closed.set()


class PacedSource:
    """A `prefetch.source.Source`: the bytes of a `FileSource` at the speed of a `Disk`."""

    def __init__(self, disk: Disk, inner: FileSource, *, is_direct: bool) -> None:
        self._disk = disk
        self._inner = inner
        self._is_direct = is_direct

    def has_direct(self, shard: int) -> bool:
        return self._is_direct

    def resident_shares(self, wanted: Sequence[ByteRange]) -> list[float | None]:
        return [float(self._disk.is_cached)] * len(wanted)

    def read(self, wanted: ByteRange, buffers: Sequence[memoryview]) -> None:
        self._disk.transfer(wanted.end - wanted.begin)
        self._inner.read(wanted, buffers)

    def read_direct(self, wanted: ByteRange, memory: memoryview) -> None:
        self._disk.transfer(wanted.end - wanted.begin)
        if self._inner.has_direct(wanted.shard):
            self._inner.read_direct(wanted, memory)
        else:
            shift = wanted.begin % PAGE_BYTES
            self._inner.read(wanted, [memory[shift : shift + wanted.end - wanted.begin]])

    def close(self) -> None:
        self._inner.close()
        self._disk.let_go()
