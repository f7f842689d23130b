"""Time and threads, as the scheduler uses them. Tests bring a clock of their own, which runs in virtual time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from weightstream.prefetch.readers import Condition, Thread

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """Where every wait of a load goes through: a load that blocks anywhere else could not run in virtual time."""

    def now(self) -> float:
        """Return seconds since some fixed moment."""
        ...

    def condition(self) -> Condition:
        """Return a new condition variable with a lock of its own."""
        ...

    def spawn(self, target: Callable[[], None], name: str) -> Thread:
        """Start a daemon thread."""
        ...


class SystemClock:
    """The machine's clock and ordinary threads."""

    def now(self) -> float:
        return time.perf_counter()

    def condition(self) -> Condition:
        return threading.Condition()

    def spawn(self, target: Callable[[], None], name: str) -> Thread:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread
