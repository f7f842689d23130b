"""Checkpoints: from a path to open, checked shards and the list of their tensors.

Owns the shards' descriptors while a load runs, and the rules of which files may be opened at all. Changes nothing.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

import msgspec

from weightstream.errors import (
    CheckpointError,
    IndexMismatchError,
    IntegrityError,
    MissingShardError,
    ReadError,
    UnsupportedFormatError,
)
from weightstream.prefetch.header import TensorSpec, check_unique, parse_string_mapping, read_header

__all__ = ["Checkpoint", "Shard", "find_checkpoint", "open_checkpoint"]

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Shard:
    """One open file of a checkpoint. `identity` is (device, inode, bytes, mtime in ns) as the preflight saw it."""

    path: Path
    fd: int
    num_bytes: int
    identity: tuple[int, int, int, int]


class Checkpoint:
    """A checkpoint whose files are open and whose headers have been checked. Close it, or use it as a context.

    Attributes:
        path: the index or the single file that was opened.
        shards: its files; a tensor's `shard` is an index into this tuple.
        tensors: every tensor by name, in the order of shards and bytes.
    """

    def __init__(self, path: Path, shards: tuple[Shard, ...], tensors: dict[str, TensorSpec]) -> None:
        self.path = path
        self.shards = shards
        self.tensors = tensors
        self._closed = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(spec.num_bytes for spec in self.tensors.values())

    def check_unchanged(self) -> None:
        """Compare every shard with what the preflight saw, by descriptor and by path.

        Raises:
            IntegrityError: a file was replaced, rewritten or truncated meanwhile.
        """
        for shard in self.shards:
            try:
                found = (_identity(os.fstat(shard.fd)), _identity(os.stat(shard.path)))
            except OSError as exc:
                raise IntegrityError(
                    f"the file vanished while it was being loaded: {exc.strerror}", file=shard.path
                ) from exc
            for identity in found:
                if identity != shard.identity:
                    raise IntegrityError(
                        "the file changed while it was being loaded",
                        file=shard.path,
                        expected=f"(device, inode, bytes, mtime in ns) {shard.identity}",
                        actual=str(identity),
                        hint="Load again once nothing writes to the checkpoint",
                    )

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for shard in self.shards:
                os.close(shard.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Find the index or the single file that `path` stands for: itself, or the one in the folder that it is.

    Raises:
        CheckpointError: nothing there, nothing loadable in it, or several that are not one checkpoint.
        UnsupportedFormatError: there are weights, but not in safetensors files.
        ReadError: the operating system refused a look at it.
    """
    given = Path(path)
    try:
        is_folder = stat.S_ISDIR(os.stat(given).st_mode)
        names = sorted(os.listdir(given)) if is_folder else []
    except (FileNotFoundError, NotADirectoryError, ValueError) as exc:  # ValueError: a path with a NUL
        raise CheckpointError("no such file or folder", file=given) from exc
    except OSError as exc:
        raise ReadError(f"cannot look for it: {exc.strerror}", file=given, actual=f"errno {exc.errno}") from exc
    if not is_folder:
        if given.name.endswith((".safetensors", ".index.json")) and not given.name.endswith(".bin.index.json"):
            return given
        raise UnsupportedFormatError(
            "not a checkpoint that can be loaded",
            file=given,
            expected="a folder, *.index.json or *.safetensors",
            hint="Convert other formats to safetensors first",
        )
    if not names:
        raise CheckpointError("the folder is empty", file=given, expected=f"{_INDEX_NAME} or a .safetensors file")
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    files = [name for name in names if name.endswith(".safetensors")]
    for candidates, preferred in ((indexes, _INDEX_NAME), (files, _SINGLE_NAME)):
        if preferred in candidates or len(candidates) == 1:
            return given / (preferred if preferred in candidates else candidates[0])
        if candidates:
            raise CheckpointError(
                "the folder holds several checkpoints", file=given, actual=" ".join(candidates), hint="Name one by path"
            )
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".bin.index.json", ".gguf"))]
    if others:
        raise UnsupportedFormatError(
            "no safetensors files here", file=given, actual=" ".join(others[:5]), hint="Convert them to safetensors"
        )
    raise CheckpointError(
        "not a checkpoint", file=given, expected=f"{_INDEX_NAME} or a .safetensors file", actual=" ".join(names[:5])
    )


def open_checkpoint(path: str | os.PathLike[str], *, allow_outside_links: bool = False) -> Checkpoint:
    """Open a checkpoint: every shard, every header, and the agreement of both with the index.

    The caller owns the result and closes it. On failure nothing stays open.

    Args:
        path: a folder, an index, or one `.safetensors` file.
        allow_outside_links: accept shards that are links to outside the checkpoint's folder. A single file that is
            named by its own path may always be one.

    Raises:
        CheckpointError: not a checkpoint, or a shard that may not be opened.
        MissingShardError: a shard of the index does not exist.
        HeaderError: a header breaks the format, or a file is truncated.
        IndexMismatchError: index and headers disagree.
        IntegrityError: a file was replaced while it was being opened.
        UnsupportedFormatError: not safetensors, or an unknown dtype.
        ReadError: the operating system refused to open or read a file.
    """
    found = find_checkpoint(path)
    weight_map = _read_index(found) if found.name.endswith(".index.json") else None
    names = [found.name] if weight_map is None else list(dict.fromkeys(weight_map.values()))
    root = Path(os.path.realpath(found.parent))
    shards: list[Shard] = []
    headers: list[list[TensorSpec]] = []
    anywhere = allow_outside_links or (weight_map is None and found == Path(path))
    try:
        for number, name in enumerate(names):
            shard = _open_shard(root, name, found, allow_outside_links=anywhere)
            shards.append(shard)
            headers.append(read_header(shard.fd, shard.num_bytes, file=str(shard.path), shard=number))
        if weight_map is not None:
            _check_index(found, weight_map, dict(zip(names, headers, strict=True)))
    except BaseException:
        for shard in shards:
            os.close(shard.fd)
        raise
    tensors = {spec.name: spec for header in headers for spec in header}
    return Checkpoint(found, tuple(shards), tensors)


