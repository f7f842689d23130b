"""Mapping: shards as memory, for tensors that are views of their file.

Mappings are private: whoever writes to such a tensor gets pages of their own, and the file stays as it is. A file that
is truncated while it is mapped kills the process that touches what is gone (SIGBUS); that is how mapped files are. So
does one whose server has gone away: see `refuse_network`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Sequence

from weightstream.errors import CheckpointError
from weightstream.prefetch.filesystem import file_system_of
from weightstream.prefetch.memory import MAP_FAILED, PAGE_BYTES, mapping_libc, own_mapping
from weightstream.prefetch.opening import Shard
from weightstream.prefetch.source import ByteRange
from weightstream.ranks import ranked_logger

__all__ = ["Prefault", "map_shard", "populate", "refuse_network"]

logger = ranked_logger(__name__)

#: Makes the kernel read and map pages now (Linux 5.14); before that, it can only be asked to read ahead.
_MADV_POPULATE_READ = 22
_MADV_WILLNEED = 3


def map_shard(shard: Shard) -> memoryview:
    """Map a whole shard, copy on write. Unmapped with its last reference, tensors that are views of it included.

    Not with Python's `mmap`, which would keep a descriptor open for as long as the mapping lives.

    Raises:
        OSError: the file system cannot map files.
    """
    libc = mapping_libc()
    address = libc.mmap(None, shard.num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, shard.fd, 0)
    if address == MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return own_mapping(libc, address, shard.num_bytes)


def refuse_network(shards: Sequence[Shard]) -> None:
    """Make sure that no shard is on a file system that may cease to deliver pages.

    Raises:
        CheckpointError: one is.
        OSError: a file system does not answer.
    """
    for shard in shards:
        found = file_system_of(shard.fd)
        if found.kind == "network":
            raise CheckpointError(
                "strategy: map would leave tensors in a file on a network file system, and a page that its server does not"
                " deliver kills the process (SIGBUS)",
                file=shard.path,
                expected="a local file system",
                actual=found.name,
                hint="Set strategy to stream, or prefetch.allow_network_map if you trust the server to stay",
            )


class Prefault:
    """Brings mapped ranges into memory, in order, on reader threads; a `prefetch.readers.ReadQueue`.

    It is a help and no part of a load: what it could not do is done when the memory is first touched.

    Args:
        mappings: of the shards, by number.
        ranges: what to bring in.
    """

    def __init__(self, mappings: Sequence[memoryview], ranges: Sequence[ByteRange]) -> None:
        self._lock = threading.Lock()
        self._left = [(mappings[wanted.shard], wanted) for wanted in reversed(ranges)]

    @property
    def is_done(self) -> bool:
        """Whether every range has been brought in or is being so."""
        return not self._left

    def stop(self) -> None:
        """Bring in nothing more, and let the mappings go."""
        with self._lock:
            self._left.clear()

    @property
    def has_part(self) -> bool:
        return not self.is_done

    def take(self) -> Callable[[], None] | None:
        with self._lock:
            if not self._left:
                return None
            memory, wanted = self._left.pop()
        return lambda: populate(memory[wanted.begin : wanted.end])


def populate(memory: memoryview) -> None:
    """Bring a part of a mapped file in, and wait for it. Where that is not possible, whoever touches it first waits."""
    # Not `mmap.madvise`, which holds the GIL meanwhile: 168 ms for half a gigabyte.
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    page = begin // PAGE_BYTES * PAGE_BYTES
    address, length = ctypes.c_void_p(page), ctypes.c_size_t(begin - page + len(memory))
    libc = mapping_libc()
    if libc.madvise(address, length, _MADV_POPULATE_READ) and libc.madvise(address, length, _MADV_WILLNEED):
        logger.debug("cannot prefault %d bytes: %s", len(memory), os.strerror(ctypes.get_errno()))
