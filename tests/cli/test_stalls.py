"""`inspect`, `verify` and `bench` on a file system that does not answer, or breaks: they end, with an error or with Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.builders import SINGLE, open_files, write_checkpoint, write_sums
from tests.cli.conftest import Run, Start
from tests.fakes.filesystem import Behaviour, Fault, Mount, mounted
from tests.fakes.fixtures import requires_fuse

pytestmark = requires_fuse

#: Where the header is, and where only `verify` and `bench` read.
HEADER, DATA = 0, 3 * 2**20

BENCH = ("bench", "--device", "cpu", "--runs", "1", "--json")


@pytest.fixture(name="folder")
def fixture_folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "c", {"a": torch.zeros(2**20)})


@pytest.fixture(
    name="stalling",
    params=[(HEADER, ("inspect",)), (DATA, ("verify",)), (DATA, BENCH)],
    ids=lambda param: str(param[1][0]),
)
def fixture_stalling(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Mount, tuple[str, ...]]]:
    """A mount that hangs at one read, and the command that meets it."""
    offset, command = request.param
    with mounted(folder, Behaviour(faults=(Fault(SINGLE, "stall", offset=offset),), is_cached=False)) as mount:
        yield mount, command


@contextmanager
def leaves_nothing_of(mount: Mount) -> Generator[None, None, None]:
    """Check that what hung gives back what it kept, once it goes on."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("weightstream"):
            thread.join(30)
    assert not any(str(mount.path) in file for file in open_files().values())


def test_read_that_hangs_is_an_error(
    stalling: tuple[Mount, tuple[str, ...]], weightstream: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount, command = stalling
    monkeypatch.setenv("WEIGHTSTREAM_PREFETCH__STALL_S", "0.3")
    result = weightstream(*command, mount.path)
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err
    assert f"{mount.path / SINGLE}" in result.err
    assert "at most 0.3 s" in result.err
    assert "raise prefetch.stall_s" in result.err
    with leaves_nothing_of(mount):
        mount.release()


def test_all_of_it_is_limited_by_the_timeout(
    stalling: tuple[Mount, tuple[str, ...]], weightstream: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount, command = stalling
    monkeypatch.setenv("WEIGHTSTREAM_SCHEDULER__TIMEOUT_S", "0.3")
    result = weightstream(*command, mount.path)
    assert (result.code, result.out) == (1, "")
    assert "aise scheduler.timeout_s" in result.err
    with leaves_nothing_of(mount):
        mount.release()


def test_process_ends_although_its_read_hangs(stalling: tuple[Mount, tuple[str, ...]], start: Start) -> None:
    mount, command = stalling
    running = start(*command, mount.path, environment={"WEIGHTSTREAM_PREFETCH__STALL_S": "0.3"})
    mount.wait_stalled()
    result = running.result()
    assert result.code == 1
    assert "raise prefetch.stall_s" in result.err


def test_interrupt_ends_it_in_time(stalling: tuple[Mount, tuple[str, ...]], start: Start) -> None:
    mount, command = stalling
    running = start(*command, mount.path)
    mount.wait_stalled()
    result = running.end_by(signal.SIGINT)
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err
    assert result.err.endswith("interrupted\n")


@pytest.mark.parametrize("times", [1, None], ids=["once", "for ever"])
@pytest.mark.parametrize(
    ("offset", "command"),
    [(HEADER, ("inspect",)), (HEADER, ("verify",)), (DATA, ("verify",)), (HEADER, BENCH), (DATA, BENCH)],
    ids=["inspect-header", "verify-header", "verify-data", "bench-header", "bench-data"],
)
def test_read_that_fails_is_tried_again_and_then_an_error(
    folder: Path,
    weightstream: Run,
    monkeypatch: pytest.MonkeyPatch,
    offset: int,
    command: tuple[str, ...],
    times: int | None,
) -> None:
    write_sums(folder)
    monkeypatch.setenv("WEIGHTSTREAM_PREFETCH__RETRIES", "2")
    fault = Fault(SINGLE, "error", offset=offset, times=times)
    with mounted(folder, Behaviour(faults=(fault,), is_cached=False)) as mount:
        result = weightstream(*command, mount.path)
        assert mount.statistics().num_faults[0] >= (times or 3)
        file = str(mount.path / SINGLE)
    assert result.code == (0 if times else 1), result.err
    if not times:
        (error,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
        assert file in error
        assert error.endswith("Input/output error (errno 5), after 2 retries")
