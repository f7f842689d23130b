"""Host memory: where it comes from, how much is held, how much there is.

Memory is anonymous and private, in huge pages where the kernel gives them: filling 2.5 GB of fresh memory takes 0.25 s
with huge pages and 0.8 s without (two cores, Linux 6.18).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import platform
import threading
import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

__all__ = [
    "MAP_FAILED",
    "PAGE_BYTES",
    "Budget",
    "MemoryAccount",
    "Peak",
    "allocate",
    "available_bytes",
    "copy_out",
    "mapping_libc",
    "own_mapping",
    "unmap_with",
    "usable_cores",
]

#: The unit of O_DIRECT and of the ring's slots: the page of every platform that this package runs on.
PAGE_BYTES = 4096

#: What mmap(2) returns when it fails.
MAP_FAILED = ctypes.c_void_p(-1).value

#: A copy of so much takes 5 us; to let go of the interpreter's lock for it and to get it back takes as long.
_SMALL_BYTES = 2**16

_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")

#: The number of the system call `mbind`, for which the C library has no function; and its "prefer this node".
_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_PREFERRED = 1


def allocate(num_bytes: int, *, numa_node: int | None = None) -> mmap.mmap:
    """Map `num_bytes` (> 0) of zeroed private memory, advised to use huge pages. Freed with its last reference.

    `mmap.mmap(-1, n)` alone would be shared memory, which gets no huge pages.

    Args:
        num_bytes: how much.
        numa_node: where its pages should lie once they are touched; a wish, which the kernel need not grant.
    """
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without transparent huge pages: ordinary pages do
            block.madvise(mmap.MADV_HUGEPAGE)  # sets a flag on the mapping; touches no page, so it is quick
    if numa_node is not None and platform.machine() in _MBIND:
        nodes = (ctypes.c_ulong * (numa_node // 64 + 1))()
        nodes[numa_node // 64] = 1 << numa_node % 64
        address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        arguments = (ctypes.c_void_p(address), ctypes.c_ulong(num_bytes), _MPOL_PREFERRED, nodes)
        ctypes.CDLL(None).syscall(_MBIND[platform.machine()], *arguments, ctypes.c_ulong(64 * len(nodes) + 1), 0)
    return block


def mapping_libc() -> ctypes.CDLL:
    """Return the C library with the types of `mmap` and `munmap` declared, for mappings that Python's cannot make."""
    libc = ctypes.CDLL(None, use_errno=True)
    size, flag = ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, size, flag, flag, flag, ctypes.c_long]
    libc.munmap.argtypes = [size, size]
    return libc


class _Unmapping(weakref.ref[object]):
    """Calls `munmap` when what it refers to has gone. It is passed to that function itself, as one argument too many."""

    __slots__ = ()
    _as_parameter_ = None


#: What is to be unmapped with something. Not `weakref.finalize`: when a program ends, that walks over all of its kind, and
#: fails if a thread that still loads makes another meanwhile.
_kept: dict[int, tuple[object, object]] = {}
_keys = itertools.count()


def unmap_with(owner: object, libc: ctypes.CDLL, address: object, num_bytes: object) -> None:
    """Have memory unmapped when `owner` goes, or leave it mapped to the very end of the process.

    The last reference may be let go anywhere, in the middle of Ctrl-C too: what is called then (`munmap`, `dict.pop`) is
    no Python code, so no signal's handler runs, and raises KeyboardInterrupt, before it is done.

    Args:
        owner: what the memory belongs to. It can be referred to weakly.
        libc: from `mapping_libc`.
        address: where the memory begins: an integer, or a `ctypes.c_size_t` that says so in the end.
        num_bytes: its length, likewise.
    """
    key = next(_keys)  # not the address: that may be somebody else's between the two calls
    unmapping = _Unmapping(owner, functools.partial(libc.munmap, address, num_bytes))
    _kept[key] = (unmapping, weakref.ref(owner, functools.partial(_kept.pop, key)))


