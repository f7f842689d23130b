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
from weightstream.prefetch.header import (
    MAX_HEADER_BYTES,
    MAX_STRINGS,
    TensorSpec,
    count_strings,
    one_line,
    parse_string_mapping,
    read_header,
    refuse_doubles,
)

__all__ = ["MAX_INDEX_BYTES", "Checkpoint", "Shard", "find_checkpoint", "open_checkpoint", "parse_index"]

#: Our own limit on the length of an index, which the format does not have.
MAX_INDEX_BYTES = MAX_HEADER_BYTES

#: The kernel's limit on a path (PATH_MAX). Longer names are refused before anything splits or resolves them.
_MAX_NAME_BYTES = 4096

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
    def file_system(self) -> int:
        """The number of the file system that the first shard is on."""
        return self.shards[0].identity[0] if self.shards else 0

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
        CheckpointError: not a checkpoint, an index that is not valid, or a file that may not be opened.
        MissingShardError: a shard of the index does not exist.
        HeaderError: a header breaks the format, or a file is truncated.
        IndexMismatchError: index and headers disagree.
        IntegrityError: a file was replaced while it was being opened.
        UnsupportedFormatError: not safetensors, or an unknown dtype.
        ReadError: the operating system refused to open or read a file.
    """
    found = find_checkpoint(path)
    root = Path(os.path.realpath(found.parent))
    named = found == Path(path)
    weight_map: dict[str, str] | None = None
    if found.name.endswith(".index.json"):
        weight_map = _read_index(found, _resolve(root, found, allow_outside_links=allow_outside_links or named))
    names = [found.name] if weight_map is None else list(dict.fromkeys(weight_map.values()))
    anywhere = allow_outside_links or (weight_map is None and named)
    shards: list[Shard] = []
    headers: list[list[TensorSpec]] = []
    files: dict[tuple[int, ...], str] = {}
    try:
        for number, name in enumerate(names):
            shard = _open_shard(root, name, found, allow_outside_links=anywhere)
            shards.append(shard)
            _check_new(shard, name, files)
            headers.append(read_header(shard.fd, shard.num_bytes, file=str(shard.path), shard=number))
        tensors = {spec.name: spec for header in headers for spec in header}
        if weight_map is not None:
            _check_index(found, weight_map, tensors, dict(zip(names, headers, strict=True)))
    except BaseException:
        for shard in shards:
            os.close(shard.fd)
        raise
    return Checkpoint(found, tuple(shards), tensors)


_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _read_index(path: Path, resolved: Path) -> dict[str, str]:
    """Return the index's `weight_map`: the name of each tensor's shard."""
    try:
        fd, opened = _open_regular(path, resolved)
        with os.fdopen(fd, "rb") as file:
            if opened.st_size > MAX_INDEX_BYTES:
                raise CheckpointError(
                    "the index is too long",
                    file=path,
                    expected=f"at most {MAX_INDEX_BYTES} bytes",
                    actual=f"{opened.st_size} bytes",
                )
            raw = file.read(opened.st_size)
    except OSError as exc:
        raise ReadError(f"cannot read the index: {exc.strerror}", file=path, actual=f"errno {exc.errno}") from exc
    return parse_index(raw, file=str(path))


def parse_index(raw: bytes, *, file: str) -> dict[str, str]:
    """Parse the JSON of an index; members beside the `weight_map` must be JSON, and are not looked at.

    Returns:
        The name of each tensor's shard, as it is written.

    Raises:
        CheckpointError: not an index: not JSON in UTF-8, a key twice, no map of strings, or more than the limits allow.
    """
    try:
        weight_map = _decode_index(raw)
    except (msgspec.DecodeError, RecursionError, ValueError) as exc:
        raise CheckpointError(
            f"the index is not valid: {one_line(exc)}",
            file=file,
            expected='a JSON object with a "weight_map" of strings',
        ) from exc
    if not weight_map:
        raise CheckpointError("the index lists no tensors", file=file)
    return weight_map


def _decode_index(raw: bytes) -> dict[str, str]:
    num_strings = count_strings(raw)
    if num_strings > MAX_STRINGS:
        raise ValueError(f"more than {MAX_STRINGS} strings")
    raw.decode()  # the decoder does not look into what it skips
    members = _decode_members(raw)
    if num_strings != len(members) + sum(count_strings(bytes(member)) for member in members.values()):
        refuse_doubles(raw)  # the decoder has kept the last of two and dropped the other with its strings
    if "weight_map" not in members:
        raise ValueError("there is no `weight_map`")
    return parse_string_mapping(members["weight_map"])


def _check_index(
    path: Path, weight_map: dict[str, str], tensors: dict[str, TensorSpec], headers: dict[str, list[TensorSpec]]
) -> None:
    """Compare the index with the tensors that each shard's header names."""
    expected = [shard for shard, header in headers.items() for _ in header]
    if len(weight_map) == len(tensors) == len(expected) and list(map(weight_map.get, tensors)) == expected:
        return
    missing = [name for name in weight_map if name not in tensors]
    strangers = [
        (spec.name, shard) for shard, header in headers.items() for spec in header if weight_map.get(spec.name) != shard
    ]
    parts: list[str] = []
    if missing:
        some = _some([f"{name} (index: {weight_map[name]})" for name in missing[:5]], len(missing))
        parts.append(f"{len(missing)} named in the index but in no header: {some}")
    if strangers:
        some = _some(
            [f"{name} (in {shard}; index: {weight_map.get(name, 'not listed')})" for name, shard in strangers[:5]],
            len(strangers),
        )
        parts.append(f"{len(strangers)} in a header that the index does not name there: {some}")
    raise IndexMismatchError("index and headers disagree", file=path, actual="; ".join(parts))


