"""The page cache, for measurements: how much of some files it holds, and how to empty it of them.

What the kernel says is true for the files' owner, or for somebody who may write to them. To others it says that
everything is there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["drop", "resident_share"]


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
    """Return which share of some files' pages is in the page cache, from 0.0 to 1.0.

    Raises:
        OSError: a file cannot be opened, or the kernel has no answer.
    """
    num_pages = num_resident = 0
    for path in paths:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size:
                # A private, writable mapping that nobody writes to: ctypes takes addresses of writable ones alone.
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
                    pages = _mincore(mapping)
                num_pages += len(pages)
                num_resident += len(pages) - pages.count(0)
    return num_resident / num_pages if num_pages else 0.0


def _mincore(mapping: mmap.mmap) -> bytes:
    """Return a byte for each page of a mapping: 0 if it is not in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (ctypes.c_ubyte * -(-len(mapping) // mmap.PAGESIZE))()
    start = ctypes.c_char.from_buffer(mapping)
    answer = libc.mincore(ctypes.byref(start), ctypes.c_size_t(len(mapping)), pages)
    del start  # the mapping cannot be closed while something refers to it
    if answer:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return bytes(pages)
