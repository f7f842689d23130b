"""The clocks: the same contract for both, and what virtual time is in addition."""

from __future__ import annotations

import threading
import time

import pytest

from tests.fakes.clock import VirtualClock
from weightstream.scheduler.clock import Clock, SystemClock


@pytest.fixture(params=[SystemClock, VirtualClock])
def clock(request: pytest.FixtureRequest) -> Clock:
    made: Clock = request.param()
    return made


class TestBothClocks:
    def test_notification_wakes_all_waiters(self, clock: Clock) -> None:
        condition = clock.condition()
        results: list[bool] = []
        go = False

        def wait() -> None:
            with condition:
                woken = True
                while not go:
                    woken = condition.wait()
                results.append(woken)

        threads = [clock.spawn(wait, f"waiter-{i}") for i in range(3)]
        with condition:
            go = True
            condition.notify_all()
        for thread in threads:
            thread.join()
            assert not thread.is_alive()
        assert results == [True] * 3

    def test_wait_ends_at_its_timeout(self, clock: Clock) -> None:
        condition = clock.condition()
        found: list[tuple[bool, float]] = []

        def wait() -> None:
            begin = clock.now()
            with condition:
                woken = condition.wait(0.01)
            found.append((woken, clock.now() - begin))

        clock.spawn(wait, "waiter").join()
        ((woken, waited_s),) = found
        assert not woken
        assert waited_s >= 0.01 or waited_s == pytest.approx(0.01)

    def test_condition_is_held_again_after_a_wait(self, clock: Clock) -> None:
        condition = clock.condition()
        num_inside = 0
        most_inside = 0

        def enter() -> None:
            nonlocal num_inside, most_inside
            with condition:
                for _ in range(5):
                    condition.wait(0.0001)
                    num_inside += 1
                    most_inside = max(most_inside, num_inside)
                    num_inside -= 1

        for thread in [clock.spawn(enter, f"guest-{i}") for i in range(4)]:
            thread.join()
        assert most_inside == 1

    def test_now_never_goes_back(self, clock: Clock) -> None:
        times = [clock.now() for _ in range(3)]
        clock.spawn(lambda: times.append(clock.now()), "asker").join()
        assert times == sorted(times)

    def test_threads_are_daemons_with_their_name(self, clock: Clock) -> None:
        seen: list[threading.Thread] = []
        clock.spawn(lambda: seen.append(threading.current_thread()), "some-name").join()
        assert (seen[0].name, seen[0].daemon) == ("some-name", True)

    def test_join_returns_at_its_timeout(self, clock: Clock) -> None:
        end = threading.Event()
        thread = clock.spawn(lambda: void(end.wait(30)), "sleeper")
        thread.join(0.001)
        assert thread.is_alive()
        end.set()
        thread.join()


def void(_: object) -> None:
    """Drop a value."""


class TestVirtualClock:
    def test_sleeps_take_no_real_time_and_add_up_exactly(self) -> None:
        clock = VirtualClock()
        woken: list[tuple[str, float]] = []

        def sleep(name: str, seconds: float, times: int) -> None:
            for _ in range(times):
                clock.sleep(seconds)
                woken.append((name, clock.now()))

        begin = time.perf_counter()
        with clock.participate():  # until both are there
            threads = [clock.spawn(lambda: sleep("a", 1000, 3), "a"), clock.spawn(lambda: sleep("b", 1500, 2), "b")]
        for thread in threads:
            thread.join()
        assert sorted(woken, key=lambda one: (one[1], one[0])) == [
            *(("a", 1000), ("b", 1500), ("a", 2000)),
            *(("a", 3000), ("b", 3000)),
        ]
        assert clock.now() == 3000
        assert time.perf_counter() - begin < 100  # of 3000 s; that it is some ms is not for a test to assert

    def test_time_stands_still_while_a_participant_runs(self) -> None:
        clock = VirtualClock()
        running, end = threading.Event(), threading.Event()

        def run() -> None:
            running.set()
            end.wait(30)

        runner = clock.spawn(run, "runner")
        assert running.wait(30)
        sleeper = clock.spawn(lambda: clock.sleep(5), "sleeper")
        sleeper.join(0.01)
        assert sleeper.is_alive()
        assert clock.now() == 0
        end.set()
        runner.join()
        sleeper.join()
        assert clock.now() == 5

    def test_notified_waiter_counts_as_running_before_it_wakes(self) -> None:
        """Else time could jump to the other thread's timer between the notification and the wake-up."""
        assert [self._time_of_wake_up() for _ in range(50)] == [1] * 50

    @staticmethod
    def _time_of_wake_up() -> float:
        clock = VirtualClock()
        condition = clock.condition()
        is_ready = False
        seen: list[float] = []

        def wait() -> None:
            with condition:
                while not is_ready:
                    condition.wait()
                seen.append(clock.now())

        def notify() -> None:
            nonlocal is_ready
            clock.sleep(1)
            with condition:
                is_ready = True
                condition.notify_all()
            clock.sleep(100)  # blocks at once: the waiter alone keeps time from going on

        with clock.participate():
            threads = [clock.spawn(wait, "waiter"), clock.spawn(notify, "notifier")]
        for thread in threads:
            thread.join()
        return seen[0]

    def test_waiters_for_one_moment_wake_one_at_a_time_in_order(self) -> None:
        clock = VirtualClock()
        order: list[int] = []

        def wait(number: int) -> None:
            clock.sleep(number / 16)  # so that they begin their wait in this order
            clock.sleep(1 - number / 16)
            order.append(number)

        with clock.participate():
            threads = [clock.spawn(lambda i=i: wait(i), f"waiter-{i}") for i in range(8)]  # type: ignore[misc]
        for thread in threads:
            thread.join()
        assert order == list(range(8))
        assert clock.now() == 1

    def test_join_of_a_participant_takes_virtual_time(self) -> None:
        clock = VirtualClock()
        found: list[tuple[float, bool]] = []

        def join() -> None:
            thread = clock.spawn(lambda: clock.sleep(10), "sleeper")
            thread.join(3)
            found.append((clock.now(), thread.is_alive()))
            thread.join()
            found.append((clock.now(), thread.is_alive()))

        clock.spawn(join, "joiner").join()
        assert found == [(3, True), (10, False)]

    def test_wait_that_is_too_short_to_be_seen_still_ends(self) -> None:
        clock = VirtualClock()

        def wait() -> None:
            clock.sleep(1e9)
            until = clock.now() + 0.1
            while (left := until - clock.now()) > 0:
                clock.sleep(left / 2)  # gets below what 1e9 can be added to

        thread = clock.spawn(wait, "waiter")
        thread.join(30)
        assert not thread.is_alive()

    def test_who_is_not_woken_raises_instead_of_hanging(self) -> None:
        clock = VirtualClock(patience_s=0.01)
        condition = clock.condition()
        with condition, pytest.raises(TimeoutError, match="nothing woke MainThread"):
            condition.wait()

    def test_outsider_cannot_wait_for_a_moment(self) -> None:
        condition = VirtualClock().condition()
        with condition, pytest.raises(RuntimeError, match="participate"):
            condition.wait(1)
