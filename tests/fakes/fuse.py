"""The kernel's FUSE protocol, as much of it as a read-only file system needs, spoken over /dev/fuse.

By hand, because it is short, and no binding gives what is wanted here: answers that come later without a thread waiting
for each, requests of 1 MiB, an exact errno, and data that goes from a mapped file to the kernel in one copy. Layouts and
numbers are those of linux/fuse.h, version 7.38; the kernel says how much of it it knows.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Device", "Opcode", "Read", "attributes", "directory", "entry", "opened", "unmount", "why_not"]

_DEVICE = Path("/dev/fuse")
_CAP_SYS_ADMIN = 1 << 21
_MS_RDONLY_NOSUID_NODEV = 1 | 2 | 4
_MNT_DETACH = 2

_IN_HEADER = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, -, -
_OUT_HEADER = struct.Struct("<IiQ")  # length, -errno, unique
_INIT_IN = struct.Struct("<IIII")  # major, minor, max_readahead, flags
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_READ_IN = struct.Struct("<QQIIQII")  # handle, offset, size, -, -, flags of the open, -
_OPEN_IN = struct.Struct("<II")  # flags, -
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY_OUT = struct.Struct("<QQQQII")  # node, generation, and for how long the kernel may keep entry and attributes
_OPEN_OUT = struct.Struct("<QII")  # handle, flags, -
_STATFS_OUT = struct.Struct("<QQQQQIIII24x")

_FUSE_ASYNC_READ = 1 << 0
_FUSE_MAX_PAGES = 1 << 22
_FOPEN_DIRECT_IO = 1 << 0
_FOPEN_KEEP_CACHE = 1 << 1
_FOPEN_NOFLUSH = 1 << 5


class Opcode:
    """The requests that are answered. What else there is gets ENOSYS, which the kernel takes well."""

    LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 14, 15, 17, 18
    INIT, OPENDIR, READDIR, RELEASEDIR, INTERRUPT, DESTROY, BATCH_FORGET = 26, 27, 28, 29, 36, 38, 42


def why_not() -> str | None:
    """Say why this process cannot mount a FUSE file system; None: it can."""
    if not _DEVICE.exists():
        return f"there is no {_DEVICE}"
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        return f"{_DEVICE} may not be opened"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and not int(line.split()[1], 16) & _CAP_SYS_ADMIN:
            return "mounting needs CAP_SYS_ADMIN, which root has"
    return None


def unmount(path: Path) -> None:
    """Take a file system out of the tree, also if somebody uses it; one that is not there is no error."""
    ctypes.CDLL(None).umount2(os.fsencode(path), _MNT_DETACH)


@dataclass(frozen=True, slots=True)
class Request:
    """A request of the kernel. `unique` names it in the answer."""

    opcode: int
    unique: int
    node: int
    body: bytes

    @property
    def name(self) -> str:
        """The name that is looked up."""
        return os.fsdecode(self.body.rstrip(b"\0"))

    @property
    def flags(self) -> int:
        """The flags of an open."""
        flags, _ = _OPEN_IN.unpack_from(self.body)
        return int(flags)

    @property
    def interrupted(self) -> int:
        """The `unique` of the request that an INTERRUPT is about."""
        return int.from_bytes(self.body[:8], "little")

    @property
    def read(self) -> Read:
        """What a READ or READDIR asks for."""
        handle, offset, num_bytes, *_ = _READ_IN.unpack_from(self.body)
        return Read(handle, offset, num_bytes)


@dataclass(frozen=True, slots=True)
class Read:
    handle: int
    offset: int
    num_bytes: int


class Device:
    """A mounted file system, from the inside. Thread-safe; requests may be answered in any order, from any thread.

    Args:
        path: an empty folder.
        request_bytes: the most that one read request asks for.
    """

    def __init__(self, path: Path, *, request_bytes: int) -> None:
        self._request_bytes = request_bytes
        self._fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode={stat.S_IFDIR:o},user_id={os.geteuid()},group_id={os.getegid()}"
        options += f",allow_other,max_read={request_bytes}"
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (b"weightstream", os.fsencode(path), b"fuse", _MS_RDONLY_NOSUID_NODEV, options.encode())
        if libc.mount(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot mount at {path}: {os.strerror(number)}")

    def receive(self) -> Request | None:
        """Block until there is a request; None: the file system has been unmounted, or given up by the kernel."""
        while True:
            try:
                raw = os.read(self._fd, 2**16)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # ENOENT: interrupted before it was read
                    continue
                return None
            _, opcode, unique, node, *_ = _IN_HEADER.unpack_from(raw)
            request = Request(opcode, unique, node, raw[_IN_HEADER.size :])
            if opcode != Opcode.INIT:
                return request
            self._start(request)

    def answer(self, unique: int, *parts: bytes | memoryview) -> None:
        """Answer a request; one that nobody waits for any more is no error."""
        length = _OUT_HEADER.size + sum(map(len, parts))
        self._write([_OUT_HEADER.pack(length, 0, unique), *parts])

    def refuse(self, unique: int, number: int) -> None:
        """Answer a request with an errno."""
        self._write([_OUT_HEADER.pack(_OUT_HEADER.size, -number, unique)])

    def _write(self, parts: Sequence[bytes | memoryview]) -> None:
        with suppress(OSError):
            os.writev(self._fd, parts)

    def _start(self, request: Request) -> None:
        """Agree on what the connection can do: reads of `request_bytes`, several at once."""
        _, minor, max_readahead, _ = _INIT_IN.unpack_from(request.body)
        flags = _FUSE_ASYNC_READ | _FUSE_MAX_PAGES
        pages = self._request_bytes // 4096
        answer = _INIT_OUT.pack(7, min(minor, 38), max_readahead, flags, 256, 192, 4096, 1, pages, 0, 0)
        self.answer(request.unique, answer)


def attributes(found: os.stat_result, num_bytes: int, mtime_ns: int) -> bytes:
    """A file's attributes, which the kernel may not keep."""
    return bytes(16) + _attributes(found, num_bytes, mtime_ns)


