"""The page cache, for measurements: how much of some files it holds, and how to empty it of them.

What the page cache holds is told to the files' owner, and to who may write to them (see `prefetch.residency`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from weightstream.prefetch.residency import resident_shares

__all__ = ["ResidencyUnknownError", "drop", "resident_share"]


class ResidencyUnknownError(PermissionError):
    """Raised when the kernel does not tell this user what of a file is in the page cache."""


def drop(paths: Sequence[Path]) -> None:
    """Ask the kernel to forget what it holds of some files, after it has written what is not on the disk yet.

    It keeps what other processes have mapped, and tells nobody: ask `resident_share` afterwards.

    Raises:
        OSError: a file cannot be opened or written back.
    """
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def resident_share(paths: Sequence[Path]) -> float:
    """Return which share of some files' bytes is in the page cache, from 0.0 to 1.0; every page is looked at.

    Raises:
        ResidencyUnknownError: the kernel does not tell: they are somebody else's.
        OSError: a file cannot be opened.
    """
    num_bytes = 0
    num_resident = 0.0
    for path in paths:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (share,) = resident_shares(file.fileno(), size, [(0, size)], num_samples=None) if size else [0.0]
        if share is None:
            raise ResidencyUnknownError(
                errno.EPERM, "the kernel does not tell what of this file is in the page cache", str(path)
            )
        num_bytes += size
        num_resident += share * size
    return num_resident / num_bytes if num_bytes else 0.0
