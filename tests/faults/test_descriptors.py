"""Where not as many files may be open as a checkpoint has: a load that says what to do, or does with fewer."""

from __future__ import annotations

import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import weightstream as ws
from tests.builders import assert_same, leaves_nothing, open_files, random_tensors, write_checkpoint
from weightstream.errors import ReadError
from weightstream.prefetch.checkpoint import open_checkpoint

NUM_SHARDS = 12
TENSORS = random_tensors({f"w{number}": (8,) for number in range(NUM_SHARDS)})


@pytest.fixture(name="folder")
def fixture_folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "c", TENSORS, num_shards=NUM_SHARDS)


@contextmanager
def at_most(num_more: int) -> Generator[None, None, None]:
    """Let this process open so many files more while the context lasts; none is open beyond the numbers in use."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(fd) for fd in open_files()}
    padding = [os.open(os.devnull, os.O_RDONLY) for _ in range(max(taken) + 1 - len(taken))]  # close the gaps
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(*taken, *padding, 0) + 1 + num_more, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in padding:
            os.close(fd)


def load(folder: Path, io: str) -> ws.LoadReport:
    config = ws.LoaderConfig.model_validate(
        {"strategy": "stream", "prefetch": {"io": io, "workers": 2}, "device": {"target": "cpu"}}
    )
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.empty(8, device="meta")) for name in TENSORS})
    report = ws.load_sync(model, folder, config=config)
    for name, tensor in TENSORS.items():
        assert_same(model[name].detach(), tensor)
    return report


def outcome(folder: Path, io: str) -> str:
    try:
        return "; ".join(["loaded", *load(folder, io).fallbacks])
    except ReadError as error:
        return str(error)


@pytest.mark.parametrize("io", ["buffered", "direct", "auto"])
def test_every_limit_ends_in_a_load_or_in_an_error_with_a_hint(folder: Path, io: str) -> None:
    if load(folder, io).fallbacks:  # the first load also opens what is opened once and for all
        pytest.skip("the file system refuses O_DIRECT")
    outcomes: list[str] = []
    for num_more in range(2 * NUM_SHARDS + 8):
        with leaves_nothing(), at_most(num_more):
            outcomes.append(outcome(folder, io))
    failed = [one for one in outcomes if not one.startswith("loaded")]
    fewer = [one for one in outcomes if one.startswith("loaded; not as many files may be open")]
    assert all("Too many open files" in one and "ulimit -n" in one for one in failed)
    assert len(failed) >= NUM_SHARDS
    assert bool(fewer) == (io != "buffered")
    assert outcomes[-1] == "loaded"
    assert len(failed) + len(fewer) + outcomes.count("loaded") == len(outcomes)


def test_error_says_how_many_files_the_checkpoint_has(folder: Path) -> None:
    with leaves_nothing(), at_most(NUM_SHARDS - 2), pytest.raises(ReadError, match=f"checkpoint's {NUM_SHARDS} files"):
        open_checkpoint(folder)
