"""A program: parses one header, index or file of torch.save that is made to cost much, in a fresh process, and prints what it took.

    python -m tests.fuzz.adversarial CASE BYTES

What is printed is JSON: seconds of the processor, peak memory above what the input itself takes, and the outcome.
"""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from weightstream.errors import WeightstreamError
from weightstream.prefetch.header import parse_header
from weightstream.prefetch.index import parse_index
from weightstream.prefetch.torchfile import read_torch_file


def _repeated(before: bytes, unit: bytes, after: bytes) -> Callable[[int], bytes]:
    return lambda size: before + unit * ((size - len(before) - len(after)) // len(unit)) + after


def _numbered(
    before: bytes, member: Callable[[int], bytes], after: bytes, *, most: int = sys.maxsize
) -> Callable[[int], bytes]:
    """So many members that they fill the size, or `most` and then spaces."""

    def make(size: int) -> bytes:
        parts, length = [before], len(before) + len(after)
        while length < size - 200 and len(parts) <= most:
            parts.append(member(len(parts)) + b",")
            length += len(parts[-1])
        return (b"".join(parts).removesuffix(b",") + after).ljust(size - 1)

    return make


def _scalar(name: bytes) -> Callable[[int], bytes]:
    return lambda i: b'"%s%x":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}' % (name, i, i - 1, i)


def _empty(shape: bytes) -> Callable[[int], bytes]:
    return lambda i: b'"%x":{"dtype":"U8","shape":[%s],"data_offsets":[0,0]}' % (i, shape.replace(b"N", b"%d" % i))


ONE = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]'
HOLE = b',"z":{"dtype":"U8","shape":[],"data_offsets":[99999998,99999999]}}'

#: Just below the limits, where the members are many.
HEADERS: dict[str, Callable[[int], bytes]] = {
    "tensors": _numbered(b"{", _scalar(b""), b"}", most=499_000),
    "tensors with escapes": _numbered(b"{", _scalar(b"\\u0061"), b"}", most=499_000),
    "tensors called -0": _numbered(b"{", _scalar(b" -0"), b"}", most=499_000),
    "tensors and a hole": _numbered(b"{", _scalar(b""), HOLE, most=499_000),
    "tensors of many shapes": _numbered(b"{", _empty(b"0,N"), b"}", most=499_000),
    "tensors of many long shapes": _numbered(b"{", _empty(b"0" + b",1" * 30 + b",N"), b"}", most=499_000),
    "tensors of many long shapes of large numbers": _numbered(b"{", _empty(b"0" + b",300" * 30 + b",N"), b"}", most=499_000),
    "entries without fields": _numbered(b"{", lambda i: b'"%x":{}' % i, b"}", most=2_490_000),
    "metadata": _numbered(b'{"__metadata__":{', lambda i: b'"%x":"%x"' % (i, i), b"}}", most=1_240_000),
    "metadata with escapes": _numbered(b'{"__metadata__":{', lambda i: b'"\\u0061%x":""' % i, b"}}", most=1_240_000),
    "metadata with a field's name": _numbered(b'{"__metadata__":{"shape":"",', lambda i: b'"%x":""' % i, b"}}", most=1_240_000),
    "too many strings": _repeated(b'{"__metadata__":{"":""', b',"":""', b"}}"),
    "name": _repeated(b'{"', b"a", b'":{"dtype":"U8","shape":[],"data_offsets":[0,2]}}'),
    "name of escapes": _repeated(b'{"', b"\\u00e4", b'":{"dtype":"U8","shape":[],"data_offsets":[0,2]}}'),
    "name with an emoji": _repeated(b'{"\xf0\x9f\x98\x80', b"a", b'":{"dtype":"U8","shape":[],"data_offsets":[0,2]}}'),
    "name of backslashes": _repeated(b'{"', b"\\\\", b'":{"dtype":"U8","shape":[],"data_offsets":[0,2]}}'),
    "name of quotes": _repeated(b'{"', b'\\"', b'":{"dtype":"U8","shape":[],"data_offsets":[0,2]}}'),
    "name of -0": _repeated(b'{"', b" -0", b'":{"dtype":"U8","shape":[],"data_offsets":[0,2]}}'),
    "dtype": _repeated(b'{"a":{"dtype":"', b"a", b'","shape":[],"data_offsets":[0,2]}}'),
    "unknown field": _repeated(ONE + b',"', b"a", b'":1}}'),
    "unknown field of lists": _repeated(ONE + b',"x":[0', b",[]", b"]}}"),
    "shape": _repeated(b'{"a":{"dtype":"U8","shape":[0', b",0", b'],"data_offsets":[0,0]}}'),
    "shape of large numbers": _repeated(b'{"a":{"dtype":"U8","shape":[0', b",300", b'],"data_offsets":[0,0]}}'),
    "shape of huge numbers": _repeated(b'{"a":{"dtype":"U8","shape":[0', b"," + b"9" * 4300, b'],"data_offsets":[0,0]}}'),
    "digits": _repeated(b'{"a":{"dtype":"U8","shape":[', b"9", b'],"data_offsets":[0,0]}}'),
    "decimals": _repeated(b'{"a":{"dtype":"U8","shape":[0.', b"9", b'],"data_offsets":[0,0]}}'),
    "arrays in arrays": _repeated(b'{"a":{"x":', b"[", b""),
    "objects in objects": _repeated(b"", b'{"":', b""),
    "spaces": _repeated(ONE, b" ", b"}}"),
    "not UTF-8 at the end": _repeated(b'{"', b"a", b'\xff":{"dtype":"U8","shape":[],"data_offsets":[0,2]}}'),
}  # fmt: skip

