"""Why a load took so long: one answer for each thing that a load can wait for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.cli.test_summary import REPORT
from weightstream.why import Bound, explain, find_bound

PHASES = {"preflight": 0.0, "disk": 0.0, "copy": 0.0, "bind": 0.0, "other": 0.0}


def phases(**seconds: float) -> dict[str, float]:
    return {**PHASES, **seconds}


@pytest.mark.parametrize(
    ("spent", "bound", "said"),
    [
        (phases(disk=9.0, bind=1.0), "disk", "It waited for reading most: 90% of the time. `weightstream bench`"),
        (phases(copy=6.0, disk=4.0), "copy", "for copies most: 60% of the time, 40% for reading. Only fewer bytes"),
        (phases(other=7.0, disk=3.0), "consumer", "for whoever takes the tensors most: 70% of the time"),
        (phases(preflight=3.0, bind=3.0, disk=4.0), "python", "for work in Python most: 60% of the time"),
        (phases(verify=9.0, disk=1.0), "verify", "for hashing most: 90% of the time. More cores"),
    ],
    ids=["disk", "copy", "consumer", "python", "verify"],
)
def test_sentence_names_what_was_waited_for_and_what_to_change(
    spent: dict[str, float], bound: Bound, said: str
) -> None:
    assert find_bound(spent) == bound
    assert said in explain(dataclasses.replace(REPORT, phases=spent, fallbacks=()))


@pytest.mark.parametrize(
    ("spent", "changes", "said"),
    [
        (phases(disk=1.0), {}, "This had a part in it: direct I/O refused by the file system"),
        (phases(copy=1.0), {"fallbacks": ("page-locking host memory was refused",), "pinned_bytes": 0}, "ulimit -l"),
        (phases(copy=1.0), {"fallbacks": ("page-locking host memory was refused",)}, "in it: page-locking host memory"),
        (phases(copy=1.0), {"device": "cpu"}, "with `prefetch.io: buffered`, those on meta are read into"),
    ],
    ids=["reads", "not-locked", "copies", "cpu"],
)
def test_downgrades_that_concern_it_are_named(spent: dict[str, float], changes: dict[str, Any], said: str) -> None:
    assert said in explain(dataclasses.replace(REPORT, phases=spent, **changes))


def test_downgrades_that_do_not_concern_it_are_not_named() -> None:
    assert "had a part" not in explain(dataclasses.replace(REPORT, phases=phases(bind=1.0)))


def test_who_has_measured_says_it_better() -> None:
    report = dataclasses.replace(REPORT, phases=phases(disk=1.0), fallbacks=())
    assert explain(report, reading="Buy a disk.") == "It waited for reading most: 100% of the time. Buy a disk."


def test_load_that_took_no_time_is_explained_too() -> None:
    assert explain(dataclasses.replace(REPORT, phases=PHASES, fallbacks=())).startswith(
        "It waited for reading most: 0%"
    )
