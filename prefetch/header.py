"""The strict reader of safetensors headers.

Owns the format's rules; opens no file. The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes with
the header's length N as a little-endian integer, N bytes of JSON, then the tensors' bytes, which the entries of the
header tile without hole or overlap.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import msgspec

from weightstream.errors import HeaderError, ReadError, UnsupportedFormatError

__all__ = ["DTYPE_BITS", "MAX_HEADER_BYTES", "TensorSpec", "parse_header", "read_header", "unique_mapping"]

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


class _Entry(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_entry = msgspec.json.Decoder(_Entry).decode
_decode_strings = msgspec.json.Decoder(dict[str, str]).decode


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

    50,000 entries take about 60 ms (two cores, 2026-11). Fast decoders keep the last of two equal keys silently; see
    `unique_mapping` for how that is noticed at full speed.

    Raises:
        HeaderError: a rule of the format is broken.
        UnsupportedFormatError: a dtype that the format does not name.
    """
    data_begin = 8 + len(raw)
    if raw[:1] != b"{":
        raise HeaderError("the header does not start with '{'", file=file, actual=repr(raw[:1]))
    try:
        fields = unique_mapping(raw, quotes_per_value=8)
        metadata = fields.pop("__metadata__", None)
        if metadata is not None:
            _decode_strings(metadata)
        specs: list[TensorSpec] = []
        append = specs.append
        bits_of = DTYPE_BITS
        for name, value in fields.items():
            entry = _decode_entry(value)
            begin, end = entry.data_offsets
            bits = bits_of.get(entry.dtype)
            if bits is None:
                raise UnsupportedFormatError(
                    "unknown dtype", file=file, tensor=name, expected=" ".join(DTYPE_BITS), actual=entry.dtype
                )
            size_bits = _num_elements(entry.shape, file, name) * bits
            if begin < 0 or size_bits != 8 * (end - begin):
                raise HeaderError(
                    f"data_offsets [{begin}, {end}] do not fit dtype {entry.dtype} and shape {list(entry.shape)}",
                    file=file,
                    tensor=name,
                    expected=f"{size_bits / 8:g} bytes",
                    actual=f"{end - begin} bytes",
                )
            append(TensorSpec(name, entry.dtype, entry.shape, shard, data_begin + begin, data_begin + end))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as exc:
        raise HeaderError(f"the header is not valid: {exc}", file=file) from exc
    specs.sort(key=lambda spec: (spec.begin, spec.end))
    _check_tiling(specs, data_begin, file)
    return specs


def unique_mapping(raw: bytes | msgspec.Raw, *, quotes_per_value: int) -> dict[str, msgspec.Raw]:
    r"""Decode one JSON object whose keys must be unique, values left raw.

    Text without a backslash has exactly two quotes per string. If every value has a known number of quotes, then the
    quotes of the whole text tell how many keys there were before the decoder dropped doubles; only where that count
    does not come out is the object parsed a second time, slowly and surely.

    Args:
        raw: the JSON text.
        quotes_per_value: how many quotes an ordinary value has (8: an entry of a header; 2: a string).

    Raises:
        ValueError: a key is there twice, at any depth.
        msgspec.DecodeError: not a JSON object.
    """
    fields = _decode_fields(raw)
    text = bytes(raw)
    odd = fields.get("__metadata__")
    odd_quotes = 0 if odd is None else bytes(odd).count(b'"') - quotes_per_value
    expected = (2 + quotes_per_value) * len(fields) + odd_quotes
    if b"\\" in text or text.count(b'"') != expected or (odd is not None and not _is_unique(odd)):
        json.loads(text, object_pairs_hook=_refuse_doubles, parse_constant=_refuse_constant)
    return fields


def _is_unique(metadata: msgspec.Raw) -> bool:
    text = bytes(metadata)
    return b"\\" not in text and text.count(b'"') == 4 * len(_decode_strings(metadata))


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {double!r} is there twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _num_elements(shape: tuple[int, ...], file: str, name: str) -> int:
    """Multiply a shape, refusing what does not fit 63 bits at any step (as the reference reader does)."""
    if not shape:
        return 1
    if len(shape) <= 8 and min(shape) > 0 and (product := math.prod(shape)) <= _MAX_INT:
        return product  # the common case: no partial product can be larger than the whole
    total = 1
    for n in shape:
        total *= n
        if n < 0 or total > _MAX_INT:
            raise HeaderError("the shape is negative or overflows", file=file, tensor=name, actual=str(shape[:8]))
    return total


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
