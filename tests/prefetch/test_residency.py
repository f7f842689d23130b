"""What is in the page cache is found out without reading it, and "unknown" is an answer."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.builders import obeying_modes
from weightstream.prefetch.memory import PAGE_BYTES
from weightstream.prefetch.residency import resident_shares

NUM_PAGES = 256


@pytest.fixture(name="file")
def fixture_file(tmp_path: Path) -> Generator[tuple[int, Path], None, None]:
    """A file that is on the disk, and none of it in the page cache."""
    path = tmp_path / "data"
    path.write_bytes(os.urandom(NUM_PAGES * PAGE_BYTES))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_shares(fd, NUM_PAGES * PAGE_BYTES, [(0, PAGE_BYTES)]) != [0.0]:
        os.close(fd)
        pytest.skip("this file system keeps its files in memory")
    yield fd, path
    os.close(fd)


def shares(fd: int, *ranges: tuple[int, int]) -> list[float | None]:
    return resident_shares(fd, NUM_PAGES * PAGE_BYTES, ranges)


def test_cold_file_is_not_resident_and_stays_so(file: tuple[int, Path]) -> None:
    for _ in range(3):
        assert shares(file[0], (0, NUM_PAGES * PAGE_BYTES)) == [0.0]


def test_share_follows_what_was_read(file: tuple[int, Path]) -> None:
    half = NUM_PAGES // 2 * PAGE_BYTES
    os.pread(file[0], half, 0)
    assert shares(file[0], (0, half), (half, 2 * half), (0, 2 * half)) == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (PAGE_BYTES - 1, PAGE_BYTES + 1), (5, 5 * PAGE_BYTES)])
def test_ranges_need_no_alignment(file: tuple[int, Path], begin: int, end: int) -> None:
    os.pread(file[0], end - begin, begin)
    assert shares(file[0], (begin, end)) == [1.0]


def test_file_of_somebody_else_is_unknown(file: tuple[int, Path]) -> None:
    fd, path = file
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 12345, 12345)
    path.chmod(0o444)
    with obeying_modes():
        assert shares(fd, (0, PAGE_BYTES)) == [None]
    assert shares(fd, (0, PAGE_BYTES)) == [0.0]


def test_file_of_somebody_else_that_may_be_written_to_is_known(file: tuple[int, Path]) -> None:
    fd, path = file
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 12345, 12345)
    path.chmod(0o666)
    with obeying_modes():
        assert shares(fd, (0, PAGE_BYTES)) == [0.0]


def test_what_cannot_be_mapped_is_unknown() -> None:
    read_end, write_end = os.pipe()
    try:
        assert resident_shares(read_end, PAGE_BYTES, [(0, 10), (5, 20)]) == [None, None]
    finally:
        os.close(read_end)
        os.close(write_end)


def test_no_ranges_no_answers(file: tuple[int, Path]) -> None:
    assert shares(file[0]) == []
