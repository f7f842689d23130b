"""The index of a checkpoint: which shard each tensor is in. Checked as strictly as the headers are."""

from __future__ import annotations

from pathlib import Path

import msgspec

from weightstream.errors import CheckpointError, IndexMismatchError, some
from weightstream.prefetch.header import (
    MAX_HEADER_BYTES,
    MAX_STRINGS,
    TensorSpec,
    count_strings,
    one_line,
    refuse_doubles,
)
from weightstream.prefetch.opening import read_whole

__all__ = ["MAX_INDEX_BYTES", "check_index", "parse_index", "read_index"]

#: Our own limit on the length of an index, which the format does not have.
MAX_INDEX_BYTES = MAX_HEADER_BYTES

_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_strings = msgspec.json.Decoder(dict[str, str]).decode


def read_index(path: Path, resolved: Path) -> dict[str, str]:
    """Return the index's `weight_map`: the name of each tensor's shard."""
    raw = read_whole(path, resolved, what="index", most_bytes=MAX_INDEX_BYTES)
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
    if "weight_map" not in members:
        raise ValueError("there is no `weight_map`")
    weight_map = _decode_strings(members.pop("weight_map"))
    expected = 1 + 2 * len(weight_map) + len(members) + sum(count_strings(bytes(other)) for other in members.values())
    if num_strings != expected:
        refuse_doubles(raw)  # the decoder has kept the last of two and dropped the other with its strings
    return weight_map


def check_index(
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
        names = some((f"{name} (index: {weight_map[name]})" for name in missing[:5]), total=len(missing))
        parts.append(f"{len(missing)} named in the index but in no header: {names}")
    if strangers:
        names = some(
            (f"{name} (in {shard}; index: {weight_map.get(name, 'not listed')})" for name, shard in strangers[:5]),
            total=len(strangers),
        )
        parts.append(f"{len(strangers)} in a header that the index does not name there: {names}")
    raise IndexMismatchError("index and headers disagree", file=path, actual="; ".join(parts))
