"""An accelerator whose copies really happen later, on another thread, and which sees slots that are reused too early."""

from __future__ import annotations

import mmap
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from weightstream.device.backend import Event, Spread, cast_or_copy
from weightstream.prefetch.memory import allocate
from weightstream.prefetch.readers import Thread
from weightstream.scheduler.clock import Clock, SystemClock

__all__ = ["FRESH", "DistantAccelerator", "FakeAccelerator", "Hazard"]

#: What fresh device memory holds.
FRESH = 0xA5


@dataclass(frozen=True, slots=True)
class Hazard:
    """A source that changed between the submission of a copy and the copy itself."""

    operation: int


@dataclass(slots=True)
class _Operation:
    number: int
    source: torch.Tensor
    fingerprint: int
    act: Callable[[torch.Tensor], object]


class FakeAccelerator:
    """A `device.backend.Backend`; tensors on the CPU stand for device memory.

    Copies are done in order by an engine thread. A test can hold it and let it do one operation after the other, or
    give it a speed. What a test looks at: `hazards`, and the counts.

    It takes nothing from malloc that is as large as what it copies, so that a test which measures memory measures the
    loader's: its device memory is mapped, and a checksum tells it whether a source has changed.

    Args:
        clock: whose threads and time it uses.
        bytes_per_s: how fast host memory is copied; None: in no time.
        refuses_pinning: answer `pin` with None.
    """

    lands = False
    pinnable = True
    numa_node: int | None = None

    def __init__(
        self, clock: Clock | None = None, *, bytes_per_s: float | None = None, refuses_pinning: bool = False
    ) -> None:
        self.device = torch.device("cpu")
        self.refuses_pinning = refuses_pinning
        self.pin_error: Exception | None = None  # raised by `pin`
        self.hazards: list[Hazard] = []
        self.num_copies = 0
        self.num_spreads = 0
        self.num_allocations = 0
        self.num_pins = 0
        self.num_unpins = 0
        self.num_done = 0
        self._clock = clock or SystemClock()
        self._bytes_per_s = bytes_per_s
        self._condition = self._clock.condition()
        self._queue: deque[_Operation] = deque()
        self._num_submitted = 0
        self._permits: int | None = None
        self._closed = False
        self._engine: Thread | None = None

    # What a test does.

    def hold(self) -> None:
        """Do no further operation until it is released."""
        with self._condition:
            self._permits = 0

    def release(self, num_operations: int | None = None) -> None:
        """Let the engine do so many operations more, those to come included; None: all."""
        with self._condition:
            self._permits = None if num_operations is None else (self._permits or 0) + num_operations
            self._condition.notify_all()

    def wait_submitted(self, num_operations: int) -> None:
        """Block until so many operations have been submitted in all."""
        with self._condition:
            while self._num_submitted < num_operations:
                self._condition.wait()

    def close(self) -> None:
        """Do what is left to do, and end the engine thread."""
        self.release()
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._engine is not None:
            self._engine.join()

    # The protocol.

    def pin(self, memory: mmap.mmap) -> Callable[[], None] | None:
        if self.pin_error is not None:
            raise self.pin_error
        if self.refuses_pinning:
            return None
        self.num_pins += 1
        return self._unpin

    def allocate(self, num_bytes: int, stream: object) -> tuple[torch.Tensor, memoryview | None]:
        self.num_allocations += 1
        return _device_memory(num_bytes).fill_(FRESH), None

    def follow(self, stream: object) -> None:
        """There is one stream, and the user's work is done when it calls."""

    def submitting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        assert destination.dtype == source.dtype == torch.uint8
        self.num_copies += 1
        self._submit(source, destination.copy_)

    def spread(self, source: torch.Tensor, parts: Sequence[Spread]) -> None:
        def distribute(source: torch.Tensor) -> None:
            bounce = _device_memory(source.numel()).copy_(source)
            for part in parts:
                cast_or_copy(part.destination, bounce[part.offset : part.offset + part.num_bytes], part.dtype)

        self.num_spreads += 1
        self._submit(source, distribute)

    def record(self) -> Event | None:
        return _Recorded(self, self._num_submitted)

    def run(self, action: Callable[[], None], stream: object) -> None:
        action()

    # The engine.

    def wait_done(self, num_operations: int) -> None:
        """Block until so many operations have been done in all."""
        with self._condition:
            while self.num_done < num_operations:
                self._condition.wait()

    def _unpin(self) -> None:
        self.num_unpins += 1

    def _submit(self, source: torch.Tensor, act: Callable[[torch.Tensor], object]) -> None:
        with self._condition:
            assert not self._closed
            self._num_submitted += 1
            self._queue.append(_Operation(self._num_submitted, source, _fingerprint(source), act))
            if self._engine is None:
                self._engine = self._clock.spawn(self._work, "fake-accelerator")
            self._condition.notify_all()

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._queue or self._permits == 0:
                    if self._closed and not self._queue:
                        return
                    self._condition.wait()
                operation = self._queue.popleft()
                if self._permits is not None:
                    self._permits -= 1
                self._let_time_pass(operation.source.numel())
            if _fingerprint(operation.source) != operation.fingerprint:
                self.hazards.append(Hazard(operation.number))
            operation.act(operation.source)
            with self._condition:
                self.num_done = operation.number
                self._condition.notify_all()

    def _let_time_pass(self, num_bytes: int) -> None:
        if self._bytes_per_s is not None:
            until = self._clock.now() + num_bytes / self._bytes_per_s
            while (left := until - self._clock.now()) > 0:
                self._condition.wait(left)


class DistantAccelerator(FakeAccelerator):
    """One whose memory this process does not have, as it has none of a real one's, to measure what a load itself takes.

    Copies happen later, and sources are checked, but what they hold is dropped: every tensor on it stays zero.
    """

    def allocate(self, num_bytes: int, stream: object) -> tuple[torch.Tensor, memoryview | None]:
        self.num_allocations += 1
        return _device_memory(num_bytes), None  # never written to, so the kernel gives it no page

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.num_copies += 1
        self._submit(source, _drop)

    def spread(self, source: torch.Tensor, parts: Sequence[Spread]) -> None:
        self.num_spreads += 1
        self._submit(source, _drop)


def _device_memory(num_bytes: int) -> torch.Tensor:
    """Map zeroed memory, which begins on a page, as a device's does on 256 bytes or more; torch's on the CPU only on 64."""
    return torch.frombuffer(allocate(num_bytes), dtype=torch.uint8)


def _fingerprint(source: torch.Tensor) -> int:
    return zlib.crc32(source.numpy().data)


def _drop(source: torch.Tensor) -> None:
    """Leave it where it is."""


class _Recorded:
    """An event behind the first `num_operations` operations."""

    def __init__(self, accelerator: FakeAccelerator, num_operations: int) -> None:
        self._accelerator = accelerator
        self._num_operations = num_operations

    def synchronize(self) -> None:
        self._accelerator.wait_done(self._num_operations)

    def query(self) -> bool:
        return self._accelerator.num_done >= self._num_operations
