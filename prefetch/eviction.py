"""Eviction: takes out of the page cache what a load has brought there, where the cache counts against a container.

Only what came from storage: pages that were there before the load stay, since somebody else has brought them in and may
count on them. It is a request: the kernel keeps pages that are mapped and in use, or not yet written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from weightstream.prefetch.memory import PAGE_BYTES
from weightstream.prefetch.opening import Shard
from weightstream.prefetch.source import ByteRange

__all__ = ["Eviction"]


class Eviction:
    """Evicts ranges of shards. Thread-safe: it has no state that changes.

    Args:
        shards: the checkpoint's; stay open until `finish`.
        cold: what was not in the page cache before the load.
        is_everything: whether that is all that the load reads.
    """

    def __init__(self, shards: Sequence[Shard], cold: Sequence[ByteRange], *, is_everything: bool) -> None:
        self._shards = shards
        self._cold = cold
        self._is_everything = is_everything

    def forget(self, part: ByteRange) -> None:
        """Evict a range that has been read, with the whole of its first and last page.

        The kernel leaves out pages of which only a part is named. A neighbour that still needs one reads it again.
        """
        begin = part.begin // PAGE_BYTES * PAGE_BYTES
        end = -(-part.end // PAGE_BYTES) * PAGE_BYTES
        with suppress(OSError):  # no load fails because a file system does not know how to forget
            os.posix_fadvise(self._shards[part.shard].fd, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        """Evict everything once more: the kernel reads ahead, also into what was read and evicted before.

        Where nothing was there before, the headers go, too.
        """
        if self._is_everything:
            for number in {part.shard for part in self._cold}:
                self.forget(ByteRange(number, 0, self._shards[number].num_bytes))
        else:
            for part in self._cold:
                self.forget(part)
