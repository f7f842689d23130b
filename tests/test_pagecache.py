"""What is in the page cache, and how it is emptied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.builders import leaves_nothing, obeying_modes
from weightstream.pagecache import ResidencyUnknownError, drop, resident_share


@pytest.fixture(name="files")
def fixture_files(tmp_path: Path) -> list[Path]:
    sizes = {"a": 40_960, "b": 123, "empty": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    return [tmp_path / name for name in sizes]


def test_what_was_just_written_is_resident_and_can_be_dropped(files: list[Path]) -> None:
    assert resident_share(files) == 1.0
    with leaves_nothing():
        drop(files)
        share = resident_share(files)
    if share == 1.0:
        pytest.skip("the file system of the tests keeps its files in memory, or does not tell")
    assert share == 0.0
    files[1].read_bytes()
    assert resident_share(files) == pytest.approx(123 / (40_960 + 123))  # the share of bytes


def test_nothing_has_no_share(tmp_path: Path) -> None:
    assert resident_share([]) == 0.0


@pytest.mark.parametrize("function", [drop, resident_share], ids=["drop", "resident_share"])
def test_missing_file_is_an_error(tmp_path: Path, function: object) -> None:
    assert callable(function)
    with pytest.raises(FileNotFoundError):
        function([tmp_path / "gone"])


def test_kernel_that_does_not_tell_is_an_error(files: list[Path]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    for file in files:
        os.chown(file, 12345, 12345)
        file.chmod(0o444)
    with leaves_nothing(), obeying_modes(), pytest.raises(ResidencyUnknownError, match="does not tell"):
        resident_share(files)
