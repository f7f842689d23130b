"""Host memory for blocks: pieces of large mappings, side by side, so that huge pages reach across their borders.

A mapping for each block instead would begin and end inside a huge page, and be filled before its neighbours exist: 200
blocks of 12.8 MB took 50,000 page faults and had 220 MiB in small pages; side by side they take 1,600 and have none.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

from weightstream.prefetch.memory import MAP_FAILED, PAGE_BYTES, mapping_libc, own_mapping

__all__ = ["Arena"]

_HUGE_BYTES = 2 * 2**20
#: Address space that is mapped at a time; memory is what has been touched of it.
_SEGMENT_BYTES = 256 * 2**20


class Arena:
    """Hands out zeroed private memory. Each piece is unmapped with its last reference, wherever its neighbours are.

    Thread-safe. What is left of a mapping is kept for the next piece, and unmapped with the arena.
    """

    def __init__(self) -> None:
        self._libc = mapping_libc()
        self._lock = threading.Lock()
        self._rest = _Rest()

    def allocate(self, num_bytes: int) -> memoryview:
        """Return `num_bytes` (> 0) of memory that begins on a page, advised to use huge pages.

        Raises:
            MemoryError: there is no address space left, or the limit for this process or machine is reached.
        """
        whole_bytes = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        with self._lock:
            if self._rest.num_bytes < whole_bytes:
                self._rest.unmap(self._libc)
                self._map(max(whole_bytes, _SEGMENT_BYTES), at_least=whole_bytes)
            address = self._rest.take(whole_bytes)
        return own_mapping(self._libc, address, num_bytes, whole_bytes)

    def __del__(self) -> None:
        self._rest.unmap(self._libc)

    def _map(self, num_bytes: int, *, at_least: int) -> None:
        # A length of whole huge pages: only such a mapping is laid onto their borders (Linux 6.7).
        for size in (-(-num_bytes // _HUGE_BYTES) * _HUGE_BYTES, at_least):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            address = self._libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
            if address != MAP_FAILED:
                if hasattr(mmap, "MADV_HUGEPAGE"):  # a wish: a kernel without transparent huge pages says no
                    self._libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
                self._rest.address, self._rest.num_bytes = address, size
                return
        raise MemoryError(f"cannot map {at_least} bytes: {os.strerror(ctypes.get_errno())}")


class _Rest:
    """What is left of a mapping."""

    def __init__(self) -> None:
        self.address = self.num_bytes = 0

    def take(self, num_bytes: int) -> int:
        address = self.address
        self.address += num_bytes
        self.num_bytes -= num_bytes
        return address

    def unmap(self, libc: ctypes.CDLL) -> None:
        if self.num_bytes:
            libc.munmap(self.address, self.num_bytes)
        self.address = self.num_bytes = 0
