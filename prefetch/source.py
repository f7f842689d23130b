"""Reads: the bytes of one chunk from an open shard into host buffers, buffered or past the page cache."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from weightstream.errors import ReadError
from weightstream.prefetch.attempts import Attempts, refused, tried
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.memory import PAGE_BYTES
from weightstream.prefetch.opening import is_out_of_files
from weightstream.prefetch.residency import resident_shares

__all__ = ["ByteRange", "FileSource", "Source"]

#: The kernel takes at most this many buffers in one call (IOV_MAX).
_MAX_BUFFERS = 1024

_NO_DIRECT_FILES = (
    "not as many files may be open as direct reads need, two for each of the checkpoint: buffered reads used instead"
    " (raise ulimit -n)"
)
_DIRECT_REFUSED = "direct I/O refused by the file system: buffered reads used instead"


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `begin` to `end` of the shard with number `shard`."""

    shard: int
    begin: int
    end: int


class Source(Protocol):
    """Where a load's bytes come from. Its methods are called from several threads at a time."""

    def has_direct(self, shard: int) -> bool:
        """Tell whether a shard can be read past the page cache. Does not block."""
        ...

    def resident_shares(self, wanted: Sequence[ByteRange]) -> list[float | None]:
        """Return how much of each range is in the page cache, 0.0 to 1.0, or None where that cannot be known."""
        ...

    def read(self, wanted: ByteRange, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, in order, with the bytes wanted: together they are exactly that long."""
        ...

    def read_direct(self, wanted: ByteRange, memory: memoryview) -> None:
        """Read the pages that a range lies in, past the page cache, to the beginning of page-aligned memory."""
        ...

    def close(self) -> None: ...


class FileSource:
    """Reads from the shards of a checkpoint; keeps account of retries and of refused direct I/O.

    Args:
        checkpoint: stays the caller's, who closes it after this source.
        config: `io` and `retries` are used. Unless `io` is `buffered`, every shard is opened for direct reads here.
        pause: waits for so many seconds before a retry and returns whether to go on (false: the load was stopped).
        on_retry: told of each repeated read.
        on_fallback: told that direct I/O was asked for and refused, or that too few files may be open for it.
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
        self._attempts = Attempts(config.retries, pause=pause, on_retry=on_retry)
        self._on_fallback = on_fallback
        self._lock = threading.Lock()
        self._wants_direct = config.io == "direct"
        self._opened: dict[int, int] = {}
        self._direct_fds: dict[int, int] = {}  # those that still serve
        if config.io != "buffered":
            self._open_direct()
        self._direct_fds.update(self._opened)

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

    def has_direct(self, shard: int) -> bool:
        return shard in self._direct_fds

    def resident_shares(self, wanted: Sequence[ByteRange]) -> list[float | None]:
        shares: list[float | None] = [None] * len(wanted)
        by_shard: dict[int, list[int]] = {}
        for number, one in enumerate(wanted):
            by_shard.setdefault(one.shard, []).append(number)
        for number, members in by_shard.items():
            shard = self._shards[number]
            ranges = [(wanted[member].begin, wanted[member].end) for member in members]
            for member, share in zip(members, resident_shares(shard.fd, shard.num_bytes, ranges), strict=True):
                shares[member] = share
        return shares

    def read_direct(self, wanted: ByteRange, memory: memoryview) -> None:
        """See `Source.read_direct`. O_DIRECT demands whole pages; at the end of a file the last one is short.

        Where the file system takes the flag but refuses the read, the page cache serves it, and all later ones.

        Raises:
            ReadError: as in `read`.
        """
        start = wanted.begin - wanted.begin % PAGE_BYTES
        need = wanted.end - start
        length = -(-need // PAGE_BYTES) * PAGE_BYTES
        ordinary = self._shards[wanted.shard].fd
        fd = self._direct_fds.get(wanted.shard, ordinary)
        done = 0
        while done < need:
            try:
                count = self._preadv(wanted.shard, fd, [memory[done:length]], start + done)
            except OSError:  # EINVAL: it takes the flag but not the read
                self._refuse_direct(wanted.shard)
                fd = ordinary
                continue
            if count == 0:
                raise self._truncated(wanted, start + done)
            done += count
            if done < need and done % PAGE_BYTES:  # an odd short read cannot be continued past the page cache
                fd = ordinary

    def close(self) -> None:
        """Close the descriptors that this source opened. No read may be in progress."""
        with self._lock, ExitStack() as stack:  # all of them, also if one makes trouble
            for fd in self._opened.values():
                stack.callback(os.close, fd)
            self._opened.clear()
            self._direct_fds.clear()

    def _preadv(self, shard: int, fd: int, buffers: list[memoryview], position: int) -> int:
        """Read once, repeating after errors that may pass. EINVAL is left to the caller: direct I/O says it so."""
        number = 0
        while True:
            try:
                return os.preadv(fd, buffers, position)
            except OSError as exc:
                if exc.errno == errno.EINVAL and fd != self._shards[shard].fd:
                    raise
                if not self._attempts.once_more(exc, number, self._name(shard)):
                    error = refused("read", exc, file=self._name(shard), offset=position)
                    raise tried(error, number) from exc
            number += 1

    def _open_direct(self) -> None:
        """Open the same inodes once more, with O_DIRECT, where the file system lets us.

        None of them where not as many files may be open.
        """
        for number, shard in enumerate(self._shards):
            try:
                self._opened[number] = os.open(f"/proc/self/fd/{shard.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                if is_out_of_files(error):  # those that are open leave no room for what else the load opens
                    self.close()
                    self._on_fallback(_NO_DIRECT_FILES)
                    return
                if self._wants_direct:
                    self._on_fallback(_DIRECT_REFUSED)

    def _refuse_direct(self, shard: int) -> None:
        with self._lock:
            first = self._direct_fds.pop(shard, None) is not None
        if first and self._wants_direct:
            self._on_fallback(_DIRECT_REFUSED)

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
