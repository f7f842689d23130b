"""The strict reader of safetensors headers.

Owns the format's rules; opens no file. The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes with
the header's length N as a little-endian integer, N bytes of JSON, then the tensors' bytes, which the entries of the
header tile without hole or overlap.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

import msgspec

from weightstream.errors import HeaderError, ReadError, UnsupportedFormatError

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_BYTES",
    "TensorSpec",
    "check_unique",
    "parse_header",
    "parse_string_mapping",
    "read_header",
]

#: The format's own limit on the length of a header.
MAX_HEADER_BYTES = 100_000_000

#: Bits per element of every dtype that the format names (safetensors 0.8).
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

_MAX_INT = 2**63 - 1


class TensorSpec(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a checkpoint: what it is, and which bytes of which shard hold it.

    `begin` and `end` are offsets in bytes from the start of the file. There is one such object per tensor, so it is
    hidden from the garbage collector, which would otherwise scan tens of thousands of them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


_NO_SHAPE = (-1,)
_NO_OFFSETS = (-1, -1)


class _Entry(msgspec.Struct, frozen=True, gc=False):
    """An entry of a header. The defaults, which no entry can have, show that a field is missing."""

    dtype: str = ""
    shape: tuple[int, ...] = _NO_SHAPE
    data_offsets: tuple[int, int] = _NO_OFFSETS


class _StrictEntry(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Metadata(msgspec.Struct, gc=False):
    # Not `Raw | None`: in a union msgspec takes Raw for no type at all, and refuses everything but null.
    metadata: msgspec.Raw = msgspec.field(name="__metadata__", default=msgspec.Raw())


_decode_entries = msgspec.json.Decoder(dict[str, _Entry]).decode
_decode_metadata = msgspec.json.Decoder(_Metadata).decode
_decode_strict = msgspec.json.Decoder(_StrictEntry).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_strings = msgspec.json.Decoder(dict[str, str]).decode

#: What may be the number -0, which the reference reader takes for a float and refuses, and msgspec for 0. In a string it
#: means nothing, so this only leads to the slow way.
_minus_zero = re.compile(rb"[\[,\s]-0").search

#: Quotes in an ordinary member of a header: its name, three fields' names, and the dtype.
_QUOTES_PER_ENTRY = 10


def read_header(fd: int, file_bytes: int, *, file: str, shard: int) -> list[TensorSpec]:
    """Read and check the header of an open safetensors file.

    Args:
        fd: a descriptor of the file; its position is neither used nor moved.
        file_bytes: the file's length.
        file: its name, for messages.
        shard: the number that the specs carry.

    Returns:
        The tensors in the order of their bytes.

    Raises:
        HeaderError: the file breaks the format, or its length is not what the header says.
        UnsupportedFormatError: a dtype that the format does not name.
        ReadError: the operating system refused the read.
    """
    if file_bytes < 8:
        raise HeaderError("too short for a safetensors file", file=file, expected="8 bytes or more", actual=file_bytes)
    length = int.from_bytes(_pread(fd, 8, 0, file), "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            "the header is too long", file=file, expected=f"at most {MAX_HEADER_BYTES} bytes", actual=f"{length} bytes"
        )
    if length > file_bytes - 8:
        raise HeaderError(
            "the file ends inside its header",
            file=file,
            expected=f"{8 + length} bytes or more",
            actual=f"{file_bytes} bytes",
            hint="The file is truncated: fetch it again",
        )
    specs = parse_header(_pread(fd, length, 8, file), file=file, shard=shard)
    expected = specs[-1].end if specs else 8 + length
    if expected != file_bytes:
        problem = "truncated" if file_bytes < expected else "longer than its header says"
        raise HeaderError(
            f"the file is {problem}",
            file=file,
            expected=f"{expected} bytes",
            actual=f"{file_bytes} bytes",
            hint="Fetch the file again",
        )
    return specs


def parse_header(raw: bytes, *, file: str, shard: int) -> list[TensorSpec]:
    """Parse the JSON of a header and check all of its rules but the length of the file.

    Raises:
        HeaderError: a rule of the format is broken.
        UnsupportedFormatError: a dtype that the format does not name.
    """
    if raw[:1] != b"{":
        raise HeaderError("the header does not start with '{'", file=file, actual=repr(raw[:1]))
    try:
        entries = _decode_header(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as exc:
        raise HeaderError(f"the header is not valid: {exc}", file=file) from exc
    position = data_begin = 8 + len(raw)
    known: dict[tuple[str, tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}
    in_order = True
    specs: list[TensorSpec] = []
    append = specs.append
    for name, entry in entries.items():
        dtype, shape = entry.dtype, entry.shape
        begin, end = entry.data_offsets
        found = known.get((dtype, shape))
        if found is None:
            found = known[dtype, shape] = (_size_bytes(dtype, shape, file, name), shape)
        size, shape = found  # one tuple for all tensors of a shape: tuples are work for the garbage collector
        if begin < 0 or end - begin != size:
            raise HeaderError(
                f"data_offsets [{begin}, {end}] do not fit dtype {dtype} and shape {list(shape)[:8]}",
                file=file,
                tensor=name,
                expected=f"{size} bytes",
                actual=f"{end - begin} bytes",
            )
        begin += data_begin
        if begin != position:
            in_order = False
        position = begin + size
        append(TensorSpec(name, dtype, shape, shard, begin, position))
    if not in_order:  # as it is in files that the safetensors package wrote, the header's order is that of the bytes
        specs.sort(key=lambda spec: (spec.begin, spec.end))
        _check_tiling(specs, data_begin, file)
    return specs


def parse_string_mapping(raw: bytes | msgspec.Raw) -> dict[str, str]:
    """Decode a JSON object of strings whose keys must be unique.

    Raises:
        ValueError: a key is there twice.
        msgspec.DecodeError: not an object of strings.
    """
    strings = _decode_strings(raw)
    text = bytes(raw)
    if b"\\" in text or text.count(b'"') != 4 * len(strings):
        check_unique(text)
    return strings


def check_unique(raw: bytes, *, parse_int: Callable[[str], int] = int) -> None:
    """Parse JSON once more, slowly, to see that no object in it has a key twice.

    Raises:
        ValueError: one has, or this is not strict JSON.
    """
    json.loads(raw, object_pairs_hook=_refuse_doubles, parse_int=parse_int, parse_constant=_refuse_constant)


def _decode_header(raw: bytes) -> dict[str, _Entry]:
    r"""Decode the entries of a header, metadata left out.

    Fast decoders keep the last of two equal keys silently, and this one ignores unknown fields. Both show in the number
    of quotes: in text without a backslash every string has exactly two. Only where the count does not come out is the
    header parsed again, slowly and strictly.
    """
    try:
        entries = _decode_entries(raw)
        metadata = bytes(_decode_metadata(raw).metadata)
    except msgspec.ValidationError:  # metadata may have members that are named like fields
        return _decode_slowly(raw)
    quotes = 0
    if metadata:
        parse_string_mapping(metadata)
        entries.pop("__metadata__", None)
        quotes = 2 + metadata.count(b'"')
    if (
        b"\\" in raw
        or raw.count(b'"') != quotes + _QUOTES_PER_ENTRY * len(entries)
        or (
            b"-0" in raw and _minus_zero(raw)  # the plain search is much faster than the pattern
        )
    ):
        return _decode_slowly(raw)
    if any(
        not entry.dtype or entry.shape is _NO_SHAPE or entry.data_offsets is _NO_OFFSETS for entry in entries.values()
    ):
        return _decode_slowly(raw)
    return entries


def _decode_slowly(raw: bytes) -> dict[str, _Entry]:
    check_unique(raw, parse_int=_parse_int)
    fields = _decode_fields(raw)
    metadata = fields.pop("__metadata__", None)
    if metadata is not None:
        _decode_strings(metadata)
    strict = {name: _decode_strict(field) for name, field in fields.items()}
    return {name: _Entry(entry.dtype, entry.shape, entry.data_offsets) for name, entry in strict.items()}


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} is there twice")
            seen.add(key)
    return result


def _parse_int(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 is not a whole number")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _size_bytes(dtype: str, shape: tuple[int, ...], file: str, name: str) -> int:
    """Return a tensor's size, refusing shapes that overflow 63 bits at any step (as the reference reader does)."""
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise UnsupportedFormatError(
            "unknown dtype", file=file, tensor=name, expected=" ".join(DTYPE_BITS), actual=dtype
        )
    total = 1
    for n in shape:
        total *= n
        if n < 0 or total > _MAX_INT:
            raise HeaderError("the shape is negative or overflows", file=file, tensor=name, actual=str(shape[:8]))
    if total * bits > _MAX_INT or total * bits % 8:
        raise HeaderError(
            "the tensor does not fill whole bytes, or too many of them",
            file=file,
            tensor=name,
            actual=f"{total} elements of {bits} bits",
        )
    return total * bits // 8


def _check_tiling(specs: list[TensorSpec], data_begin: int, file: str) -> None:
    position = data_begin
    for spec in specs:
        if spec.begin != position:
            problem = "a hole in" if spec.begin > position else "an overlap in"
            raise HeaderError(
                f"there is {problem} the file before this tensor",
                file=file,
                tensor=spec.name,
                expected=f"offset {position - data_begin}",
                actual=f"offset {spec.begin - data_begin}",
            )
        position = spec.end


def _pread(fd: int, count: int, offset: int, file: str) -> bytes:
    parts: list[bytes] = []
    while count:
        try:
            part = os.pread(fd, count, offset)
        except OSError as exc:
            raise ReadError(f"cannot read the header: {exc.strerror}", file=file, actual=f"errno {exc.errno}") from exc
        if not part:
            raise ReadError("the file ended while its header was being read", file=file, expected=f"{count} more bytes")
        parts.append(part)
        count -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
