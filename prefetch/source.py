"""Reads: the bytes of one chunk from an open shard into host buffers, buffered or past the page cache."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from weightstream.errors import ReadError
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.memory import PAGE_BYTES

__all__ = ["ByteRange", "FileSource", "Source"]

logger = logging.getLogger(__name__)

#: The kernel takes at most this many buffers in one call (IOV_MAX).
_MAX_BUFFERS = 1024

_TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT})


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `begin` to `end` of the shard with number `shard`."""

    shard: int
    begin: int
    end: int


class Source(Protocol):
    """Where a load's bytes come from. Its methods are called from reader threads, several at a time."""

    @property
    def direct(self) -> bool:
        """Whether chunks are read by `read_whole`, in the layout of the file, rather than scattered."""
        ...

    def read(self, wanted: ByteRange, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, in order, with the bytes wanted: together they are exactly that long."""
        ...

    def read_whole(self, wanted: ByteRange, slot: memoryview) -> int:
        """Read the range into a page-aligned slot, and return the offset at which its first byte lies there."""
        ...

    def close(self) -> None: ...


class FileSource:
    """Reads from the shards of a checkpoint; keeps account of retries and of refused direct I/O.

    Args:
        checkpoint: stays the caller's, who closes it after this source.
        config: `io` and `retries` are used.
        pause: waits for so many seconds before a retry and returns whether to go on (false: the load was stopped).
        on_retry: told of each repeated read.
        on_fallback: told, once, that direct I/O was refused.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PrefetchConfig,
        *,
        pause: Callable[[float], bool],
        on_retry: Callable[[], None],
        on_fallback: Callable[[str], None],
    ) -> None:
        self._shards = checkpoint.shards
        self._retries = config.retries
        self._pause = pause
        self._on_retry = on_retry
        self._on_fallback = on_fallback
        self._lock = threading.Lock()
        self._direct_fds: dict[int, int] = {}
        self.direct = config.io == "direct"

    def read(self, wanted: ByteRange, buffers: Sequence[memoryview]) -> None:
        """See `Source.read`.

        Raises:
            ReadError: the file ended early, or a read failed and so did its retries.
        """
        rest = list(buffers)
        position = wanted.begin
        first = 0
        while position < wanted.end:
            count = self._preadv(
                wanted.shard, self._shards[wanted.shard].fd, rest[first : first + _MAX_BUFFERS], position
            )
            if count == 0:
                raise self._truncated(wanted, position)
            position += count
            while count and count >= len(rest[first]):
                count -= len(rest[first])
                first += 1
            if count:
                rest[first] = rest[first][count:]

    def read_whole(self, wanted: ByteRange, slot: memoryview) -> int:
        """See `Source.read_whole`. Offset and length are widened to whole pages, as O_DIRECT demands.

        A short read is normal at the end of the file, where no further page exists.

        Raises:
            ReadError: as in `read`.
        """
        start = wanted.begin - wanted.begin % PAGE_BYTES
        need = wanted.end - start
        length = -(-need // PAGE_BYTES) * PAGE_BYTES
        fd = self._direct_fd(wanted.shard)
        done = 0
        while done < need:
            try:
                count = self._preadv(wanted.shard, fd, [slot[done:length]], start + done)
            except OSError:  # EINVAL: the file system takes the flag but not the read
                self._refuse_direct()
                fd = self._shards[wanted.shard].fd
                continue
            if count == 0:
                raise self._truncated(wanted, start + done)
            done += count
            if done < need and done % PAGE_BYTES:  # an odd short read cannot be continued past the page cache
                fd = self._shards[wanted.shard].fd
        return wanted.begin - start

    def close(self) -> None:
        """Close the descriptors that this source opened. No read may be in progress."""
        with self._lock:
            for shard, fd in self._direct_fds.items():
                if fd != self._shards[shard].fd:
                    os.close(fd)
            self._direct_fds.clear()

    def _preadv(self, shard: int, fd: int, buffers: list[memoryview], position: int) -> int:
        """Read once, repeating after errors that may pass. EINVAL is left to the caller: direct I/O says it so."""
        attempt = 0
        while True:
            try:
                return os.preadv(fd, buffers, position)
            except OSError as exc:
                if exc.errno == errno.EINVAL and fd != self._shards[shard].fd:
                    raise
                if exc.errno in _TRANSIENT and attempt < self._retries:
                    attempt += 1
                    logger.debug("read of %s at %d failed (%s), retry %d", self._name(shard), position, exc, attempt)
                    self._on_retry()
                    if self._pause(0.02 * 2**attempt * random.uniform(0.5, 1.5)):  # noqa: S311 (jitter, not a secret)
                        continue
                raise ReadError(
                    f"cannot read: {exc.strerror} (errno {exc.errno})",
                    file=self._name(shard),
                    actual=f"offset {position}, after {attempt} retries",
                ) from exc

    def _direct_fd(self, shard: int) -> int:
        """Return a descriptor of the same inode opened with O_DIRECT, or the ordinary one where that is refused."""
        with self._lock:
            fd = self._direct_fds.get(shard)
            if fd is None:
                ordinary = self._shards[shard].fd
                try:
                    fd = os.open(f"/proc/self/fd/{ordinary}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                except OSError:
                    fd = ordinary
                self._direct_fds[shard] = fd
        if fd == self._shards[shard].fd:
            self._refuse_direct()
        return fd

    def _refuse_direct(self) -> None:
        with self._lock:
            first, self.direct = self.direct, False
        if first:
            self._on_fallback("direct I/O refused by the file system: buffered reads used instead")

    def _truncated(self, wanted: ByteRange, position: int) -> ReadError:
        return ReadError(
            "the file ended while it was being read",
            file=self._name(wanted.shard),
            expected=f"{wanted.end} bytes or more",
            actual=f"{position} bytes",
            hint="It was truncated after the load began",
        )

    def _name(self, shard: int) -> str:
        return str(self._shards[shard].path)