INDEXES: dict[str, Callable[[int], bytes]] = {
    "tensors": _numbered(b'{"weight_map":{', lambda i: b'"%x":"x"' % i, b"}}", most=1_240_000),
    "tensors with escapes": _numbered(b'{"weight_map":{', lambda i: b'"\\u0061%x":"x"' % i, b"}}", most=1_240_000),
    "tensors of many shards": _numbered(b'{"weight_map":{', lambda i: b'"%x":"%x"' % (i, i), b"}}", most=1_240_000),
    "members": _numbered(b'{"weight_map":{"a":"x"},', lambda i: b'"%x":0' % i, b"}", most=2_490_000),
    "member twice": _numbered(b'{"weight_map":{"a":"x"},"y":[],"y":[],', lambda i: b'"%x":0' % i, b"}", most=2_490_000),
    "too many strings": _repeated(b'{"weight_map":{"":""', b',"":""', b"}}"),
    "number that is skipped": _repeated(b'{"weight_map":{"a":"x"},"y":', b"9", b"}"),
    "lists that are skipped": _repeated(b'{"weight_map":{"a":"x"},"y":[0', b",[]", b"]}"),
    "emoji that is skipped": _repeated(b'{"weight_map":{"a":"x"},"y":"\xf0\x9f\x98\x80', b"a", b'"}'),
    "name of backslashes": _repeated(b'{"weight_map":{"', b"\\\\", b'":1}}'),
    "arrays in arrays": _repeated(b'{"weight_map":', b"[", b""),
}

STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tQ"
SHAPE, TENSOR, CALLED = (
    b"(" + b"K\1" * 32 + b"tq\1",
    b"ctorch._utils\n_rebuild_tensor_v2\nq\2",
    b"h\2(h\0K\0h\1h\1\x89NtR",
)

