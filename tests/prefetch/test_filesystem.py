"""What a file is on is told by its kind, and never guessed to be safer than it is."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.fakes.filesystem import mounted
from tests.fakes.fixtures import requires_fuse
from weightstream.prefetch import filesystem
from weightstream.prefetch.filesystem import FileSystem, Kind, file_system_of


@pytest.fixture(name="fd")
def fixture_fd(tmp_path: Path) -> Generator[int, None, None]:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd
    os.close(fd)


def test_memory_is_told() -> None:
    fd = os.memfd_create("nothing")
    try:
        assert file_system_of(fd) == FileSystem("memory", "tmpfs")
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0x6969, FileSystem("network", "nfs")),
        (0xFE534D42, FileSystem("network", "smb2")),
        (0x01021997, FileSystem("network", "9p")),
        (0x0BD00BD0, FileSystem("network", "lustre")),
        (0x58465342, FileSystem("local", "xfs")),
        (0x794C7630, FileSystem("local", "overlay")),
        (0x12345678, FileSystem("local", "0x12345678")),
    ],
    ids=lambda value: value.name if isinstance(value, FileSystem) else "",
)
def test_number_stands_for(number: int, expected: FileSystem, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_number_of", lambda _: number)
    assert file_system_of(fd) == expected


@pytest.mark.parametrize(
    ("mounted_as", "kind"),
    [
        ("fuse.sshfs", "network"),
        ("fuse", "network"),
        ("fuseblk", "local"),
        ("virtiofs", "local"),
        ("fuse.fuse-overlayfs", "local"),
    ],
)
def test_fuse_is_what_it_is_mounted_as(
    mounted_as: str, kind: Kind, fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_number_of", lambda _: 0x65735546)
    device = os.fstat(fd).st_dev
    lines = ["20 1 250:77 / /other rw shared:1 - xfs /dev/other rw"]
    lines += [f"21 1 {os.major(device)}:{os.minor(device)} / /here rw shared:1 - {mounted_as} what rw"]
    mounts = tmp_path / "mountinfo"
    mounts.write_text("\n".join(lines))
    assert file_system_of(fd, mounts=mounts) == FileSystem(kind, mounted_as)
    mounts.write_text(lines[0])
    assert file_system_of(fd, mounts=mounts) == FileSystem("network", "fuse")


@requires_fuse
def test_file_system_of_a_process_can_go_away(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with mounted(tmp_path) as mount:
        fd = os.open(mount.path / "file", os.O_RDONLY)
        try:
            assert file_system_of(fd).kind == "network"
        finally:
            os.close(fd)


def test_descriptor_that_is_closed_is_an_error(fd: int) -> None:
    other = os.dup(fd)
    os.close(other)
    with pytest.raises(OSError, match="Bad file descriptor"):
        file_system_of(other)
