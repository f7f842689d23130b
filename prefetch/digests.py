"""Digests: what the SHA-256 of a checkpoint's files should be, and manifests, which say so.

Two sources are known. A *manifest* is a file beside the index, `SHA256SUMS` or `*.sha256`, in the format that
`sha256sum` writes (GNU coreutils, "md5sum invocation"): 64 hexadecimal digits, a space, a space or an asterisk, the
file's name; a line that begins with a backslash has its name's backslashes, line feeds and carriage returns escaped. In
the Hugging Face *hub*'s cache a snapshot's files are links to blobs, and the name of a large one is its SHA-256 (a name
of 40 digits is a git hash of something else).
"""

from __future__ import annotations

import functools
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from weightstream.errors import CheckpointError, IntegrityError, shown
from weightstream.prefetch.attempts import ONCE, Attempts, refused
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.opening import Shard, read_whole, resolve

__all__ = [
    "MANIFEST_NAME",
    "Digest",
    "find_digests",
    "no_digest",
    "parse_manifest",
    "unfinished_manifest",
    "write_manifest",
]

#: What we write, and the first name that we look for.
MANIFEST_NAME = "SHA256SUMS"

#: Our own limit on the length of a manifest: a hundred thousand lines.
_MAX_MANIFEST_BYTES = 2**24

_LINE = re.compile(rb"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_ESCAPED = re.compile(rb"\\(.?)", re.DOTALL)
_UNESCAPED = {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}


class Digest(NamedTuple):
    """What a file's SHA-256 should be, in small hexadecimal digits, and who says so: `manifest` or `hub`."""

    sha256: str
    source: str


def find_digests(
    checkpoint: Checkpoint,
    *,
    allow_outside_links: bool = False,
    except_manifest: str | None = None,
    attempts: Attempts = ONCE,
) -> list[Digest | None]:
    """Look up what the SHA-256 of each shard should be; None where nobody says so.

    Args:
        checkpoint: whose shards.
        allow_outside_links: whether manifests, as shards, may be links to elsewhere.
        except_manifest: the name of a manifest that is not looked at.
        attempts: says how often a manifest is looked for, opened and read again after an error that may pass.

    Raises:
        CheckpointError: a manifest is not in the format, or may not be opened.
        IntegrityError: two of them disagree.
        ReadError: a manifest cannot be read.
    """
    folder = checkpoint.folder
    named: dict[str, str] = {}
    for manifest in attempts.call(lambda: _manifests(folder), folder):
        if manifest == except_manifest:
            continue
        path = folder / manifest
        resolved = resolve(folder, path, allow_outside_links=allow_outside_links)
        read = functools.partial(read_whole, path, resolved, what="manifest", most_bytes=_MAX_MANIFEST_BYTES)
        for name, sha256 in parse_manifest(attempts.call(read, path), file=str(path)):
            if named.setdefault(name, sha256) != sha256:
                raise _disagreement(folder / name, named[name], sha256, f"{manifest} says otherwise than another line")
    return [_digest(shard, named.get(str(shard.path.relative_to(folder)))) for shard in checkpoint.shards]


def no_digest(shard: Shard) -> IntegrityError:
    """Return the error for a shard that is to be verified and of which nobody says what its SHA-256 should be."""
    return IntegrityError(
        "nobody says what the SHA-256 of this file should be",
        file=shard.path,
        expected=f"{MANIFEST_NAME} or a *.sha256 file beside the checkpoint with a line for it, or a link to a blob of "
        "the Hugging Face cache that is named by its SHA-256",
        actual=None if shard.blob is None else f"the blob {shard.blob}, whose name is no SHA-256",
        hint="Write a manifest of files that you trust (weightstream verify --write-manifest), or set prefetch.verify"
        " to none",
    )


def parse_manifest(raw: bytes, *, file: str) -> list[tuple[str, str]]:
    """Parse a manifest; empty lines and those that begin with `#` are passed over, as sha256sum does.

    Returns:
        (name, SHA-256 in small digits) for each line. Names are relative, without `./`.

    Raises:
        CheckpointError: a line is not in the format.
    """
    found: list[tuple[str, str]] = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        text = line.removesuffix(b"\r")
        if not text.strip() or text.startswith(b"#"):
            continue
        match = _LINE.fullmatch(text)
        name = None if match is None else _unescape(match[3]) if match[1] else match[3]
        if match is None or name is None:
            raise CheckpointError(
                f"line {number} of the manifest is not in the format of sha256sum",
                file=file,
                expected="64 hexadecimal digits, two spaces, and a file's name",
                actual=repr(line[:100]),
                hint="Write it anew with sha256sum",
            )
        found.append((str(PurePosixPath(os.fsdecode(name))), match[2].decode().lower()))
    return found


def unfinished_manifest(folder: Path) -> Path:
    """Return a name of its own for a manifest that is being written: what a killed process leaves is in nobody's way."""
    return folder / f".{MANIFEST_NAME}.{secrets.token_hex(8)}"


def write_manifest(
    folder: Path, digests: Iterable[tuple[str, str]], *, overwrite: bool = False, temporary: Path | None = None
) -> Path:
    """Write a manifest that `sha256sum -c` accepts, whole or not at all.

    Args:
        folder: where its names begin.
        digests: names and SHA-256.
        overwrite: whether one that is there already may be replaced.
        temporary: its name until it is whole, from `unfinished_manifest`, for who removes it if this process ends before.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be written, or the file system has no hard links, which tell whether there is one.
    """
    path = folder / MANIFEST_NAME
    temporary = temporary or unfinished_manifest(folder)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            file.writelines(_line(name, sha256) for name, sha256 in digests)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            os.link(temporary, path)
            temporary.unlink()
    except BaseException as exc:
        temporary.unlink(missing_ok=True)
        if isinstance(exc, OSError):  # what writes to a descriptor knows no name, and the others have two
            exc.filename, exc.filename2 = str(path), None
        raise
    return path


def _manifests(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError as exc:
        raise refused("look for a manifest", exc, file=folder) from exc
    others = sorted(name for name in names if name.endswith(".sha256"))
    return [MANIFEST_NAME, *others] if MANIFEST_NAME in names else others


def _digest(shard: Shard, in_manifest: str | None) -> Digest | None:
    in_cache = shard.blob if shard.blob is not None and re.fullmatch("[0-9a-f]{64}", shard.blob) else None
    if in_manifest is None:
        return None if in_cache is None else Digest(in_cache, "hub")
    if in_cache is not None and in_cache != in_manifest:
        raise _disagreement(shard.path, in_manifest, in_cache, "the manifest says otherwise than the blob's name")
    return Digest(in_manifest, "manifest")


def _disagreement(file: Path, first: str, second: str, what: str) -> IntegrityError:
    return IntegrityError(
        f"there are two opinions on what its SHA-256 should be: {shown(what)}",
        file=file,
        expected=first,
        actual=second,
        hint="Remove the wrong one",
    )


def _unescape(name: bytes) -> bytes | None:
    """Undo sha256sum's escapes; None where something else is escaped."""
    if any(escaped not in _UNESCAPED for escaped in _ESCAPED.findall(name)):
        return None
    return _ESCAPED.sub(lambda match: _UNESCAPED[match[1]], name)


def _line(name: str, sha256: str) -> bytes:
    raw = os.fsencode(name)
    escaped = raw.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != raw else b"") + sha256.encode() + b"  " + escaped + b"\n"
