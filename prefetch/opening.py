"""Opening: which files may be opened at all, and how.

A checkpoint comes from somebody else: the names in it lead to regular files inside its folder, or in the blobs of the
Hugging Face cache that it is a snapshot of, and nowhere else.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from weightstream.errors import CheckpointError, IntegrityError, MissingShardError, ReadError
from weightstream.prefetch.attempts import refused
from weightstream.prefetch.hub import blob_name, is_blob

__all__ = [
    "Shard",
    "files_hint",
    "identity_of",
    "is_out_of_files",
    "open_regular",
    "open_shard",
    "read_exactly",
    "read_whole",
    "resolve",
]

#: The kernel's limit on a path (PATH_MAX). Longer names are refused before anything splits or resolves them.
_MAX_NAME_BYTES = 4096

#: It never waits, for a FIFO say, and follows no link that has been put in the place of the file meanwhile.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Shard:
    """One open file of a checkpoint.

    Attributes:
        path: its name in the checkpoint's folder.
        fd: open for reading.
        num_bytes: its length.
        identity: (device, inode, bytes, mtime in ns) as the preflight saw it.
        blob: its name among the blobs of the Hugging Face cache, if the checkpoint is a snapshot there.
    """

    path: Path
    fd: int
    num_bytes: int
    identity: tuple[int, int, int, int]
    blob: str | None = None


def open_shard(root: Path, name: str, listed_in: Path, *, allow_outside_links: bool) -> Shard:
    """Open one shard for reading, after checking where it lies and what it is; never blocks on a FIFO."""
    if (
        not name
        or "\0" in name
        or name.startswith("/")
        or len(os.fsencode(name)) > _MAX_NAME_BYTES
        or ".." in name.split("/")
    ):
        raise CheckpointError(
            f"the shard's name {name[:100]!r} is not a plain relative path",
            file=listed_in,
            hint="Do not trust this index",
        )
    path = root / name
    resolved = resolve(root, path, allow_outside_links=allow_outside_links)
    try:
        fd, opened = open_regular(path, resolved)
    except FileNotFoundError as exc:
        raise MissingShardError(
            "the shard does not exist", file=path, hint=f"{listed_in.name} names it: fetch it again"
        ) from exc
    return Shard(path, fd, opened.st_size, identity_of(opened), blob_name(root, path, resolved))


def resolve(root: Path, path: Path, *, allow_outside_links: bool) -> Path:
    """Follow links, which must end in the checkpoint's own folder `root`, or in the blobs that it is a snapshot of.

    Args:
        root: without links itself.
        path: what is to be opened.
        allow_outside_links: whether they may end anywhere.
    """
    # Nearly all files are this, and an index may list tens of thousands.
    if path.parent == root and not os.path.islink(path):  # noqa: PTH114 (that of Path raises for long names)
        return path
    try:
        resolved = Path(os.path.realpath(path))
    except RecursionError as exc:
        raise CheckpointError("too many links that lead to each other", file=path) from exc
    if allow_outside_links or resolved.is_relative_to(root) or is_blob(root, resolved):
        return resolved
    raise CheckpointError(
        "this is a link to outside the checkpoint's folder",
        file=path,
        expected=f"a file in {root}",
        actual=resolved,
        hint="Set prefetch.allow_outside_links if you trust it",
    )


def open_regular(path: Path, resolved: Path) -> tuple[int, os.stat_result]:
    """Open a regular file, and nothing else. Whether it exists is the caller's care.

    Args:
        path: its name in messages.
        resolved: where it is, without links.
    """
    try:
        before = os.stat(resolved)
        if not stat.S_ISREG(before.st_mode):
            raise CheckpointError("not a regular file", file=path, actual=stat.filemode(before.st_mode))
        fd = os.open(resolved, _FLAGS)
        try:
            opened = os.fstat(fd)
        except OSError:  # a server may have forgotten it by now
            os.close(fd)
            raise
    except FileNotFoundError:
        raise
    except OSError as exc:
        hint = files_hint() if is_out_of_files(exc) else None
        raise refused("open the file", exc, file=path, hint=hint) from exc
    if identity_of(opened) != identity_of(before):
        os.close(fd)
        raise IntegrityError("the file was replaced while it was being opened", file=path)
    return fd, opened


def is_out_of_files(error: BaseException | None) -> bool:
    """Tell whether the operating system opens no more files for this process, or for all of them together."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def files_hint(num_files: int | None = None) -> str:
    """Say what can be done about that. `num_files`: how many the checkpoint has, if that is known."""
    each = "each file of the checkpoint" if num_files is None else f"each of the checkpoint's {num_files} files"
    return f"Raise the limit on open files (ulimit -n): {each} stays open, and once more unless prefetch.io is buffered"


def read_whole(path: Path, resolved: Path, *, what: str, most_bytes: int) -> bytes:
    """Read a file that describes a checkpoint; `path` is its name in messages, and `what` what it is.

    Raises:
        CheckpointError: it has more than `most_bytes`, or is no regular file.
        ReadError: the operating system refused to open or read it, or it was cut off meanwhile.
    """
    try:
        fd, opened = open_regular(path, resolved)
        with os.fdopen(fd, "rb"):
            if opened.st_size > most_bytes:
                raise CheckpointError(
                    f"the {what} is too long",
                    file=path,
                    expected=f"at most {most_bytes} bytes",
                    actual=f"{opened.st_size} bytes",
                )
            return read_exactly(fd, opened.st_size, 0, str(path), what=what)
    except OSError as exc:
        raise refused(f"open the {what}", exc, file=path) from exc


def read_exactly(fd: int, count: int, offset: int, file: str, *, what: str = "header") -> bytes:
    """Read what a file says about itself, or about a checkpoint; `what` it is, for messages.

    Raises:
        ReadError: the operating system refused, or the file ends too early.
    """
    parts: list[bytes] = []
    while count:
        try:
            part = os.pread(fd, count, offset)
        except OSError as exc:
            raise refused(f"read the {what}", exc, file=file, offset=offset) from exc
        if not part:
            raise ReadError(
                f"the file ended while the {what} was being read", file=file, expected=f"{count} more bytes"
            )
        parts.append(part)
        count -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def identity_of(found: os.stat_result) -> tuple[int, int, int, int]:
    """Return what tells a file from others, and from itself after a change: device, inode, bytes, mtime in ns."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
