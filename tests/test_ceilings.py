"""The raw ceilings: every byte is read to where it belongs, and what cannot be measured is said."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import weightstream.ceilings
from tests.builders import leaves_nothing
from weightstream.ceilings import CopyCeiling, ReadCeiling, copy_ceiling, copy_round, read_ceiling
from weightstream.prefetch.memory import PAGE_BYTES, allocate

Preadv = Callable[[int, Sequence[memoryview], int], int]


@pytest.fixture(name="mapped")
def fixture_mapped(monkeypatch: pytest.MonkeyPatch) -> list[mmap.mmap]:
    """The memory that was mapped, kept."""
    found: list[mmap.mmap] = []

    def keep(num_bytes: int) -> mmap.mmap:
        found.append(allocate(num_bytes))
        return found[-1]

    monkeypatch.setattr(weightstream.ceilings, "allocate", keep)
    return found


def write(folder: Path, sizes: Sequence[int]) -> list[Path]:
    paths = [folder / str(number) for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(random.Random(size).randbytes(size))
    return paths


def takes_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def contents(memory: mmap.mmap, sizes: Sequence[int]) -> list[bytes]:
    """What lies at each file's place: they begin on pages, one behind the other."""
    found: list[bytes] = []
    begin = 0
    for size in sizes:
        found.append(memory[begin : begin + size])
        begin += -(-size // PAGE_BYTES) * PAGE_BYTES
    assert len(memory) == begin
    return found


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("num_threads", [1, 3], ids=["1-thread", "3-threads"])
@pytest.mark.parametrize(
    "sizes",
    [[1], [3 * PAGE_BYTES], [5 * PAGE_BYTES + 17], [10_000, 0, 4096, 1, 70_001]],
    ids=["byte", "pages", "odd", "several"],
)
def test_every_byte_arrives_where_it_belongs(
    tmp_path: Path, mapped: list[mmap.mmap], sizes: list[int], num_threads: int, *, direct: bool
) -> None:
    paths = write(tmp_path, sizes)
    if direct and not takes_direct(paths[0]):
        pytest.skip("the file system refuses O_DIRECT")
    with leaves_nothing():
        found = read_ceiling(paths, num_threads=num_threads, direct=direct, chunk_bytes=2 * PAGE_BYTES)
    assert (found.num_bytes, found.num_threads, found.direct) == (sum(sizes), num_threads, direct)
    assert contents(mapped[0], sizes) == [path.read_bytes() for path in paths]


def test_reads_for_a_device_go_round_in_a_window(tmp_path: Path, mapped: list[mmap.mmap]) -> None:
    paths = write(tmp_path, [5 * PAGE_BYTES, 10])
    with leaves_nothing():
        found = read_ceiling(
            paths, num_threads=2, direct=False, chunk_bytes=PAGE_BYTES, window_bytes=2 * PAGE_BYTES + 17
        )
    assert found.num_bytes == 5 * PAGE_BYTES + 10
    (window,) = mapped
    assert len(window) == 2 * PAGE_BYTES
    pages = [paths[0].read_bytes()[n * PAGE_BYTES : (n + 1) * PAGE_BYTES] for n in range(5)]
    assert window[:10] in (paths[0].read_bytes()[4 * PAGE_BYTES :][:10], pages[2][:10], pages[0][:10])
    assert window[PAGE_BYTES : PAGE_BYTES + 10] in (paths[1].read_bytes(), pages[3][:10], pages[1][:10])


def test_short_reads_are_gone_on_with(tmp_path: Path, mapped: list[mmap.mmap], monkeypatch: pytest.MonkeyPatch) -> None:
    def read_less(fd: int, buffers: Sequence[memoryview], position: int) -> int:
        return real(fd, [buffers[0][:1000]], position)

    real: Preadv = os.preadv
    monkeypatch.setattr(os, "preadv", read_less)
    paths = write(tmp_path, [10_000])
    read_ceiling(paths, num_threads=2, direct=False, chunk_bytes=PAGE_BYTES)
    assert contents(mapped[0], [10_000]) == [paths[0].read_bytes()]


def test_rate_is_bytes_over_seconds() -> None:
    assert ReadCeiling(num_bytes=300, wall_s=2.0, num_threads=1, direct=False).bytes_per_s == 150.0
    assert CopyCeiling(num_bytes=300, wall_s=2.0, chunk_bytes=1).bytes_per_s == 150.0


def test_error_of_a_read_is_raised_once_all_threads_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, buffers: Sequence[memoryview], position: int) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", refuse)
    with leaves_nothing(), pytest.raises(OSError, match="broken"):
        read_ceiling(write(tmp_path, [10_000]), num_threads=3, direct=False, chunk_bytes=PAGE_BYTES)