def own_mapping(libc: ctypes.CDLL, address: int, num_bytes: int, whole_bytes: int | None = None) -> memoryview:
    """Return mapped memory that is unmapped with its last reference; see `unmap_with`.

    Args:
        libc: from `mapping_libc`.
        address: where it begins.
        num_bytes: its length.
        whole_bytes: how much is unmapped, if that is more.
    """
    memory = (ctypes.c_ubyte * num_bytes).from_address(address)
    unmap_with(memory, libc, address, num_bytes if whole_bytes is None else whole_bytes)
    return memoryview(memory).cast("B")


def copy_out(source: memoryview, buffers: Iterable[memoryview]) -> None:
    """Copy host memory to buffers, one after the other; without the GIL, unless they are so small that this costs more."""
    address, position = ctypes.addressof(ctypes.c_char.from_buffer(source)), 0
    for buffer in buffers:
        num_bytes = len(buffer)
        if num_bytes <= _SMALL_BYTES:
            buffer[:] = source[position : position + num_bytes]
        else:
            ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), address + position, num_bytes)
        position += num_bytes


class Peak:
    """The most that an account held while it was watched, in bytes."""

    def __init__(self, value: int) -> None:
        self.value = value


class MemoryAccount:
    """Host memory that loads hold, in bytes. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a stream that the collector ends gives back, on any thread
        self._held = 0
        self._watchers: list[Peak] = []

    @property
    def held_bytes(self) -> int:
        return self._held

    def hold(self, num_bytes: int) -> None:
        with self._lock:
            self._held += num_bytes
            for peak in self._watchers:
                peak.value = max(peak.value, self._held)

    def release(self, num_bytes: int) -> None:
        with self._lock:
            self._held -= num_bytes

    @contextmanager
    def watch(self) -> Generator[Peak, None, None]:
        """Note the peak while the context lasts."""
        with self._lock:
            peak = Peak(self._held)
            self._watchers.append(peak)
        try:
            yield peak
        finally:
            with self._lock:
                self._watchers.remove(peak)


class Budget:
    """A ceiling for staging memory that several takers share. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.RLock()  # a stream that the collector ends gives back, on any thread
        self._taken = 0

    @property
    def left_bytes(self) -> int:
        return self.limit_bytes - self._taken

    def take(self, num_bytes: int) -> bool:
        """Take so many bytes, if that many are left."""
        with self._lock:
            if num_bytes > self.limit_bytes - self._taken:
                return False
            self._taken += num_bytes
            return True

    def give(self, num_bytes: int) -> None:
        with self._lock:
            self._taken -= num_bytes


def available_bytes(*, cgroup: Path = _CGROUP, membership: Path = _MEMBERSHIP) -> int:
    """Return how many bytes of memory this process may still take: the machine's, or its cgroup's if that is less.

    Page cache counts as available, since the kernel gives it up. cgroup v2 (`memory.max`) and v1
    (`memory.limit_in_bytes`) are both read. A group's limit holds for all groups below it, so the least counts.

    Args:
        cgroup: where cgroups are mounted.
        membership: says which groups this process is in.
    """
    available = psutil.virtual_memory().available
    for root, controller, limit_file, usage_file, cache_key in (
        (cgroup, "", "memory.max", "memory.current", "inactive_file"),
        (cgroup / "memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in _groups(root, controller, membership):
            with suppress(OSError, ValueError):  # also for the limit "max"
                limit = int((group / limit_file).read_text())
                usage = int((group / usage_file).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                available = min(available, limit - usage + int(stat.get(cache_key, 0)))
    return max(0, available)


def _groups(root: Path, controller: str, membership: Path) -> list[Path]:
    """Return the folders of this process's group and of those above it, up to the root of the mount.

    In a container they may be missing, all but the root, which is then the container's own group.
    """
    inside = Path()
    with suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(",") and ".." not in Path(path).parts:  # that is outside of the mount
                inside = Path(path.lstrip("/"))
    return [root / inside, *(root / parent for parent in inside.parents)]


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0))
