"""The file system that an open file is on: of this machine, of another one behind a network, or memory.

What it is called decides nothing about how fast it is; that is measured. It decides what can go away: pages of a file on
another machine, or behind a process (FUSE), may be refused long after the load, and who then touches a mapping of it is
killed by SIGBUS.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["FileSystem", "Kind", "file_system_of"]

Kind = Literal["local", "network", "memory"]

_MOUNTS = Path("/proc/self/mountinfo")

#: `f_type` of statfs(2), from linux/magic.h and, for what is no part of Linux, from the systems' own headers. File systems
#: that several machines share on one disk (GFS2, OCFS2), and what a virtual machine's host shares, count as network.
_NETWORK = {
    0x6969: "nfs",
    0x517B: "smb",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x01021997: "9p",
    0x00C36400: "ceph",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x20030528: "orangefs",
    0xAAD7AAEA: "panfs",
    0x5346414F: "afs",
    0x6B414653: "afs",
    0x73757245: "coda",
    0x01161970: "gfs2",
    0x7461636F: "ocfs2",
    0x786F4256: "vboxsf",
    0xBACBACBC: "vmhgfs",
}
_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x958458F6: "hugetlbfs"}
_LOCAL = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0x794C7630: "overlay",
    0x73717368: "squashfs",
    0xE0F5E1E2: "erofs",
}
_FUSE = 0x65735546

#: Of the file systems that all say FUSE: those that need no other machine. `fuseblk` is on a disk of this one; virtiofs is
#: served by the host of a virtual machine, which goes away only with the machine; the last is what containers without
#: root have for their own files.
_LOCAL_FUSE = frozenset({"fuseblk", "virtiofs", "fuse.fuse-overlayfs"})


@dataclass(frozen=True, slots=True)
class FileSystem:
    """What a file is on. `name`: as `mount` calls it; a number in hexadecimal where it is not one of those known here.

    `kind`: `local` also for all that is not known; `network` also for FUSE, unless it is known to be of this machine.
    """

    kind: Kind
    name: str


def file_system_of(fd: int, *, mounts: Path = _MOUNTS) -> FileSystem:
    """Return what an open file is on. May block, as every look at a file on another machine may.

    Args:
        fd: a descriptor of the file.
        mounts: this process's mounts, which tell what FUSE stands for.

    Raises:
        OSError: the file system does not answer.
    """
    number = _number_of(fd)
    if number == _FUSE:
        name = _mounted_as(os.fstat(fd).st_dev, mounts) or "fuse"
        return FileSystem("local" if name in _LOCAL_FUSE else "network", name)
    known: tuple[tuple[Kind, dict[int, str]], ...] = (("network", _NETWORK), ("memory", _MEMORY), ("local", _LOCAL))
    for kind, names in known:
        if number in names:
            return FileSystem(kind, names[number])
    return FileSystem("local", hex(number))


def _number_of(fd: int) -> int:
    """Return `f_type`, the first field of fstatfs(2), which Python's `os.fstatvfs` leaves out."""
    fields = (ctypes.c_long * 32)()  # 120 bytes on the 64-bit platforms that torch runs on
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, ctypes.byref(fields)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(fields[0]) & 0xFFFFFFFF


def _mounted_as(device: int, mounts: Path) -> str | None:
    """Return the type of the mount with a device's number: the first field behind the hyphen; see proc(5)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return None
