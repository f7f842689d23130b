"""The course of one load's chunks: where each of them is, and what the stations of a flow share beside that.

A chunk is filled, then filled and waiting to be copied, then at its place. One lock guards the state of all stations. It
is never held while a slot is given back, because that wakes the reader pool, whose lock is taken before this one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from weightstream.prefetch.memory import PAGE_BYTES
from weightstream.prefetch.ring import Slot
from weightstream.scheduler.clock import Clock
from weightstream.scheduler.ledger import Ledger
from weightstream.scheduler.plan import Chunk

__all__ = ["Course", "Fill", "Filled"]


class Filled(NamedTuple):
    """A chunk whose bytes are in a slot, in the file's layout from `shift` on, or packed (None)."""

    chunk: Chunk
    slot: Slot
    shift: int | None


@dataclass(slots=True, eq=False)
class Fill:
    """A chunk that is being read: everything before `position` in its file has been given to readers.

    `tuned`: read in parts and measured, as the tuner says; else from the page cache, which is as fast as it is.
    `bounces`: read into the slot and copied at once, by the reader, to where the bytes belong in host memory: because it
    is read directly, or because a read that does not return must not write to the model's own memory.
    """

    chunk: Chunk
    slot: Slot | None
    direct: bool
    tuned: bool
    bounces: bool
    position: int
    left_bytes: int
    num_reading: int = 0
    given_up: bool = False

    @property
    def shift(self) -> int | None:
        """Where in the slot its bytes begin, in the layout of the file; None: they are packed."""
        return self.chunk.source.begin % PAGE_BYTES if self.direct or self.bounces else None


class Course:
    """See the module. Its attributes are looked at and changed with `condition` held.

    Args:
        clock: time, threads, and the condition that is the lock.
        ledger: where time is booked; its recorder is told what becomes of chunks.

    Attributes:
        fills: the chunks that are being read or hashed, by number.
        filled: those that wait to be copied to a device.
        placed: those whose bytes are where they belong, and whose tensors are not placed yet.
        error: what ended it, first; nothing new is begun from then on.
        is_drained: nothing is at work any more, and nothing will come: its threads end.
        bytes_read: how much has arrived in host memory.
    """

    def __init__(self, clock: Clock, ledger: Ledger) -> None:
        self.clock = clock
        self.ledger = ledger
        self.recorder = ledger.recorder
        self.condition = clock.condition()
        self.fills: dict[int, Fill] = {}
        self.filled: deque[Filled] = deque()
        self.placed: list[Chunk] = []
        self.error: BaseException | None = None
        self.is_drained = False
        self.bytes_read = 0

    def hand_over(self, fill: Fill) -> int:
        """Pass a chunk to the load's thread whose bytes are there; return how many more can be copied now."""
        del self.fills[fill.chunk.index]
        if fill.slot is None or fill.bounces:
            self.placed.append(fill.chunk)
            return 0
        self.filled.append(Filled(fill.chunk, fill.slot, fill.shift))
        return int(self.ledger.copies)

    def fail(self, error: BaseException | None) -> None:
        """Note an error, unless there is none, or was one before."""
        self.error = self.error or error

    def stop(self, error: BaseException) -> None:
        """End the course with an error, from any thread."""
        with self.condition:
            self.fail(error)
            self.condition.notify_all()

    def pause(self, seconds: float) -> bool:
        """Wait on a reader thread, but not longer than until it is stopped; return whether it goes on."""
        until = self.clock.now() + seconds
        with self.condition:
            while self.error is None and (left := until - self.clock.now()) > 0:
                self.condition.wait(left)
            return self.error is None
