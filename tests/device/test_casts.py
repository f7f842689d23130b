"""Casts on the host: the right values at every size, and no threads of torch's for tensors of moderate size."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from weightstream.device.backend import cast_or_copy

#: Where torch begins to divide work among threads.
GRAIN = 32_768
PROGRAM = """
import os, sys, torch
from weightstream.device.backend import cast_or_copy
num_elements = int(sys.argv[1])
source = torch.frombuffer(bytearray(2 * num_elements), dtype=torch.uint8)  # filling it could make threads already
destination = torch.empty(num_elements)
before = len(os.listdir("/proc/self/task"))
cast_or_copy(destination, source, torch.bfloat16)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize("num_elements", [0, 1, GRAIN - 1, GRAIN, GRAIN + 1, 3 * GRAIN - 3, 2**20 - 1, 2**20])
def test_every_element_is_cast(num_elements: int) -> None:
    values = torch.randn(num_elements).bfloat16()
    destination = torch.empty(num_elements)
    cast_or_copy(destination, values.view(torch.uint8), torch.bfloat16)
    assert torch.equal(destination, values.float())


@pytest.mark.parametrize(("num_elements", "is_shared"), [(3 * GRAIN, False), (2**22, True)], ids=["moderate", "large"])
def test_threads_that_wait_for_one_another_are_for_large_tensors(
    num_elements: int,
    is_shared: bool,  # noqa: FBT001
) -> None:
    """On a busy machine each tensor would otherwise wait until all of them have had a turn."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(num_elements)],
        env={**os.environ, "OMP_NUM_THREADS": "4"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert (int(found.stdout) > 0) == is_shared
