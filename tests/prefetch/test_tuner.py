"""The tuner finds what suits the storage, in simulated time: reads are events, and their length is a formula."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import pytest

from weightstream.prefetch.tuner import FIRST_READ_BYTES, FIRST_WORKERS, MAX_WORKERS, Setting, Tuner

MIB = 2**20
CHUNK = 16 * MIB

#: Seconds that a read takes: `direct` or `buffered`, how many go on beside it, itself included, and its bytes.
Storage = Callable[[str, int, int], float]


def cold_disk(io: str, num_reading: int, num_bytes: int) -> float:
    """2 GB/s in all, however it is read."""
    return num_bytes * num_reading / 2e9


def direct_wins(io: str, num_reading: int, num_bytes: int) -> float:
    """3 GB/s past the page cache, 1.2 GB/s through it."""
    return num_bytes * num_reading / (3e9 if io == "direct" else 1.2e9)


def buffered_wins(io: str, num_reading: int, num_bytes: int) -> float:
    return num_bytes * num_reading / (0.8e9 if io == "direct" else 2e9)


def far_away(io: str, num_reading: int, num_bytes: int) -> float:
    """20 ms a request and 50 MB/s for each reader; up to 1.2 GB/s in all."""
    return max(0.02 + num_bytes / 50e6, num_bytes * num_reading / 1.2e9)


def crowded(io: str, num_reading: int, num_bytes: int) -> float:
    """300 MB/s for one reader, and less in all for each that joins it."""
    return num_bytes * num_reading / (300e6 / (1 + 0.4 * (num_reading - 1)))


def large_reads_win(io: str, num_reading: int, num_bytes: int) -> float:
    """A seek of 10 ms before each read, of which there is one at a time."""
    return num_reading * (0.01 + num_bytes / 400e6)


def small_reads_win(io: str, num_reading: int, num_bytes: int) -> float:
    """A server that chokes on requests of more than 2 MiB."""
    return num_bytes * num_reading / (1e9 if num_bytes <= 2 * MIB else 0.3e9)


def make(
    storage_bytes: int,
    *,
    workers: int = FIRST_WORKERS,
    can_direct: bool = True,
    fixed: bool = False,
    read_bytes: int | None = None,
) -> Tuner:
    return Tuner(
        Setting(direct=False, workers=workers, read_bytes=read_bytes or (CHUNK if fixed else FIRST_READ_BYTES)),
        total_bytes=storage_bytes,
        can_direct=can_direct and not fixed,
        max_workers=None if fixed else MAX_WORKERS,
        max_read_bytes=None if fixed else CHUNK,
    )


def load(tuner: Tuner, storage: Storage, total_bytes: int) -> float:
    """Read so many bytes as the tuner says; return how long that takes."""
    now, left = 0.0, total_bytes
    reading: list[tuple[float, int, float, int, int | None]] = []
    serial = 0
    while left or reading:
        while left and len(reading) < tuner.setting.workers:
            num_bytes = min(left, tuner.setting.read_bytes)
            left -= num_bytes
            serial += 1
            io = "direct" if tuner.setting.direct else "buffered"
            seconds = storage(io, len(reading) + 1, num_bytes)
            heapq.heappush(reading, (now + seconds, serial, seconds, num_bytes, tuner.begin()))
        busy = len(reading) >= tuner.setting.workers
        now, _, seconds, num_bytes, number = heapq.heappop(reading)
        tuner.end(number, num_bytes, seconds, busy=busy)
    return now


def best_fixed(storage: Storage, total_bytes: int) -> float:
    def fixed(*, direct: bool, workers: int, read_bytes: int) -> float:
        tuner = Tuner(
            Setting(direct, workers, read_bytes),
            total_bytes=total_bytes,
            can_direct=False,
            max_workers=None,
            max_read_bytes=None,
        )
        return load(tuner, storage, total_bytes)

    return min(
        fixed(direct=direct, workers=workers, read_bytes=read_bytes)
        for direct in (False, True)
        for workers in (1, 2, 4, 8, 16, 32)
        for read_bytes in (2 * MIB, CHUNK)
    )


@pytest.mark.parametrize(
    ("storage", "gibibytes"),
    [
        (cold_disk, 2),
        (direct_wins, 4),
        (buffered_wins, 4),
        (far_away, 8),
        (crowded, 8),
        (large_reads_win, 2),
        (small_reads_win, 24),
    ],
)
def test_load_takes_little_longer_than_with_the_best_fixed_setting(storage: Storage, gibibytes: int) -> None:
    total_bytes = gibibytes * 2**30
    assert load(make(total_bytes), storage, total_bytes) <= 1.1 * best_fixed(storage, total_bytes)


@pytest.mark.parametrize(
    ("storage", "direct", "fewest", "most"),
    [
        pytest.param(direct_wins, True, 1, 32, id="direct"),
        pytest.param(buffered_wins, False, 1, 32, id="buffered"),
        pytest.param(far_away, False, 16, 32, id="many workers"),
        pytest.param(crowded, False, 1, 1, id="one worker"),
    ],
)
def test_setting_that_suits_the_storage_is_found(storage: Storage, *, direct: bool, fewest: int, most: int) -> None:
    tuner = make(8 * 2**30)
    load(tuner, storage, 8 * 2**30)
    assert tuner.setting.direct == direct
    assert fewest <= tuner.setting.workers <= most


def test_size_of_reads_follows() -> None:
    large, small = make(4 * 2**30, can_direct=False), make(4 * 2**30, can_direct=False)
    load(large, large_reads_win, 4 * 2**30)
    load(small, small_reads_win, 4 * 2**30)
    assert large.setting.read_bytes == CHUNK
    assert small.setting.read_bytes <= 2 * MIB


def test_decisions_carry_the_figures_they_were_made_on() -> None:
    tuner = make(8 * 2**30)
    load(tuner, direct_wins, 8 * 2**30)
    assert tuner.decisions[0] == "io: buffered 1.20 GB/s, direct 3.00 GB/s, with 8 workers and reads of 4 MiB: direct"
    assert tuner.decisions[1].startswith("workers: 8 workers 3.00 GB/s, 4 3.00 GB/s: 8")
    assert tuner.decisions[2].startswith("reads: 4 MiB 3.00 GB/s, 16 MiB 3.00 GB/s")


def test_slow_storage_is_tried_with_more_workers_first() -> None:
    tuner = make(8 * 2**30, workers=2)
    load(tuner, far_away, 8 * 2**30)
    assert tuner.decisions[0].startswith("workers: 2 workers ")
    assert tuner.decisions[1].startswith("io: ")


def test_setting_that_is_known_is_kept_until_the_rate_falls() -> None:
    known = Setting(direct=True, workers=16, read_bytes=CHUNK)
    tuner = Tuner(
        known,
        total_bytes=8 * 2**30,
        is_known=True,
        can_direct=True,
        max_workers=MAX_WORKERS,
        max_read_bytes=CHUNK,
    )
    assert tuner.has_settled
    load(tuner, direct_wins, 8 * 2**30)
    assert (tuner.setting, tuner.decisions) == (known, [])


def test_what_is_fixed_stays() -> None:
    tuner = make(2**30, fixed=True, workers=3)
    load(tuner, far_away, 2**30)
    assert tuner.setting == Setting(direct=False, workers=3, read_bytes=CHUNK)
    assert tuner.decisions == []


def test_short_load_tries_nothing() -> None:
    tuner = make(64 * MIB)
    load(tuner, cold_disk, 64 * MIB)
    assert tuner.setting == Setting(direct=False, workers=FIRST_WORKERS, read_bytes=FIRST_READ_BYTES)


def test_what_is_read_within_a_second_is_read_as_it_began() -> None:
    """2.56 GB at 3.4 GB/s past the page cache and 1.1 through it: to find out that the first is right cost a tenth."""

    def fast(io: str, num_reading: int, num_bytes: int) -> float:
        return num_bytes * num_reading / (3.4e9 if io == "direct" else 1.1e9)

    first = Setting(direct=True, workers=FIRST_WORKERS, read_bytes=FIRST_READ_BYTES)
    for total_bytes, num_decisions in ((2_560_000_000, 0), (8_000_000_000, 3)):
        tuner = Tuner(first, total_bytes=total_bytes, can_direct=True, max_workers=MAX_WORKERS, max_read_bytes=CHUNK)
        load(tuner, fast, total_bytes)
        assert len(tuner.decisions) == num_decisions
        assert tuner.setting.direct


def test_refusal_of_direct_reads_ends_them() -> None:
    tuner = make(8 * 2**30)
    while not tuner.setting.direct:
        tuner.end(tuner.begin(), FIRST_READ_BYTES, 0.02, busy=True)
    tuner.refuse_direct()
    load(tuner, direct_wins, 2**30)
    assert not tuner.setting.direct


def test_reads_of_an_older_setting_and_of_idle_times_are_not_measured() -> None:
    tuner = make(8 * 2**30)
    for _ in range(100):
        tuner.end(None, FIRST_READ_BYTES, 1.0, busy=True)
        tuner.end(tuner.begin(), FIRST_READ_BYTES, 1.0, busy=False)
    assert tuner.decisions == []
    assert not tuner.setting.direct


def test_storage_that_changes_is_tried_anew() -> None:
    reads = itertools.count()

    def changes(io: str, num_reading: int, num_bytes: int) -> float:
        return (direct_wins if next(reads) < 1000 else far_away)(io, num_reading, num_bytes)

    tuner = make(32 * 2**30)
    load(tuner, changes, 32 * 2**30)
    assert any(decision.startswith("trying again: the rate fell to") for decision in tuner.decisions)
    assert tuner.setting.workers >= 16


@pytest.mark.parametrize(("direct_rate", "direct"), [(1.0, False), (1.05, False), (1.2, True)])
def test_slow_storage_is_read_through_the_page_cache_unless_direct_reads_are_faster(
    direct_rate: float, *, direct: bool
) -> None:
    """Also by a load that begins past it: at equal rates, read-ahead fills the time between the reads of a worker."""

    def slow(io: str, num_reading: int, num_bytes: int) -> float:
        return num_bytes * num_reading / (0.4e9 * (direct_rate if io == "direct" else 1.0))

    total_bytes = 4 * 2**30
    first = Setting(direct=True, workers=FIRST_WORKERS, read_bytes=FIRST_READ_BYTES)
    tuner = Tuner(first, total_bytes=total_bytes, can_direct=True, max_workers=MAX_WORKERS, max_read_bytes=CHUNK)
    load(tuner, slow, total_bytes)
    assert tuner.setting.direct == direct
