"""The strict reader of safetensors headers.

Owns the format's rules; opens no file. The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes with
the header's length N as a little-endian integer, N bytes of JSON, then the tensors' bytes, which the entries of the
header tile without hole or overlap.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import msgspec

from weightstream.errors import HeaderError, UnsupportedFormatError
from weightstream.interpreter import no_garbage_collection
from weightstream.prefetch.opening import read_exactly

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_BYTES",
    "MAX_RANK",
    "MAX_STRINGS",
    "TensorSpec",
    "count_strings",
    "one_line",
    "parse_header",
    "parse_string_mapping",
    "read_header",
    "refuse_doubles",
]

#: The format's own limit on the length of a header.
MAX_HEADER_BYTES = 100_000_000

#: Our own limits, far above what real checkpoints have; they bound the time and memory that a hostile header can take.
#: A tensor takes 5 strings of a header, and 2 of an index.
MAX_STRINGS = 2_500_000
#: As many dimensions as NumPy 1 has.
MAX_RANK = 32

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

    `begin` and `end` are offsets in bytes from the start of the file. `stride` is how many elements lie from one index
    to the next in each dimension, or None where the elements lie in order without gaps, as they do in safetensors.
    There is one such object per tensor, so it is hidden from the garbage collector, which would otherwise scan tens of
    thousands of them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    begin: int
    end: int
    stride: tuple[int, ...] | None = None

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


class _Offsets(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """A pair of integers. Tuples would have the garbage collector run again and again while a header is decoded."""

    begin: int
    end: int


_NO_SHAPE = (-1,)
_NO_OFFSETS = _Offsets(-1, -1)
_Shape = Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_RANK)]


class _Entry(msgspec.Struct, frozen=True, gc=False):
    """An entry of a header, or its metadata, whose members are strings and may be named like fields.

    The defaults, which no entry can have, show that a field is missing.
    """

    dtype: str = ""
    shape: _Shape | str = _NO_SHAPE
    data_offsets: _Offsets | str = _NO_OFFSETS


class _StrictEntry(msgspec.Struct, gc=False, forbid_unknown_fields=True):
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

#: The number -0, which the reference reader takes for a float and refuses, and msgspec for 0. Where none of these bytes
#: is, there is none; where one is, it may be in a string, and a pattern that knows strings (and never goes back) decides.
_AROUND_MINUS_ZERO = [before + b"-0" for before in (b"[", b",", b" ", b"\n", b"\t", b"\r")]
_find_minus_zero = re.compile(rb'(?:[^"-]++|"(?:[^"\\]++|\\.)*+"|-(?!0))*+-0', re.DOTALL).match

#: The metadata as it is in nearly every file: first, strings alone, and no backslash in them. Only for what is known to
#: be JSON. To have the decoder find it takes a third of the time that all entries take.
_match_metadata = re.compile(rb'\{\s*"__metadata__"\s*:\s*(\{(?:[^{}"\\]++|"[^"\\]*+")*+\})').match

#: Strings of an entry: its name, three fields' names, and the dtype.
_STRINGS_PER_ENTRY = 5

#: What is wrong is looked for with care, which takes long, in headers up to this length; in longer ones it is only said.
_EXPLAINED_BYTES = 2**17


def read_header(
    fd: int, file_bytes: int, *, file: str, shard: int, on_bytes: Callable[[bytes], None] | None = None
) -> list[TensorSpec]:
    """Read and check the header of an open safetensors file.

    Args:
        fd: a descriptor of the file; its position is neither used nor moved.
        file_bytes: the file's length.
        file: its name, for messages.
        shard: the number that the specs carry.
        on_bytes: told the bytes that were read, from the file's first one on, before they are parsed.

    Returns:
        The tensors in the order of their bytes.

    Raises:
        HeaderError: the file breaks the format, or its length is not what the header says.
        UnsupportedFormatError: a dtype that the format does not name.
        ReadError: the operating system refused the read.
    """
    if file_bytes < 8:
        raise HeaderError("too short for a safetensors file", file=file, expected="8 bytes or more", actual=file_bytes)
    prefix = read_exactly(fd, 8, 0, file)
    length = int.from_bytes(prefix, "little")
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
    raw = read_exactly(fd, length, 8, file)
    if on_bytes is not None:
        on_bytes(prefix)
        on_bytes(raw)
    with no_garbage_collection():
        specs = parse_header(raw, file=file, shard=shard)
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
        raise HeaderError(f"the header is not valid: {one_line(exc)}", file=file) from exc
    position = data_begin = 8 + len(raw)
    known: dict[tuple[str, tuple[int, ...] | str], tuple[int, tuple[int, ...]]] = {}
    in_order = True
    specs: list[TensorSpec] = []
    append = specs.append
    for name, entry in entries.items():
        dtype, offsets = entry.dtype, entry.data_offsets
        found = known.get((dtype, entry.shape))
        if found is None:
            found = known[dtype, entry.shape] = _size_and_shape(entry, file, name)
        size, shape = found  # one tuple for all tensors of a shape: tuples are work for the garbage collector
        if isinstance(offsets, str) or offsets.begin < 0 or offsets.end - offsets.begin != size:
            _refuse_offsets(entry, size, file, name)
        begin = data_begin + offsets.begin
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
    if count_strings(text) != 2 * len(strings):
        refuse_doubles(text)
    return strings


def one_line(error: Exception) -> str:
    """Return the message of a decoder's error, which may quote what it found, as one short line."""
    return " ".join(str(error)[:500].split())


