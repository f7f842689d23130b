"""Checkpoints: from a path to open, checked shards and the list of their tensors.

Owns the shards' descriptors while a load runs. Changes nothing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

from weightstream.errors import CheckpointError, IntegrityError, ReadError
from weightstream.prefetch.attempts import ONCE, Attempts, refused
from weightstream.prefetch.extras import ExtraState
from weightstream.prefetch.finding import find_checkpoint, refuse_rivals
from weightstream.prefetch.hashing import FileHash
from weightstream.prefetch.header import TensorSpec, read_header
from weightstream.prefetch.index import check_index, read_index
from weightstream.prefetch.opening import Shard, files_hint, identity_of, is_out_of_files, open_shard, resolve
from weightstream.prefetch.torchfile import Contents, read_torch_file
from weightstream.prefetch.versions import Versions, merge_versions

__all__ = ["Checkpoint", "open_checkpoint"]

#: Files with these endings are those of `torch.save`; all others are safetensors.
_TORCH_SUFFIXES = frozenset({".bin", ".pt", ".pth"})


class Checkpoint:
    """A checkpoint whose files are open and whose headers have been checked. Close it, or use it as a context.

    Attributes:
        path: the index or the single file that was opened.
        shards: its files; a tensor's `shard` is an index into this tuple.
        tensors: every tensor by name, in the order of shards and bytes.
        notes: what was left alone or left out, one sentence each.
        hashes: for each shard, a hash that has seen its header, or nothing of a file of `torch.save`; empty unless the
            checkpoint was opened to be verified.
        index: what the index was (see `identity_of`) before it was read; None if there is none.
        extras: what files of `torch.save` hold for single modules besides tensors, by name.
        versions: and what they say of modules, by their names.
    """

    def __init__(
        self,
        path: Path,
        shards: tuple[Shard, ...],
        tensors: dict[str, TensorSpec],
        notes: tuple[str, ...] = (),
        hashes: tuple[FileHash, ...] = (),
        index: tuple[int, int, int, int] | None = None,
        extras: Mapping[str, ExtraState] | None = None,
        versions: Versions | None = None,
    ) -> None:
        self.path = path
        self.shards = shards
        self.tensors = tensors
        self.notes = notes
        self.hashes = hashes
        self.index = index
        self.extras: Mapping[str, ExtraState] = extras or {}
        self.versions: Versions = versions or {}
        self._closed = False

    @property
    def folder(self) -> Path:
        """Where its shards lie, without links."""
        return Path(os.path.realpath(self.path.parent))

    @property
    def file_system(self) -> int:
        """The number of the file system that the first shard is on."""
        return self.shards[0].identity[0] if self.shards else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(spec.num_bytes for spec in self.tensors.values())

    def check_unchanged(self) -> None:
        """Compare every shard with what the preflight saw, by descriptor and by path, and the index by path.

        Raises:
            IntegrityError: a file was replaced, rewritten or truncated meanwhile.
        """
        if self.index is not None:
            _check_same(self.path, self.index, self.path)
        for shard in self.shards:
            _check_same(shard.path, shard.identity, shard.fd, shard.path)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with ExitStack() as stack:  # all of them, also if one makes trouble
                for shard in self.shards:
                    stack.callback(os.close, shard.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    allow_outside_links: bool = False,
    hashes: bool = False,
    attempts: Attempts = ONCE,
) -> Checkpoint:
    """Open a checkpoint: every shard, every header, and the agreement of both with the index.

    The caller owns the result and closes it. On failure nothing stays open.

    Args:
        path: see `find_checkpoint`.
        variant: see `find_checkpoint`.
        allow_outside_links: accept shards that are links to outside the checkpoint's folder. A single file that is
            named by its own path may always be one.
        hashes: begin to hash every shard. What is hashed of the header of a safetensors file are the very bytes that
            are parsed.
        attempts: says how often a file is opened and read again after an error that may pass.

    Raises:
        CheckpointError: not a checkpoint, several, an index that is not valid, or a file that may not be opened.
        MissingShardError: a shard of the index does not exist.
        HeaderError: a header breaks the format, or a file is truncated.
        IndexMismatchError: index and headers disagree.
        IntegrityError: a file was replaced while it was being opened.
        UnsupportedFormatError: another format, or an unknown dtype.
        ReadError: the operating system refused to open or read a file.
    """
    found = attempts.call(lambda: find_checkpoint(path, variant=variant), path)
    listed_in = found.path
    root = Path(os.path.realpath(listed_in.parent))
    weight_map: dict[str, str] | None = None
    seen: tuple[int, int, int, int] | None = None
    if listed_in.name.endswith(".json"):
        index = resolve(root, listed_in, allow_outside_links=allow_outside_links or found.named)
        weight_map, seen = attempts.call(lambda: _read_index(listed_in, index), listed_in)
    names = [listed_in.name] if weight_map is None else list(dict.fromkeys(weight_map.values()))
    rivals = [name for name in found.rivals if name not in names]
    if rivals:
        refuse_rivals(listed_in.parent, [listed_in.name, *rivals])
    anywhere = allow_outside_links or (weight_map is None and found.named)
    shards: list[Shard] = []
    headers: list[Contents] = []
    begun: list[FileHash] = []
    extras: dict[str, ExtraState] = {}
    notes = list(found.notes)
    files: dict[tuple[int, ...], str] = {}
    try:
        for number, name in enumerate(names):
            opens = functools.partial(open_shard, root, name, listed_in, allow_outside_links=anywhere)
            opened = functools.partial(_open, opens, name, number, files, hashes=hashes)
            shard, header, hashed = attempts.call(opened, root / name)
            shards.append(shard)
            headers.append(header)
            notes += header.notes
            extras |= header.extras
            begun += [] if hashed is None else [hashed]
        tensors = {spec.name: spec for header in headers for spec in header.specs}
        if weight_map is not None:
            for name in extras:  # an index need not list what is no tensor
                weight_map.pop(name, None)
            check_index(
                listed_in,
                weight_map,
                tensors,
                {name: header.specs for name, header in zip(names, headers, strict=True)},
            )
    except BaseException as error:
        for shard in shards:
            os.close(shard.fd)
        if isinstance(error, ReadError) and is_out_of_files(error.__cause__):
            error.hint = files_hint(len(names))
        raise
    versions = merge_versions([(chain((spec.name for spec in one.specs), one.extras), one.versions) for one in headers])
    return Checkpoint(listed_in, tuple(shards), tensors, tuple(notes), tuple(begun), seen, extras, versions)


def _open(
    opens: Callable[[], Shard], name: str, number: int, files: dict[tuple[int, ...], str], *, hashes: bool
) -> tuple[Shard, Contents, FileHash | None]:
    """Open one shard, read its header, and begin its hash, if there is to be one.

    `files`: the identities of those that are open, with their names.
    """
    shard = opens()
    try:
        _check_new(shard, name, files)
        hashed = FileHash() if hashes else None
        header = _read_tensors(shard, number, hashed)
    except BaseException:
        os.close(shard.fd)
        raise
    return shard, header, hashed


def _read_tensors(shard: Shard, number: int, begun: FileHash | None) -> Contents:
    """Return a shard's tensors, and what else is in it: in safetensors, nothing."""
    file = str(shard.path)
    if shard.path.suffix not in _TORCH_SUFFIXES:
        on_bytes = None if begun is None else begun.update
        specs = read_header(shard.fd, shard.num_bytes, file=file, shard=number, on_bytes=on_bytes)
        return Contents(specs, [], {}, {})
    # What says where the tensors are stands behind them, so all of the file is hashed when they are read.
    return read_torch_file(shard.fd, shard.num_bytes, file=file, shard=number)


