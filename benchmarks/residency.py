"""Whether files are in the page cache: asked, and brought about. Linux only; the files must be the caller's own.

Cold means: not in the page cache of this machine. The host of a virtual disk may still have them in its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

__all__ = ["evict", "fill", "resident_bytes"]

_PIECE_BYTES = 16 * 2**20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_MAP_FAILED = ctypes.c_void_p(-1).value


def resident_bytes(paths: Sequence[Path]) -> int:
    """Return how many bytes of the files are in the page cache, in whole pages, as mincore(2) says."""
    return sum(map(_resident, paths))


def _resident(path: Path) -> int:
    size = path.stat().st_size
    if size == 0:
        return 0
    fd = os.open(path, os.O_RDONLY)
    try:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
    try:
        if _libc.mincore(address, size, pages.ctypes.data):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        _libc.munmap(address, size)
    return int((pages & 1).sum()) * mmap.PAGESIZE


def evict(paths: Sequence[Path]) -> None:
    """Take the files out of the page cache; if the kernel keeps some pages, ask it to drop the whole cache.

    Only the files, if that does: what other programs have in the cache is not ours. Whether it worked is for
    `resident_bytes` to say.
    """
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    if resident_bytes(paths):
        os.sync()
        with suppress(OSError):  # only root may
            Path("/proc/sys/vm/drop_caches").write_text("1")


def fill(paths: Sequence[Path]) -> None:
    """Read the files into the page cache, those that are not in it."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    for path in paths:
        if _resident(path) >= path.stat().st_size:
            continue
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
