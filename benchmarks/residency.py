"""Files brought into the page cache, or out of it, for a measurement. What is there is for `pagecache` to say.

Cold means: not in the page cache of this machine. The host of a virtual disk may still have the files in its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from weightstream import pagecache

__all__ = ["evict", "fill"]

_PIECE_BYTES = 16 * 2**20


def evict(paths: Sequence[Path]) -> None:
    """Take the files out of the page cache; if the kernel keeps some pages, ask it to drop the whole cache.

    Only the files, if that does: what other programs have in the cache is not ours.
    """
    pagecache.drop(paths)
    if pagecache.resident_share(paths) > 0:
        os.sync()
        with suppress(OSError):  # only root may
            Path("/proc/sys/vm/drop_caches").write_text("1")


def fill(paths: Sequence[Path]) -> None:
    """Read the files into the page cache, those that are not wholly in it."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    for path in paths:
        if pagecache.resident_share([path]) == 1:
            continue
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