def test_refused_direct_open_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags)

    real = os.open
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="Invalid argument"):
        read_ceiling(write(tmp_path, [1]), num_threads=1, direct=True)


def test_file_that_ends_early_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(OSError, match="ended at byte 0"):
        read_ceiling(write(tmp_path, [10_000]), num_threads=1, direct=False)


def test_missing_file_is_an_error_that_leaves_no_descriptor(tmp_path: Path) -> None:
    with leaves_nothing(), pytest.raises(FileNotFoundError):
        read_ceiling([*write(tmp_path, [1]), tmp_path / "gone"], num_threads=1, direct=False)


def test_memory_that_is_refused_ends_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(weightstream.ceilings, "allocate", refuse)
    with leaves_nothing(), pytest.raises(OSError, match="Cannot allocate"):
        read_ceiling(write(tmp_path, [1]), num_threads=2, direct=False)


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        ([1], {"num_threads": 0}, "num_threads must be at least 1, found 0"),
        ([1], {"num_threads": 1, "chunk_bytes": 1000}, "chunk_bytes must be a multiple of 4096, found 1000"),
        ([1], {"num_threads": 2, "chunk_bytes": 4096, "window_bytes": 8191}, "for each thread, 8192, found 8191"),
        ([0, 0], {"num_threads": 1}, "no byte to read in 2 files"),
        ([], {"num_threads": 1}, "no byte to read in 0 files"),
    ],
    ids=["no-thread", "odd-chunk", "small-window", "empty-files", "no-files"],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, sizes: list[int], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_ceiling(write(tmp_path, sizes), direct=False, **settings)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_copy_needs_an_accelerator(device: str) -> None:
    with pytest.raises(ValueError, match=f"nothing to copy to on {device}"):
        copy_ceiling(torch.device(device), num_bytes=1, chunk_bytes=1)


@pytest.mark.parametrize(("num_bytes", "chunk_bytes"), [(0, 1), (1, 0)], ids=["no-bytes", "no-chunk"])
def test_copy_needs_something_to_copy(num_bytes: int, chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match="sizes must be at least 1 byte"):
        copy_ceiling(torch.device("cuda:0"), num_bytes=num_bytes, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(1, [1, 0, 0, 0, 0, 0]), (4, [1, 2, 3, 4, 0, 0]), (6, [1, 2, 3, 4, 5, 6]), (100, [1, 2, 3, 4, 5, 6])],
    ids=["byte", "row-and-byte", "all", "round-and-round"],
)
def test_copies_go_row_by_row(num_bytes: int, expected: list[int]) -> None:
    source = torch.arange(1, 7, dtype=torch.uint8).view(2, 3)
    destination = torch.zeros_like(source)
    copy_round(source, destination, num_bytes)
    assert destination.flatten().tolist() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("num_bytes", [1, 10 * 2**20 + 1, 600 * 2**20], ids=["byte", "odd", "round-and-round"])
def test_copies_to_an_accelerator_are_timed(num_bytes: int) -> None:
    found = copy_ceiling(torch.device("cuda:0"), num_bytes=num_bytes, chunk_bytes=4 * 2**20)
    assert (found.num_bytes, found.chunk_bytes) == (num_bytes, 4 * 2**20)
    assert found.wall_s > 0
