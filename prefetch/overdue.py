"""Overdue writes: memory that reads may still write to although they were given up, in this whole process.

Nobody can call back a read that hangs in the kernel. So its memory is remembered until it returns, and whoever wants to put
something else there can ask first.
"""

from __future__ import annotations

import ctypes
import threading

__all__ = ["expect", "is_expected", "is_over"]

_lock = threading.Lock()
_expected: dict[object, list[memoryview]] = {}


def expect(read: object, buffers: list[memoryview]) -> None:
    """Note what a read that is given up may still write to; nothing in the list means: anything, it is not known yet."""
    with _lock:
        _expected[read] = buffers


def is_over(read: object) -> None:
    """Note that a read has returned, whether or not it was given up."""
    with _lock:
        _expected.pop(read, None)


def is_expected(address: int = 0, num_bytes: int = 2**64) -> bool:
    """Tell whether something may still be written to a range of memory; without arguments, to any."""
    with _lock:
        return any(
            not buffers or any(_overlaps(buffer, address, num_bytes) for buffer in buffers)
            for buffers in _expected.values()
        )


def _overlaps(buffer: memoryview, address: int, num_bytes: int) -> bool:
    if not len(buffer):
        return False
    begin = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    return begin < address + num_bytes and address < begin + len(buffer)