def _read_index(path: Path, resolved: Path) -> tuple[dict[str, str], tuple[int, int, int, int]]:
    """Return the map of an index, and what the file was before that was read."""
    try:
        identity = identity_of(os.stat(resolved))
    except OSError as exc:
        raise refused("look at the index", exc, file=path) from exc
    return read_index(path, resolved), identity


def _check_same(file: Path, expected: tuple[int, int, int, int], *ways: int | Path) -> None:
    """Look at a file in several ways, each of which must find what it was."""
    for way in ways:
        try:
            actual = identity_of(os.stat(way))
        except OSError as exc:
            raise IntegrityError(f"the file vanished while it was being loaded: {exc.strerror}", file=file) from exc
        if actual != expected:
            raise IntegrityError(
                "the file changed while it was being loaded",
                file=file,
                expected=f"(device, inode, bytes, mtime in ns) {expected}",
                actual=str(actual),
                hint="Load again once nothing writes to the checkpoint",
            )


def _check_new(shard: Shard, name: str, files: dict[tuple[int, ...], str]) -> None:
    """Refuse a second name for a file: an index with many of them would have its header read again and again."""
    other = files.setdefault(shard.identity, name)
    if other != name:
        raise CheckpointError("the index has two names for one file", file=shard.path, actual=f"also {other}")
