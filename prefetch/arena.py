"""Host memory for blocks: pieces of large mappings, side by side, so that huge pages reach across their borders.

A mapping for each block instead would begin and end inside a huge page, and be filled before its neighbours exist: 200
blocks of 12.8 MB took 50,000 page faults and had 220 MiB in small pages; side by side they take 1,600 and have none.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

from weightstream.prefetch.memory import MAP_FAILED, PAGE_BYTES, mapping_libc, own_mapping, unmap_with

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
        #: What is left of a mapping.
        self._address, self._rest_bytes = ctypes.c_size_t(0), ctypes.c_size_t(0)
        unmap_with(self, self._libc, self._address, self._rest_bytes)

    def allocate(self, num_bytes: int) -> memoryview:
        """Return `num_bytes` (> 0) of memory that begins on a page, advised to use huge pages.

        Raises:
            MemoryError: there is no address space left, or the limit for this process or machine is reached.
        """
        whole_bytes = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        with self._lock:
            if self._rest_bytes.value < whole_bytes:
                self._libc.munmap(self._address, self._rest_bytes)
                self._rest_bytes.value = 0  # also if there is no more to be had
                self._map(max(whole_bytes, _SEGMENT_BYTES), at_least=whole_bytes)
            address = self._address.value
            self._address.value += whole_bytes
            self._rest_bytes.value -= whole_bytes
        return own_mapping(self._libc, address, num_bytes, whole_bytes)

    def _map(self, num_bytes: int, *, at_least: int) -> None:
        # A length of whole huge pages: only such a mapping is laid onto their borders (Linux 6.7).
        for size in (-(-num_bytes // _HUGE_BYTES) * _HUGE_BYTES, at_least):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            address = self._libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
            if address != MAP_FAILED:
                if hasattr(mmap, "MADV_HUGEPAGE"):  # a wish: a kernel without transparent huge pages says no
                    self._libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
                self._address.value, self._rest_bytes.value = address, size
                return
        raise MemoryError(f"cannot map {at_least} bytes: {os.strerror(ctypes.get_errno())}")
