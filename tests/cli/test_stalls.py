"""`inspect` and `verify` on a file system that does not answer: they end, with an error or with Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.builders import SINGLE, open_files, write_checkpoint
from tests.cli.conftest import Run, Start
from tests.fakes.filesystem import Behaviour, Fault, Mount, mounted
from tests.fakes.fixtures import requires_fuse

pytestmark = requires_fuse

#: Where the header is, and where only `verify` reads.
HEADER, DATA = 0, 3 * 2**20


@pytest.fixture(name="folder")
def fixture_folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "c", {"a": torch.zeros(2**20)})


@pytest.fixture(name="stalling", params=[HEADER, DATA], ids=["header", "data"])
def fixture_stalling(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Mount, str]]:
    """A mount that hangs at one read, and the command that meets it."""
    fault = Fault(SINGLE, "stall", offset=request.param)
    with mounted(folder, Behaviour(faults=(fault,), is_cached=False)) as mount:
        yield mount, "inspect" if request.param == HEADER else "verify"


@contextmanager
def leaves_nothing_of(mount: Mount) -> Generator[None, None, None]:
    """Check that what hung gives back what it kept, once it goes on."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("weightstream"):
            thread.join(30)
    assert not any(str(mount.path) in file for file in open_files().values())


def test_read_that_hangs_is_an_error(
    stalling: tuple[Mount, str], weightstream: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount, command = stalling
    monkeypatch.setenv("WEIGHTSTREAM_PREFETCH__STALL_S", "0.3")
    result = weightstream(command, mount.path)
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err
    assert f"{mount.path / SINGLE}" in result.err
    assert "at most 0.3 s" in result.err
    assert "raise prefetch.stall_s" in result.err
    with leaves_nothing_of(mount):
        mount.release()


def test_all_of_it_is_limited_by_the_timeout(
    stalling: tuple[Mount, str], weightstream: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount, command = stalling
    monkeypatch.setenv("WEIGHTSTREAM_SCHEDULER__TIMEOUT_S", "0.3")
    result = weightstream(command, mount.path)
    assert (result.code, result.out) == (1, "")
    assert "aise scheduler.timeout_s" in result.err
    with leaves_nothing_of(mount):
        mount.release()


def test_process_ends_although_its_read_hangs(stalling: tuple[Mount, str], start: Start) -> None:
    mount, command = stalling
    running = start(command, mount.path, environment={"WEIGHTSTREAM_PREFETCH__STALL_S": "0.3"})
    mount.wait_stalled()
    result = running.result()
    assert result.code == 1
    assert "raise prefetch.stall_s" in result.err


def test_interrupt_ends_it_in_time(stalling: tuple[Mount, str], start: Start) -> None:
    mount, command = stalling
    running = start(command, mount.path)
    mount.wait_stalled()
    result = running.end_by(signal.SIGINT)
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err
    assert result.err.endswith("interrupted\n")
