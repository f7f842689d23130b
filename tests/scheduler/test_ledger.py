"""Every moment is booked to one phase, by what the load waits for then."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from weightstream.scheduler.ledger import Ledger


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def pipeline() -> tuple[Hands, Ledger]:
    hands = Hands()
    ledger = Ledger(hands)
    ledger.enter("pipeline")
    return hands, ledger


@pytest.mark.parametrize(
    ("counts", "phase"),
    [
        ({}, "other"),
        ({"reading": 1}, "disk"),
        ({"reading": 3, "copying": 1}, "disk"),
        ({"reading": 1, "filled": 1}, "disk"),
        ({"reading": 1, "copying": 2}, "disk"),
        ({"reading": 14, "filled": 8, "copying": 8}, "disk"),
        ({"reading": 1, "filled": 1, "copying": 2}, "copy"),
        ({"copying": 1}, "copy"),
        ({"reading": 2, "landing": 2}, "disk"),
        ({"reading": 1, "landing": 3}, "copy"),
        ({"landing": 2}, "copy"),
        ({"landing": 1, "binding": 1}, "copy"),
        ({"landing": 1, "filled": 1, "binding": 1}, "bind"),
        ({"landing": 1, "hashing": 1}, "copy"),
        ({"landing": 1, "hashing": 1, "unhashed": 1}, "verify"),
        ({"binding": 1}, "bind"),
        ({"reading": 1, "binding": 1}, "disk"),
        ({"filled": 1, "binding": 1}, "bind"),
        ({"filled": 1, "copying": 1, "binding": 1}, "copy"),
    ],
    ids=[
        *("nobody", "reading", "read-and-copied", "one-waits-beside-a-read", "copy-waits-behind-copy"),
        *("readers-are-all-busy", "many-wait", "last-copy"),
        *("read-and-landed", "mostly-landing", "landing", "bound-beside-a-landing", "filled-waits-beside-a-landing"),
        *("hashed-beside-a-landing", "hash-waits-beside-a-landing", "binding"),
        *("bound-beside-a-read", "filled-waits-for-binding", "filled-waits-for-copy"),
    ],
)
def test_time_goes_to_who_is_waited_for(counts: dict[str, int], phase: str) -> None:
    hands, ledger = pipeline()
    ledger.verifies()
    ledger.change(**counts)
    hands.time = 3.0
    ledger.change()
    assert ledger.phases == {**dict.fromkeys(ledger.phases, 0.0), phase: 3.0}


@pytest.mark.parametrize(
    ("counts", "phase"), [({"reading": 4, "copying": 2}, "copy"), ({"reading": 3, "copying": 1}, "disk")]
)
def test_copies_that_readers_have_no_slot_for_are_waited_for(counts: dict[str, int], phase: str) -> None:
    hands, ledger = pipeline()
    ledger.change(**counts)
    ledger.starved = True
    hands.time = 3.0
    ledger.change()
    assert ledger.phases[phase] == 3.0


@pytest.mark.parametrize("section", ["preflight", "bind", "other"])
def test_outside_the_pipeline_time_goes_to_the_section(section: Any) -> None:
    hands, ledger = pipeline()
    ledger.enter(section)
    ledger.change(reading=1, copying=1)
    hands.time = 2.0
    ledger.change()
    assert ledger.phases[section] == 2.0


def test_overlap_is_a_share_of_the_less_busy_stage() -> None:
    hands, ledger = pipeline()
    for time, change in [(0, {"reading": 1}), (6, {"copying": 1}), (8, {"reading": -1}), (10, {"copying": -1})]:
        hands.time = time
        ledger.change(**change)
    assert (ledger.read_busy_s, ledger.copy_busy_s, ledger.both_busy_s) == (8, 4, 2)
    assert ledger.overlap == 0.5


@pytest.mark.parametrize(
    ("counts", "phase"), [({"reading": 1, "landing": 1}, "disk"), ({"landing": 1}, "copy"), ({}, "disk")]
)
def test_while_all_is_read_first_copies_by_readers_alone_are_copies(counts: dict[str, int], phase: str) -> None:
    hands, ledger = pipeline()
    ledger.enter("disk")
    ledger.change(**counts)
    hands.time = 2.0
    ledger.change()
    assert ledger.phases[phase] == ledger.wall_s == 2.0


def test_overlap_counts_copies_by_readers() -> None:
    hands, ledger = pipeline()
    for time, change in [(0, {"reading": 2}), (6, {"reading": -1, "landing": 1}), (8, {"reading": -1}), (10, {})]:
        hands.time = time
        ledger.change(**change)
    assert (ledger.read_busy_s, ledger.copy_busy_s, ledger.both_busy_s) == (8, 4, 2)
    assert ledger.overlap == 0.5


def test_overlap_of_one_stage_alone_is_zero() -> None:
    hands, ledger = pipeline()
    ledger.change(reading=1)
    hands.time = 1.0
    ledger.change(reading=-1)
    assert ledger.overlap == 0.0


steps = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.sampled_from(["preflight", "pipeline", "bind", "other", None]),
        st.dictionaries(st.sampled_from(["reading", "landing", "filled", "copying", "binding"]), st.integers(0, 2)),
    )
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(steps)
def test_phases_sum_to_the_wall_time(steps: list[tuple[int, Any, dict[str, int]]]) -> None:
    hands = Hands()
    ledger = Ledger(hands)
    for seconds, section, change in steps:
        hands.time += seconds
        if section is not None:
            ledger.enter(section)
        ledger.change(**change)
    assert sum(ledger.phases.values()) == ledger.wall_s == hands.time
    assert 0.0 <= ledger.overlap <= 1.0
