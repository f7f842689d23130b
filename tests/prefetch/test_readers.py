"""The reader threads: whose turn it is, who wakes them, how they end."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator

import pytest

from weightstream.prefetch.readers import ReaderPool

#: What a wait for something that must happen may take before the test has failed.
LIMIT_S = 20


class Reads:
    """A queue of reads. It gives nothing out unless it `is_open`. `num_looks`: how often somebody asked."""

    def __init__(self, *reads: Callable[[], None], has_part: bool = False) -> None:
        self.reads = deque(reads)
        self.is_open = True
        self.has_part = has_part
        self.num_looks = 0
        #: Set, with the pool's lock held, when somebody looked and got nothing: he waits when the lock is free.
        self.was_looked_at = threading.Event()

    def take(self) -> Callable[[], None] | None:
        self.num_looks += 1
        if self.is_open and self.reads:
            return self.reads.popleft()
        self.was_looked_at.set()
        return None


class Gate:
    """A read that tells when it has begun and ends when it may."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.may_end.wait(LIMIT_S)


class Telling(threading.Condition):
    """A condition that tells when it was notified."""

    def __init__(self) -> None:
        super().__init__()
        self.notified = threading.Event()

    def notify_all(self) -> None:
        super().notify_all()
        self.notified.set()


class Pools:
    """Makes pools, and closes them when the test ends."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.pools: list[ReaderPool] = []

    def spawn(self, target: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def __call__(self, num_workers: int, condition: threading.Condition | None = None) -> ReaderPool:
        pool = ReaderPool(num_workers, condition or threading.Condition(), self.spawn)
        self.pools.append(pool)
        return pool

    @property
    def num_alive(self) -> int:
        return sum(thread.is_alive() for thread in self.threads)


@pytest.fixture(name="make_pool")
def fixture_make_pool() -> Generator[Pools, None, None]:
    pools = Pools()
    yield pools
    for pool in pools.pools:
        pool.close(LIMIT_S)
    for thread in pools.threads:
        thread.join(LIMIT_S)  # `close` does not wait for those that were stuck
    assert pools.num_alive == 0


def test_reads_of_an_attached_queue_are_done(make_pool: Pools) -> None:
    done = threading.Event()
    make_pool(1).attach(Reads(done.set))
    assert done.wait(LIMIT_S)


def test_all_threads_read_at_the_same_time(make_pool: Pools) -> None:
    together = threading.Barrier(4)

    def meet() -> None:
        together.wait(LIMIT_S)

    make_pool(3).attach(Reads(meet, meet, meet))
    meet()


def test_queues_take_turns(make_pool: Pools) -> None:
    order: list[str] = []
    finished = threading.Event()
    first, gate = Reads(), Gate()
    pool = make_pool(1)
    pool.attach(Reads(gate))
    assert gate.begun.wait(LIMIT_S)  # the only thread is busy: nothing is taken before both queues are there
    first.reads.extend([lambda: order.append("a")] * 3)
    pool.attach(first)
    pool.attach(Reads(*[lambda: order.append("b")] * 3, finished.set))
    gate.may_end.set()
    assert finished.wait(LIMIT_S)
    assert order in (list("ababab"), list("bababa"))


def test_queue_that_has_nothing_is_passed_over(make_pool: Pools) -> None:
    done = threading.Event()
    pool = make_pool(1)
    pool.attach(Reads())
    pool.attach(Reads(done.set))
    assert done.wait(LIMIT_S)


def test_waking_makes_idle_threads_look_again(make_pool: Pools) -> None:
    done = threading.Event()
    queue = Reads(done.set)
    queue.is_open = False
    pool = make_pool(1)
    pool.attach(queue)
    assert queue.was_looked_at.wait(LIMIT_S)
    queue.is_open = True
    pool.wake()
    assert done.wait(LIMIT_S)


def wait_for_looks(queue: Reads, count: int) -> None:
    """Wait until so many looks have been taken, the last of them in vain: whoever took it sleeps when the lock is free."""
    until = time.monotonic() + LIMIT_S
    while queue.num_looks < count:
        assert time.monotonic() < until
        queue.was_looked_at.wait(0.01)


def test_what_is_there_for_one_wakes_one(make_pool: Pools) -> None:
    """All of eight idle ones would look, for each slot that comes back."""
    queue = Reads()
    condition = threading.Condition()
    pool = make_pool(8, condition)
    pool.attach(queue)
    wait_for_looks(queue, 8)
    for number in range(1, 6):
        done = threading.Event()
        with condition:  # nobody is between looking and sleeping
            queue.reads.append(done.set)
        pool.wake(1)
        assert done.wait(LIMIT_S)
        wait_for_looks(queue, 8 + 2 * number)  # it takes the read, and looks once more
        with condition:
            assert queue.num_looks == 8 + 2 * number


def test_further_parts_of_what_was_there_for_one_wake_others(make_pool: Pools) -> None:
    together = threading.Barrier(4)

    def meet() -> None:
        together.wait(LIMIT_S)

    queue = Reads(has_part=True)
    condition = threading.Condition()
    pool = make_pool(4, condition)
    pool.attach(queue)
    wait_for_looks(queue, 4)
    with condition:
        queue.reads.extend([meet] * 4)
    pool.wake(1)
    wait_for_looks(queue, 12)  # each of the four has read, and looked once more


def test_read_that_lets_others_go_on_wakes_them(make_pool: Pools) -> None:
    """As in a load: each read makes the next one possible, and says so before it ends."""
    pool = make_pool(4)
    queue = Reads()
    finished = threading.Event()

    def read(left: int) -> None:
        if left:
            queue.reads.append(lambda: read(left - 1))
            pool.wake()
        else:
            finished.set()

    queue.reads.append(lambda: read(500))
    pool.attach(queue)
    assert finished.wait(LIMIT_S)


def test_detached_queue_gives_nothing_more_and_its_read_in_hand_goes_on(make_pool: Pools) -> None:
    gate, later = Gate(), threading.Event()
    queue = Reads(gate, later.set)
    pool = make_pool(1)
    pool.attach(queue)
    assert gate.begun.wait(LIMIT_S)
    pool.detach(queue)
    done = threading.Event()
    pool.attach(Reads(done.set))
    gate.may_end.set()
    assert done.wait(LIMIT_S)
    assert not later.is_set()
    assert len(queue.reads) == 1


def test_queue_may_be_detached_twice(make_pool: Pools) -> None:
    pool, queue = make_pool(1), Reads()
    pool.attach(queue)
    pool.detach(queue)
    pool.detach(queue)


def test_closing_ends_idle_threads(make_pool: Pools) -> None:
    pool = make_pool(3)
    assert make_pool.num_alive == 0  # who makes a pool may be interrupted before anybody can close it
    pool.attach(Reads())
    assert make_pool.num_alive == 3
    pool.close(LIMIT_S)
    assert make_pool.num_alive == 0


def test_closing_waits_for_the_read_in_hand_and_starts_no_other(make_pool: Pools) -> None:
    gate, later, condition = Gate(), threading.Event(), Telling()
    pool = make_pool(1, condition)
    pool.attach(Reads(gate, later.set))
    assert gate.begun.wait(LIMIT_S)
    condition.notified.clear()
    closer = threading.Thread(target=pool.close, args=(LIMIT_S,))
    closer.start()
    assert condition.notified.wait(LIMIT_S)
    gate.may_end.set()
    closer.join(LIMIT_S)
    assert make_pool.num_alive == 0
    assert not later.is_set()


def test_closing_does_not_wait_for_a_thread_that_is_stuck(make_pool: Pools) -> None:
    gate = Gate()
    pool = make_pool(1)
    pool.attach(Reads(gate))
    assert gate.begun.wait(LIMIT_S)
    pool.close(0)
    assert make_pool.num_alive == 1
    gate.may_end.set()
    make_pool.threads[0].join(LIMIT_S)
    assert make_pool.num_alive == 0


def test_closing_waits_for_all_stuck_threads_together(make_pool: Pools) -> None:
    gates = [Gate() for _ in range(8)]
    pool = make_pool(8)
    pool.attach(Reads(*gates))
    for gate in gates:
        assert gate.begun.wait(LIMIT_S)
    begin = time.monotonic()
    pool.close(0.25)
    assert 0.25 <= time.monotonic() - begin < 1.5  # one after the other, they would take 2
    for gate in gates:
        gate.may_end.set()


def test_threads_in_place_of_stuck_ones_go_on(make_pool: Pools) -> None:
    gates = [Gate(), Gate()]
    done = threading.Event()
    pool = make_pool(2)
    pool.attach(Reads(*gates, done.set))
    for gate in gates:
        assert gate.begun.wait(LIMIT_S)
    pool.replace_stuck(1)
    assert done.wait(LIMIT_S)
    for gate in gates:
        gate.may_end.set()


@pytest.mark.parametrize("is_late", [False, True], ids=["before it is replaced", "after that"])
def test_thread_that_comes_back_after_it_was_replaced_is_one_too_many(make_pool: Pools, *, is_late: bool) -> None:
    gate, pool = Gate(), make_pool(2)

    def read() -> None:
        gate()
        pool.come_back()

    pool.attach(Reads(read))
    assert gate.begun.wait(LIMIT_S)
    if is_late:
        pool.replace_stuck(1)
    gate.may_end.set()
    if not is_late:
        while make_pool.num_alive > 1:  # whichever of the two it is that ends
            make_pool.threads[0].join(0.01)
            make_pool.threads[1].join(0.01)
        pool.replace_stuck(1)
    while make_pool.num_alive > 2:
        for thread in make_pool.threads:
            thread.join(0.01)
    gates = [Gate(), Gate()]
    pool.attach(Reads(*gates))
    for one in gates:  # two are left, and both read
        assert one.begun.wait(LIMIT_S)
        one.may_end.set()
    assert make_pool.num_alive == 2


def test_read_is_let_go_before_the_thread_waits_again(make_pool: Pools) -> None:
    """What a read holds are buffers: an idle thread must not keep them."""
    released = threading.Event()

    class Read:
        def __call__(self) -> None:
            """Do nothing."""

        def __del__(self) -> None:
            released.set()

    make_pool(1).attach(Reads(Read()))
    assert released.wait(LIMIT_S)


def test_threads_that_cannot_be_had_are_done_without() -> None:
    """A container may have so many and no more. The reader that asks for others goes on."""
    left = [3]

    def spawn(target: Callable[[], None], name: str) -> threading.Thread:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread

    pool = ReaderPool(8, threading.Condition(), spawn)
    pool.attach(Reads())
    assert pool.num_workers == 3
    done = threading.Event()
    pool.attach(Reads(lambda: pool.widen(5), done.set))
    assert done.wait(LIMIT_S)
    pool.replace_stuck(1)
    assert pool.num_workers == 2
    left[0] = 2
    pool.widen(3)  # later there may be some again
    assert (pool.num_workers, left[0]) == (3, 1)
    pool.close(LIMIT_S)
    left[0] = 0
    pool = ReaderPool(8, threading.Condition(), spawn)
    with pytest.raises(RuntimeError, match="new thread"):
        pool.attach(Reads())
    with pytest.raises(RuntimeError, match="new thread"):
        pool.widen(8)


def test_threads_are_daemons_by_the_pool_s_names(make_pool: Pools) -> None:
    pool = make_pool(2)
    pool.attach(Reads())
    pool.replace_stuck(1)
    assert [thread.name for thread in make_pool.threads] == [f"weightstream-reader-{i}" for i in range(3)]
