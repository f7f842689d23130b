"""The ring of slots: who holds which, how far it grows, what it says of itself."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import threading

import pytest

from weightstream.prefetch import ring as ring_module
from weightstream.prefetch.memory import PAGE_BYTES, Budget, MemoryAccount, allocate
from weightstream.prefetch.ring import Ring, RingStatistics, Slot, slot_bytes_for

SLOT = 4 * PAGE_BYTES
MIB = 2**20


def make_ring(num_slots: int = 4, *, slot_bytes: int = SLOT, limit_bytes: int | None = None) -> Ring:
    """A ring that has grown to so many slots, or to its limit."""
    ring = Ring(slot_bytes, Budget(num_slots * slot_bytes if limit_bytes is None else limit_bytes), MemoryAccount())
    ring.grow(num_slots)
    return ring


def acquire_all(ring: Ring) -> list[Slot]:
    slots: list[Slot] = []
    while (slot := ring.acquire_nowait()) is not None:
        slots.append(slot)
    return slots


def address_of(slot: Slot) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(slot.view))


def test_slot_holds_a_chunk_and_a_page_at_either_end() -> None:
    assert slot_bytes_for(16 * MIB) == 16 * MIB + 2 * PAGE_BYTES


def test_new_ring_has_nothing() -> None:
    ring = Ring(SLOT, Budget(10 * SLOT), MemoryAccount())
    assert ring.acquire_nowait() is None
    assert ring.statistics() == RingStatistics(0, 0, 0, 0, 0, 0)


def test_memory_that_the_kernel_refuses_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, account = Budget(100 * SLOT), MemoryAccount()
    ring = Ring(SLOT, budget, account)
    monkeypatch.setattr(ring_module, "_SEGMENT_BYTES", 2 * SLOT)
    left = itertools.count(2, -1)

    def allocate_two(num_bytes: int, *, numa_node: int | None = None) -> mmap.mmap:
        if next(left) <= 0:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return allocate(num_bytes, numa_node=numa_node)

    monkeypatch.setattr(ring_module, "allocate", allocate_two)
    assert [segment.num_bytes for segment in ring.grow(9)] == [2 * SLOT, 2 * SLOT]
    assert (ring.statistics().num_slots, budget.left_bytes, account.held_bytes) == (4, 96 * SLOT, 4 * SLOT)


def test_slots_are_page_aligned_and_apart() -> None:
    slots = acquire_all(make_ring(5))
    starts = sorted(address_of(slot) for slot in slots)
    assert len(slots) == 5
    assert all(len(slot.view) == SLOT for slot in slots)
    assert all(start % PAGE_BYTES == 0 for start in starts)
    assert all(second - first >= SLOT for first, second in itertools.pairwise(starts))


def test_slot_lies_where_it_says_in_its_segment() -> None:
    for number, slot in enumerate(acquire_all(make_ring(3))):
        slot.view[:4] = bytes([number] * 4)
        assert slot.segment.memory[slot.offset : slot.offset + 4] == bytes([number] * 4)


def test_slot_has_one_holder_at_a_time() -> None:
    ring = make_ring(2)
    first, second = acquire_all(ring)
    assert first is not second
    assert ring.acquire_nowait() is None
    ring.release(second)
    assert ring.acquire_nowait() is second
    assert ring.acquire_nowait() is None


def test_slot_that_was_freed_last_comes_first() -> None:
    ring = make_ring(3)
    first, second, third = acquire_all(ring)
    for slot in (first, third, second):
        ring.release(slot)
    assert acquire_all(ring) == [second, third, first]


def test_release_is_announced_once_the_slot_can_be_had() -> None:
    had: list[Slot | None] = []
    ring = Ring(SLOT, Budget(SLOT), MemoryAccount(), on_free=lambda _: had.append(ring.acquire_nowait()))
    ring.grow(1)
    (slot,) = acquire_all(ring)
    assert had == []
    ring.release(slot)
    assert had == [slot]


def test_slot_that_was_written_off_never_comes_back() -> None:
    ring = make_ring(2)
    lost, other = acquire_all(ring)
    ring.write_off(lost)
    ring.release(other)
    assert acquire_all(ring) == [other]
    assert ring.statistics() == RingStatistics(2, 0, 1, 0, 2 * SLOT, 0)


def test_growing_replaces_slots_that_were_written_off_within_the_budget() -> None:
    ring = make_ring(2, limit_bytes=3 * SLOT)
    for slot in acquire_all(ring):
        ring.write_off(slot)
    ring.grow(2)
    assert ring.statistics() == RingStatistics(3, 1, 2, 0, 3 * SLOT, 0)


def test_growing_stops_at_the_budget() -> None:
    ring = make_ring(100, limit_bytes=7 * SLOT + SLOT // 2)
    assert ring.statistics() == RingStatistics(7, 7, 0, 0, 7 * SLOT, 0)


def test_budget_is_shared_with_other_takers() -> None:
    budget = Budget(5 * SLOT)
    assert budget.take(3 * SLOT)
    ring = Ring(SLOT, budget, MemoryAccount())
    ring.grow(5)
    assert (ring.statistics().num_slots, budget.left_bytes) == (2, 0)


def test_growing_to_what_is_there_adds_nothing() -> None:
    ring = make_ring(3)
    assert ring.grow(3) == []
    assert ring.grow(1) == []
    assert ring.statistics().num_slots == 3


def test_growing_adds_what_is_missing_and_returns_it() -> None:
    ring = make_ring(2, limit_bytes=10 * SLOT)
    (segment,) = ring.grow(5)
    assert segment.num_bytes == 3 * SLOT
    assert len(acquire_all(ring)) == 5


@pytest.mark.parametrize(
    ("slot_bytes", "segments"),
    [
        pytest.param(16 * MIB, [64 * MIB, 64 * MIB, 32 * MIB], id="several slots to a segment"),
        pytest.param(80 * MIB, [80 * MIB] * 3, id="a slot larger than a segment"),
    ],
)
def test_ring_grows_in_segments(slot_bytes: int, segments: list[int]) -> None:
    ring = Ring(slot_bytes, Budget(2**40), MemoryAccount())
    grown = ring.grow(sum(segments) // slot_bytes)
    assert [segment.num_bytes for segment in grown] == segments
    assert not any(segment.pinned or segment.settled.is_set() for segment in grown)


def test_statistics_tell_what_is_page_locked() -> None:
    ring = Ring(SLOT, Budget(10 * SLOT), MemoryAccount())
    (first,) = ring.grow(2)
    ring.grow(5)
    first.pinned = True
    assert ring.statistics() == RingStatistics(5, 5, 0, 0, 5 * SLOT, 2 * SLOT)


def test_account_and_budget_follow_the_ring() -> None:
    budget, account = Budget(10 * SLOT), MemoryAccount()
    ring = Ring(SLOT, budget, account)
    ring.grow(4)
    assert (account.held_bytes, budget.left_bytes) == (4 * SLOT, 6 * SLOT)
    assert [segment.num_bytes for segment in ring.close()] == [4 * SLOT]
    assert (account.held_bytes, budget.left_bytes) == (0, 10 * SLOT)
    assert ring.acquire_nowait() is None
    assert ring.statistics() == RingStatistics(0, 0, 0, 0, 0, 0)


def test_no_slot_is_handed_to_two_threads() -> None:
    ring = make_ring(3)
    start = threading.Barrier(6)
    holders: dict[Slot, int] = {}
    clashes: list[Slot] = []

    def work(number: int) -> None:
        start.wait()
        for _ in range(300):
            slot = ring.acquire_nowait()
            if slot is not None:
                if holders.setdefault(slot, number) != number:
                    clashes.append(slot)
                slot.view[:1] = bytes([number])
                if slot.view[0] != number:
                    clashes.append(slot)
                del holders[slot]
                ring.release(slot)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    assert ring.statistics().num_free == 3


def test_retired_segment_goes_with_its_last_slot() -> None:
    budget, account = Budget(4 * 40 * MIB), MemoryAccount()
    ring = Ring(40 * MIB, budget, account)  # each slot is a segment of its own
    segments = ring.grow(4)
    held = [slot for slot in acquire_all(ring) if slot.segment in segments[:2]]
    for segment in segments[1:3]:
        ring.retire(segment)
    for slot in held:
        ring.release(slot)
    found = ring.statistics()
    assert (found.num_slots, found.num_free, found.num_bytes) == (3, 1, 3 * 40 * MIB)
    assert budget.left_bytes == 40 * MIB == 4 * 40 * MIB - account.held_bytes


def test_closed_ring_holds_what_was_written_off_until_nobody_writes_to_it() -> None:
    budget, account = Budget(3 * SLOT), MemoryAccount()
    ring = Ring(SLOT, budget, account)
    ring.grow(3)
    lost, also_lost, other = acquire_all(ring)
    ring.release(other)
    ring.write_off(lost)
    ring.write_off(also_lost)
    ring.close()
    ring.recover(lost)
    assert (budget.left_bytes, account.held_bytes) == (0, 3 * SLOT)
    ring.recover(also_lost)
    assert (budget.left_bytes, account.held_bytes) == (3 * SLOT, 0)
    assert ring.acquire_nowait() is None


def test_slot_that_is_recovered_is_a_slot_like_others_and_is_counted() -> None:
    had: list[Slot | None] = []
    ring = Ring(SLOT, Budget(SLOT), MemoryAccount(), on_free=lambda _: had.append(ring.acquire_nowait()))
    ring.grow(1)
    (slot,) = acquire_all(ring)
    ring.write_off(slot)
    assert ring.statistics() == RingStatistics(1, 0, 1, 0, SLOT, 0)
    ring.recover(slot)
    assert had == [slot]
    assert ring.statistics() == RingStatistics(1, 0, 0, 1, SLOT, 0)


def test_slot_that_is_recovered_in_a_retired_segment_goes_with_it() -> None:
    budget, account = Budget(SLOT), MemoryAccount()
    ring = Ring(SLOT, budget, account)
    (segment,) = ring.grow(1)
    (slot,) = acquire_all(ring)
    ring.write_off(slot)
    ring.retire(segment)
    assert account.held_bytes == SLOT
    ring.recover(slot)
    assert (budget.left_bytes, account.held_bytes, ring.acquire_nowait()) == (SLOT, 0, None)
    assert ring.statistics() == RingStatistics(0, 0, 0, 1, 0, 0)


def test_slot_that_is_given_back_to_a_closed_ring_is_nobodys() -> None:
    ring = make_ring(1)
    (slot,) = acquire_all(ring)
    ring.close()
    ring.release(slot)
    assert ring.statistics() == RingStatistics(0, 0, 0, 0, 0, 0)
