"""What parsing may cost, whatever is in a header, an index or a file of torch.save: memory always, time in `make soak`."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from typing import NamedTuple

import pytest

from tests.fuzz.adversarial import CASES, parse
from weightstream.prefetch.header import MAX_HEADER_BYTES
from weightstream.prefetch.pickles import MAX_OPCODES

MIB = 2**20

#: The promise of SECURITY.md: so many times the length of the text, and so many bytes.
MAX_FACTOR, MAX_CONSTANT_BYTES = 20, 8 * MIB
#: Of files of torch.save: an instruction of one byte makes a list. There are MAX_OPCODES at most.
MAX_TORCH_FACTOR = 90


def most_bytes(case: str, size: int) -> int:
    return (MAX_TORCH_FACTOR if case.startswith("torch:") else MAX_FACTOR) * size + MAX_CONSTANT_BYTES


@pytest.mark.parametrize(
    ("case", "size"),
    [(case, size) for case in CASES for size in (100_000, 400_000) if size == 100_000 or not case.startswith("torch:")],
)
def test_memory_stays_within_its_bound(case: str, size: int) -> None:
    raw = CASES[case][0](size)
    tracemalloc.start()
    try:
        parse(case, raw)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < most_bytes(case, len(raw))


class Cost(NamedTuple):
    cpu_s: float
    peak_bytes: int
    outcome: str


def cost_of(case: str, size: int) -> Cost:
    command = [sys.executable, "-m", "tests.fuzz.adversarial", case, str(size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return Cost(**json.loads(done.stdout))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("size", "most_s"),
    [pytest.param(10_000_000, 1, id="10 MB"), pytest.param(MAX_HEADER_BYTES - 1, 3, id="the limit")],
)
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("torch:")])
def test_time_and_memory_of_a_fresh_process_stay_within_their_bounds(case: str, size: int, most_s: float) -> None:
    cost = cost_of(case, size)
    print(f"{case}, {size} bytes: {cost.cpu_s:.2f} s, {cost.peak_bytes / size:.1f} times its length, {cost.outcome}")  # noqa: T201
    assert cost.cpu_s < 3 * most_s  # other processes make a processor slower, too
    assert cost.peak_bytes < most_bytes(case, size)


@pytest.mark.soak
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("torch:")])
def test_time_and_memory_for_files_of_torch_stay_within_their_bounds(case: str) -> None:
    cost = cost_of(case, 10_000_000)
    print(f"{case}: {cost.cpu_s:.2f} s, {cost.peak_bytes / 2**20:.0f} MiB, {cost.outcome}")  # noqa: T201
    assert cost.cpu_s < 3 * 1
    assert cost.peak_bytes < MAX_OPCODES * MAX_TORCH_FACTOR