class _Index(msgspec.Struct, gc=False):
    weight_map: msgspec.Raw


def _read_index(path: Path) -> dict[str, str]:
    """Return the index's `weight_map`: the name of each tensor's shard."""
    try:
        fd, _ = _open_regular(path, path)
        with os.fdopen(fd, "rb") as file:
            raw = file.read()
    except OSError as exc:
        raise ReadError(f"cannot read the index: {exc.strerror}", file=path, actual=f"errno {exc.errno}") from exc
    try:
        weight_map = parse_string_mapping(msgspec.json.decode(raw, type=_Index).weight_map)
        if b"\\" in raw or raw.count(b'"weight_map"') != 1:  # a decoder keeps the last of two, and says nothing
            check_unique(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as exc:
        raise CheckpointError(
            f"the index is not valid: {exc}", file=path, expected='a JSON object with a "weight_map" of strings'
        ) from exc
    if not weight_map:
        raise CheckpointError("the index lists no tensors", file=path)
    return weight_map


def _check_index(path: Path, weight_map: dict[str, str], headers: dict[str, list[TensorSpec]]) -> None:
    """Compare the index with the tensors that each shard's header names."""
    named: dict[str, str] = {}
    for shard, header in headers.items():
        named.update(dict.fromkeys([spec.name for spec in header], shard))
    if named == weight_map and sum(map(len, headers.values())) == len(named):
        return
    missing = [f"{name} (index: {shard})" for name, shard in weight_map.items() if name not in named]
    extra = [
        f"{spec.name} (in {shard}; index: {weight_map.get(spec.name, 'not listed')})"
        for shard, header in headers.items()
        for spec in header
        if weight_map.get(spec.name) != shard
    ]
    parts: list[str] = []
    if missing:
        parts.append(f"{len(missing)} named in the index but in no header: {_some(missing)}")
    if extra:
        parts.append(f"{len(extra)} in a header that the index does not name there: {_some(extra)}")
    raise IndexMismatchError("index and headers disagree", file=path, actual="; ".join(parts))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _open_shard(root: Path, name: str, listed_in: Path, *, allow_outside_links: bool) -> Shard:
    """Open one shard for reading, after checking where it lies and what it is; never blocks on a FIFO."""
    parts = PurePosixPath(name).parts
    if not name or "\0" in name or name.startswith("/") or ".." in parts:
        raise CheckpointError(
            f"the shard's name {name!r} is not a plain relative path", file=listed_in, hint="Do not trust this index"
        )
    path = root / name
    resolved = Path(os.path.realpath(path))
    if not (allow_outside_links or resolved.is_relative_to(root) or _is_hub_blob(root, resolved)):
        raise CheckpointError(
            "the shard is a link to outside the checkpoint's folder",
            file=path,
            expected=f"a file in {root}",
            actual=resolved,
            hint="Set prefetch.allow_outside_links if you trust it",
        )
    try:
        fd, opened = _open_regular(path, resolved)
    except FileNotFoundError as exc:
        raise MissingShardError(
            "the shard does not exist", file=path, hint=f"{listed_in.name} names it: fetch it again"
        ) from exc
    return Shard(path, fd, opened.st_size, _identity(opened))


def _open_regular(path: Path, resolved: Path) -> tuple[int, os.stat_result]:
    """Open a regular file, and nothing else; `path` is its name in messages. Whether it exists is the caller's care."""
    try:
        before = os.stat(resolved)
        if not stat.S_ISREG(before.st_mode):
            raise CheckpointError("not a regular file", file=path, actual=stat.filemode(before.st_mode))
        fd = os.open(resolved, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise ReadError(f"cannot open the file: {exc.strerror}", file=path, actual=f"errno {exc.errno}") from exc
    opened = os.fstat(fd)
    if _identity(opened) != _identity(before):
        os.close(fd)
        raise IntegrityError("the file was replaced while it was being opened", file=path)
    return fd, opened


def _is_hub_blob(root: Path, resolved: Path) -> bool:
    """Tell whether `resolved` is one of the blobs of the Hugging Face cache that `root` is a snapshot of.

    The cache's layout: models--ORG--NAME/snapshots/REVISION/ holds links into models--ORG--NAME/blobs/.
    """
    return any(
        parent.name == "snapshots" and resolved.is_relative_to(parent.parent / "blobs") for parent in root.parents
    )


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