#: Pickles behind the two bytes that begin them, up to the instruction that ends them.
PICKLES: dict[str, Callable[[int], bytes]] = {
    "marks": _repeated(b"", b"(", b""),
    "lists": _repeated(b"", b"]", b""),
    "dicts": _repeated(b"", b"}", b""),
    "tuples in tuples": _repeated(b"N", b"\x85", b""),
    "list in itself": _repeated(b"]q\0", b"h\0a", b""),
    "memo": _repeated(b"N", b"r\0\0\1\0", b""),
    "strings": _repeated(b"(", b"U\1a", b"t"),
    "floats": _repeated(b"(", b"G" + b"?" * 8, b"t"),
    "long numbers": _repeated(b"(", b"\x8a\xff" + b"?" * 255, b"t"),
    "string with an emoji": lambda size: b"X" + struct.pack("<i", size - 9) + b"\xf0\x9f\x98\x80" + b"a" * (size - 13),
    "one key of a dict again and again": _repeated(b"}(", b"U\1aN", b"u"),
    "calls": _repeated(b"ctorch\ndevice\nq\0", b"h\0)R", b"t"),
    "tensors of many dimensions": _repeated(b"}(" + STORAGE + b"q\0" + SHAPE + TENSOR, b"U\1a" + CALLED, b"u"),
    "tensors whose shape is a long tuple": lambda size: _repeated(
        b"}(" + STORAGE + b"q\0(" + b"K\1" * (size // 4) + b"tq\1" + TENSOR, b"U\1a" + CALLED, b"u"
    )(size),
}


def archive(pickled: bytes, records: dict[str, bytes], *, folder: str = "a") -> bytes:
    """A file of torch.save as it is written today, around any pickle, with any further records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, raw in {"data.pkl": pickled, "version": b"3", "data/0": bytes(16), **records}.items():
            file.writestr(f"{folder}/{name}", raw)
    return buffer.getvalue()


def _in_archive(make: Callable[[int], bytes]) -> Callable[[int], bytes]:
    return lambda size: archive(b"\x80\2" + make(size) + b".", {})


def _in_old_file(make: Callable[[int], bytes]) -> Callable[[int], bytes]:
    before = b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\2M\xe9\3.\x80\2}U\x0dlittle_endian\x88s."
    return lambda size: before + b"\x80\2" + make(size) + b".\x80\2]."


TORCH_FILES: dict[str, Callable[[int], bytes]] = {
    **{f"pickle of {name}": _in_archive(make) for name, make in PICKLES.items()},
    **{f"old file, pickle of {name}": _in_old_file(make) for name, make in PICKLES.items()},
    "records": lambda size: archive(b"\x80\2}.", {f"data/{i:x}": b"" for i in range(1, size // 100)}),
    "records that are looked at": lambda size: archive(b"\x80\2}.", {f"{i:x}": b"" for i in range(1, size // 100)}),
    "records with long names": lambda size: archive(b"\x80\2}.", {}, folder="a" * min(size // 8, 60_000)),
}  # fmt: skip


def _read_torch_file(raw: bytes) -> None:
    fd = os.memfd_create("input")
    try:
        os.write(fd, raw)
        read_torch_file(fd, len(raw), file="input", shard=0)
    finally:
        os.close(fd)


CASES: dict[str, tuple[Callable[[int], bytes], Callable[[bytes], object]]] = {
    **{
        f"header: {name}": (make, lambda raw: parse_header(raw, file="input", shard=0))
        for name, make in HEADERS.items()
    },
    **{f"index: {name}": (make, lambda raw: parse_index(raw, file="input")) for name, make in INDEXES.items()},
    **{f"torch: {name}": (make, _read_torch_file) for name, make in TORCH_FILES.items()},
}


def parse(case: str, raw: bytes) -> str:
    """Parse, and return the class of the error, or `accepted`."""
    try:
        CASES[case][1](raw)
    except WeightstreamError as error:
        str(error)
        return type(error).__name__
    return "accepted"


def _memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    case, size = sys.argv[1], int(sys.argv[2])
    raw = CASES[case][0](size)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start = _memory_bytes("VmRSS"), time.process_time()
    outcome = parse(case, raw)
    cpu_s = time.process_time() - start
    print(json.dumps({"cpu_s": cpu_s, "peak_bytes": _memory_bytes("VmHWM") - before, "outcome": outcome}))  # noqa: T201


if __name__ == "__main__":
    main()