def entry(node: int, found: os.stat_result, num_bytes: int, mtime_ns: int) -> bytes:
    """A name's node and attributes, which the kernel may not keep."""
    return _ENTRY_OUT.pack(node, 0, 0, 0, 0, 0) + _attributes(found, num_bytes, mtime_ns)


def _attributes(found: os.stat_result, num_bytes: int, mtime_ns: int) -> bytes:
    seconds, nanoseconds = divmod(mtime_ns, 10**9)
    times = (seconds,) * 3, (nanoseconds,) * 3
    who = found.st_mode, 1, found.st_uid, found.st_gid
    return _ATTRIBUTES.pack(found.st_ino, num_bytes, -(-num_bytes // 512), *times[0], *times[1], *who, 0, 4096, 0)


def opened(handle: int, *, is_cached: bool) -> bytes:
    """An open file, whose pages the kernel keeps as it does for a disk, or never; closing it asks nothing."""
    return _OPEN_OUT.pack(handle, _FOPEN_NOFLUSH | (_FOPEN_KEEP_CACHE if is_cached else _FOPEN_DIRECT_IO), 0)


def directory(names: Sequence[str], read: Read) -> bytes:
    """The entries of a folder from `read.offset` on, as many as fit."""
    found = b""
    for number, name in enumerate(names[read.offset :], read.offset + 1):
        raw = os.fsencode(name)
        one = struct.pack("<QQII", number, number, len(raw), 0) + raw
        one += bytes(-len(one) % 8)
        if len(found) + len(one) > read.num_bytes:
            break
        found += one
    return found


def empty_statistics() -> bytes:
    """What statfs(2) says of a file system that tells nothing about its room."""
    return _STATFS_OUT.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0)