def count_strings(raw: bytes) -> int:
    r"""Count the strings in valid JSON, keys included: each has two quotes that no backslash stands before.

    Decoders keep the last of two equal keys silently. This count, compared with that of what was decoded, shows it.
    """
    if b"\\" in raw:  # a run of backslashes is read in pairs from its start, as `replace` does
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    return raw.count(b'"') // 2


def refuse_doubles(raw: bytes) -> NoReturn:
    """Say which key JSON has twice, given that it has one.

    Raises:
        ValueError: always. In long texts the key is not looked for, and not named.
    """
    if len(raw) <= _EXPLAINED_BYTES:
        json.loads(raw, object_pairs_hook=_refuse_doubles)
    raise ValueError("a key is there twice")


def _decode_header(raw: bytes) -> dict[str, _Entry]:
    """Decode the entries of a header, metadata left out.

    Keys that are there twice, and unknown fields, which the decoder ignores both, show in the number of strings.
    Fields that are missing, which could make up for them, show later in what stands for them.
    """
    num_strings = count_strings(raw)
    if num_strings > MAX_STRINGS:
        raise ValueError(
            f"more than {MAX_STRINGS // _STRINGS_PER_ENTRY} tensors, or as many strings as they would have"
        )
    entries = _decode_entries(raw)
    if "__metadata__" in entries:
        found = _match_metadata(raw)
        num_strings -= 1 + 2 * len(parse_string_mapping(found[1] if found else _decode_metadata(raw).metadata))
        del entries["__metadata__"]
    if num_strings != _STRINGS_PER_ENTRY * len(entries):
        _refuse_members(raw)
    if b"-0" in raw and any(text in raw for text in _AROUND_MINUS_ZERO) and _find_minus_zero(raw):
        raise ValueError("-0 is not a whole number")
    return entries


def _refuse_members(raw: bytes) -> NoReturn:
    """Say which key is there twice, which field is missing or unknown, given that there is one."""
    if len(raw) <= _EXPLAINED_BYTES:
        json.loads(raw, object_pairs_hook=_refuse_doubles)
        for name, field in _decode_fields(raw).items():
            if name != "__metadata__":
                _decode_strict(field)
    raise ValueError("a key is there twice, or an entry has other fields than dtype, shape and data_offsets")


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} is there twice")
            seen.add(key)
    return result


def _size_and_shape(entry: _Entry, file: str, name: str) -> tuple[int, tuple[int, ...]]:
    """Return a tensor's size, refusing shapes that overflow 63 bits at any step (as the reference reader does)."""
    dtype, shape = entry.dtype, entry.shape
    if shape is _NO_SHAPE or isinstance(shape, str):
        raise HeaderError("the entry has no list of integers as its shape", file=file, tensor=name)
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise UnsupportedFormatError(
            "unknown dtype", file=file, tensor=name, expected=" ".join(DTYPE_BITS), actual=dtype
        )
    total = math.prod(shape[: shape.index(0)] if 0 in shape else shape)  # once it is zero, it stays so
    if total > _MAX_INT or (shape and not 0 <= min(shape) <= max(shape) <= _MAX_INT):
        raise HeaderError("the shape is negative or overflows", file=file, tensor=name, actual=str(shape[:8]))
    num_bits = 0 if 0 in shape else total * bits
    if num_bits > _MAX_INT or num_bits % 8:
        raise HeaderError(
            "the tensor does not fill whole bytes, or too many of them",
            file=file,
            tensor=name,
            actual=f"{total} elements of {bits} bits",
        )
    return num_bits // 8, shape


def _refuse_offsets(entry: _Entry, size: int, file: str, name: str) -> NoReturn:
    offsets = entry.data_offsets
    if offsets is _NO_OFFSETS or isinstance(offsets, str):
        raise HeaderError("the entry has no pair of integers as its data_offsets", file=file, tensor=name)
    raise HeaderError(
        f"data_offsets {[offsets.begin, offsets.end]} do not fit dtype {entry.dtype} and shape {list(entry.shape)[:8]}",
        file=file,
        tensor=name,
        expected=f"{size} bytes",
        actual=f"{offsets.end - offsets.begin} bytes",
    )


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