def _some(first: list[str], total: int) -> str:
    more = total - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _open_shard(root: Path, name: str, listed_in: Path, *, allow_outside_links: bool) -> Shard:
    """Open one shard for reading, after checking where it lies and what it is; never blocks on a FIFO."""
    if (
        not name
        or "\0" in name
        or name.startswith("/")
        or len(os.fsencode(name)) > _MAX_NAME_BYTES
        or ".." in PurePosixPath(name).parts
    ):
        raise CheckpointError(
            f"the shard's name {name[:100]!r} is not a plain relative path",
            file=listed_in,
            hint="Do not trust this index",
        )
    path = root / name
    resolved = _resolve(root, path, allow_outside_links=allow_outside_links)
    try:
        fd, opened = _open_regular(path, resolved)
    except FileNotFoundError as exc:
        raise MissingShardError(
            "the shard does not exist", file=path, hint=f"{listed_in.name} names it: fetch it again"
        ) from exc
    return Shard(path, fd, opened.st_size, _identity(opened))


def _check_new(shard: Shard, name: str, files: dict[tuple[int, ...], str]) -> None:
    """Refuse a second name for a file: an index with many of them would have its header read again and again."""
    other = files.setdefault(shard.identity, name)
    if other != name:
        raise CheckpointError("the index has two names for one file", file=shard.path, actual=f"also {other}")


def _resolve(root: Path, path: Path, *, allow_outside_links: bool) -> Path:
    """Follow links, which must end in the checkpoint's own folder `root` or in the blobs that it is a snapshot of."""
    try:
        resolved = Path(os.path.realpath(path))
    except RecursionError as exc:
        raise CheckpointError("too many links that lead to each other", file=path) from exc
    if allow_outside_links or resolved.is_relative_to(root) or _is_hub_blob(root, resolved):
        return resolved
    raise CheckpointError(
        "this is a link to outside the checkpoint's folder",
        file=path,
        expected=f"a file in {root}",
        actual=resolved,
        hint="Set prefetch.allow_outside_links if you trust it",
    )


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
