"""The memory of this process: made ready before a measurement, and looked at after it. Linux only.

On virtual machines that give free pages back to their host, the first touch of memory costs more than a load, and
differs from run to run. `touch` pays for it before the clock starts.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import resource
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

__all__ = ["compact", "cpu_seconds", "mapped_file_bytes", "read_every_byte", "reset_peak", "status_bytes", "touch"]

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, for which Python has no name
_PAGE_BYTES = mmap.PAGESIZE

Range = tuple[int, int]


def touch(num_bytes: int) -> None:
    """Make the kernel find `num_bytes` of memory that it can hand out again at once: map, populate, free."""
    with mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(_POPULATE_WRITE)


def compact() -> None:
    """Have the kernel put its free memory together, if it lets us: only root may.

    Where that is in pieces, the same load takes between one and four times as long, by which huge pages it happens to
    get, and how many it has to have put together while it waits.
    """
    with suppress(OSError):
        Path("/proc/sys/vm/compact_memory").write_text("1")


def status_bytes(field: str) -> int:
    """Return a line of /proc/self/status: VmRSS; RssAnon; VmHWM, the highest VmRSS since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Let VmHWM start again from the memory that the process has now."""
    Path("/proc/self/clear_refs").write_text("5")


def mapped_file_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return how many of the tensors' bytes lie in mapped files: memory that is read from a disk when it is used."""
    files = sorted(_mapped_files())
    begins = [begin for begin, _ in files]
    total = 0
    for tensor in tensors:
        place = bisect.bisect_right(begins, tensor.data_ptr()) - 1
        if place >= 0 and tensor.data_ptr() < files[place][1]:
            total += tensor.nbytes
    return total


def _mapped_files() -> Iterable[Range]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            begin, end = addresses.split("-")
            yield int(begin, 16), int(end, 16)


def read_every_byte(tensors: Iterable[torch.Tensor]) -> int:
    """Read every byte of CPU tensors once, at the speed of memory; return their sum, so that nothing is left out.

    Tensors that lie less than a page apart are read in one go: no unmapped page fits between them, and the time is that
    of the memory rather than of so many calls.
    """
    total = 0
    for begin, end in _joined((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors):
        whole = np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin))
        words = len(whole) // 8 * 8
        total += int(whole[:words].view(np.uint64).sum(dtype=np.uint64)) + int(whole[words:].sum())
    return total


def _joined(ranges: Iterable[Range]) -> Iterable[Range]:
    begin = end = 0
    for next_begin, next_end in sorted(ranges):
        if next_begin - end < _PAGE_BYTES and end:
            end = max(end, next_end)
            continue
        if end:
            yield begin, end
        begin, end = next_begin, next_end
    if end:
        yield begin, end


def cpu_seconds() -> float:
    """Return the processor time of this process so far, user and system, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
