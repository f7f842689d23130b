"""Virtual time for real threads.

Every thread that a `VirtualClock` starts is a participant. Time stands still while one of them runs, and when all are
blocked in waits of this clock it jumps to the earliest moment that one of them waits for. What a load computes then
depends on how long things take by definition, never on how fast the machine is.

Three things make that exact. A waiter counts as running from the moment it is notified, not from when it wakes up, so
time cannot slip away in between. A waiter is registered before it lets go of the lock, so no notification is lost. Of
several waiters for the same moment one is woken at a time, in the order in which they began to wait.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType

__all__ = ["VirtualClock"]


class _Sleeper:
    """A thread in a wait. `is_counted`: whether it is a participant."""

    def __init__(self, *, is_counted: bool) -> None:
        self.is_counted = is_counted
        self.is_woken = False
        self.is_notified = False
        self.signal = threading.Event()


class VirtualClock:
    """A `scheduler.clock.Clock`.

    Args:
        patience_s: real seconds after which a wait raises TimeoutError rather than hang.
    """

    def __init__(self, *, patience_s: float = 30.0) -> None:
        self.patience_s = patience_s
        self._mutex = threading.Lock()
        self._idle = threading.Condition(self._mutex)
        self._now = 0.0
        self._num_running = 0
        self._timers: list[tuple[float, int, _Sleeper]] = []
        self._numbers = itertools.count()
        self._thread = threading.local()

    def now(self) -> float:
        return self._now

    def condition(self) -> _VirtualCondition:
        return _VirtualCondition(self)

    def spawn(self, target: Callable[[], None], name: str) -> _VirtualThread:
        return _VirtualThread(self, target, name)

    def sleep(self, seconds: float) -> None:
        """Wait for so many virtual seconds. For participants."""
        condition = self.condition()
        with condition:
            condition.wait(seconds)

    def wait_idle(self) -> None:
        """Block until every participant waits for something that time will not bring. For outsiders."""
        with self._idle:
            if not self._idle.wait_for(lambda: self._num_running == 0 and not self._timers, self.patience_s):
                raise TimeoutError(f"{self._num_running} threads still run after {self.patience_s} real seconds")

    @contextmanager
    def participate(self) -> Generator[None, None, None]:
        """Make the calling thread a participant: time stands still until it waits, or leaves the context."""
        assert not self.is_participant
        self._join()
        self._thread.is_participant = True
        try:
            yield
        finally:
            self._thread.is_participant = False
            self._leave()

    @property
    def is_participant(self) -> bool:
        """Whether the calling thread is one."""
        return getattr(self._thread, "is_participant", False)

    def _join(self) -> None:
        with self._mutex:
            self._num_running += 1

    def _leave(self) -> None:
        with self._mutex:
            self._num_running -= 1
            self._advance()

    def _fall_asleep(self, sleeper: _Sleeper, timeout: float | None) -> None:
        with self._mutex:
            if timeout is not None:
                deadline = self._now + max(0.0, timeout)
                if timeout > 0 and deadline == self._now:  # too short to be seen: who waits in a loop would hang
                    deadline = math.nextafter(self._now, math.inf)
                heapq.heappush(self._timers, (deadline, next(self._numbers), sleeper))
            if sleeper.is_counted:
                self._num_running -= 1
                self._advance()

    def _wake(self, sleeper: _Sleeper) -> None:
        """Wake a sleeper, once. The mutex is held."""
        if not sleeper.is_woken:
            sleeper.is_woken = True
            self._num_running += sleeper.is_counted
            sleeper.signal.set()

    def _advance(self) -> None:
        """Go on to the earliest timer if nobody runs. The mutex is held."""
        while self._num_running == 0 and self._timers:
            deadline, _, sleeper = heapq.heappop(self._timers)
            if not sleeper.is_woken:
                self._now = max(self._now, deadline)
                self._wake(sleeper)
        if self._num_running == 0:
            self._idle.notify_all()

    def _notify(self, sleepers: list[_Sleeper]) -> None:
        with self._mutex:
            for sleeper in sleepers:
                sleeper.is_notified = not sleeper.is_woken
                self._wake(sleeper)

    def _give_up(self, sleeper: _Sleeper) -> None:
        with self._mutex:
            if sleeper.is_woken:
                return
            self._wake(sleeper)
            state = f"{self._num_running - sleeper.is_counted} others run at virtual second {self._now}"
        raise TimeoutError(
            f"nothing woke {threading.current_thread().name} for {self.patience_s} real seconds: {state}"
        )


class _VirtualCondition:
    """A `prefetch.readers.Condition`. Outsiders may notify, and wait without a timeout."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._sleepers: list[_Sleeper] = []

    def __enter__(self) -> bool:
        return self._lock.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait; return whether it was a notification that ended it."""
        sleeper = _Sleeper(is_counted=self._clock.is_participant)
        if timeout is not None and not sleeper.is_counted:
            raise RuntimeError("only participants may wait for a moment in virtual time: see `participate`")
        self._sleepers.append(sleeper)
        self._clock._fall_asleep(sleeper, timeout)
        self._lock.release()
        try:
            if not sleeper.signal.wait(self._clock.patience_s):
                self._clock._give_up(sleeper)
        finally:
            self._lock.acquire()
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)
        return sleeper.is_notified

    def notify(self, n: int = 1) -> None:
        sleepers, self._sleepers = self._sleepers[:n], self._sleepers[n:]
        self._clock._notify(sleepers)

    def notify_all(self) -> None:
        self.notify(len(self._sleepers))


class _VirtualThread:
    """A `prefetch.readers.Thread`: a participant from before it starts until after it has told those who join it."""

    def __init__(self, clock: VirtualClock, target: Callable[[], None], name: str) -> None:
        self._clock = clock
        self._target = target
        self._ended = clock.condition()
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        clock._join()
        self._thread.start()

    def _run(self) -> None:
        self._clock._thread.is_participant = True
        try:
            self._target()
        finally:
            with self._ended:
                self._has_ended = True
                self._ended.notify_all()
            self._clock._leave()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end: in virtual time as a participant, in real time otherwise."""
        if not self._clock.is_participant:
            self._thread.join(timeout)
            return
        until = None if timeout is None else self._clock.now() + timeout
        with self._ended:
            while not self._has_ended:
                left = None if until is None else until - self._clock.now()
                if left is not None and left <= 0:
                    return
                self._ended.wait(left)
        self._thread.join()

    def is_alive(self) -> bool:
        return self._thread.is_alive()
