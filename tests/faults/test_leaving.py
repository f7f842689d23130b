"""Processes that end in the middle of a load neither hang nor crash while the interpreter goes away."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import SINGLE, write_sparse
from tests.faults.leaving import EXPECTED

_ASYNCIOS_OWN = re.compile(r"coroutine 'BaseEventLoop\.shutdown_\w+' was never awaited")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("count", [1, pytest.param(100, marks=pytest.mark.soak)])
def test_process_that_ends_in_mid_load_ends_well(tmp_path: Path, count: int, device: str) -> None:
    write_sparse(tmp_path / SINGLE, [(f"w{i}", "F32", [2**18]) for i in range(64)])
    command = [sys.executable, str(Path(__file__).with_name("leaving.py")), str(tmp_path), str(count), device]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=100 * count)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[tuple[int, str]]] = json.loads(done.stdout)
    assert found.keys() == EXPECTED.keys()
    for how, ends in found.items():
        expected, has_traceback = EXPECTED[how]
        assert len(ends) == count
        for code, everything in ends:
            # A second signal may come before asyncio.run has begun to await what it ends the loop with.
            written = _ASYNCIOS_OWN.sub("", everything) if "twice" in how else everything
            assert code == expected, (how, code, written)
            if "twice" not in how:  # the second one may come while it is printed
                assert ("Traceback" in written) == has_traceback, (how, written)
            for word in (
                "Fatal Python error",
                "terminate called",
                "Exception in thread",
                *(() if "twice" in how else ("Exception ignored",)),  # of torch's own, which the second one meets
                "never awaited",
            ):
                assert word not in written, (how, written)
