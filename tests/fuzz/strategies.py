"""Strategies: valid files, indexes and configurations, and the same with something changed, as bytes or as JSON."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from tests.builders import entry, raw_file
from weightstream.prefetch.header import DTYPE_BITS

names = st.one_of(
    st.sampled_from(
        ["a", "b", 'a"', "a\\", "dtype", "shape", "data_offsets", "__metadata__", "ä", "", "😀", "\0", ", -0"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
)


def _escaped(text: str) -> str:
    units = text.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def written(texts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Strings as JSON: plainly, with the usual escapes, or with nothing but escapes."""
    ways: list[Callable[[str], str]] = [
        lambda text: json.dumps(text, ensure_ascii=False),
        json.dumps,
        lambda text: f'"{_escaped(text)}"',
    ]
    return st.tuples(texts, st.sampled_from(ways)).map(lambda drawn: drawn[1](drawn[0]))


class Raw(str):
    """JSON that is put in as it is: what `json.dumps` would not write."""

    __slots__ = ()


def dump(value: object, key: Any = json.dumps) -> str:
    """JSON of objects that are lists of pairs, so that a key can be there twice."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, tuple):
        return (
            "{"
            + ",".join(f"{name if isinstance(name, Raw) else key(name)}:{dump(of, key)}" for name, of in value)
            + "}"
        )
    if isinstance(value, list):
        return "[" + ",".join(dump(part, key) for part in value) + "]"
    return json.dumps(value)


@st.composite
def headers(draw: st.DrawFn) -> tuple[list[tuple[Any, Any]], int]:
    """The members of a valid header, in any order, and the length of the tensors' bytes, which they tile."""
    members: list[tuple[Any, Any]] = []
    position = 0
    for name in draw(st.lists(names.filter(lambda name: name != "__metadata__"), unique=True, max_size=5)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        bits = DTYPE_BITS[dtype] * math.prod(shape)
        if bits % 8:
            shape, bits = [*shape, 4], bits * 4
        value = tuple(draw(st.permutations(list(entry(dtype, shape, position, position + bits // 8).items()))))
        members.append((Raw(draw(written(st.just(name)))), value))
        position += bits // 8
    if draw(st.booleans()):
        members.append(("__metadata__", draw(st.dictionaries(names, names, max_size=2))))
    return draw(st.permutations(members)), position


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A valid file, with or without metadata, spaces and escapes."""
    members, length = draw(headers())
    header = dump(tuple(members)) + " " * draw(st.integers(0, 9))
    return raw_file(header, draw(st.binary(min_size=length, max_size=length)))


#: What is put in place of a value, a key or a member somewhere in valid JSON.
odd_values: st.SearchStrategy[object] = st.one_of(
    st.sampled_from(
        [None, True, 0, 1, -1, 1.0, [], {}, "", "F32", "U8", [0], [0, 8], [1] * 33, {"U8": None}, {"x": [{}]}]
    ),
    st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63)]),
    st.sampled_from(
        [
            "-0",
            "01",
            "1e5",
            "1E400",
            "1" + "0" * 5000,
            "NaN",
            "-Infinity",
            "1.",
            '"\\ud800"',
            '"\\q"',
            "[" * 200 + "]" * 200,
        ]
    ).map(Raw),
    names,
)


def _places(value: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    found = [path]
    if isinstance(value, list):
        for number, part in enumerate(value):
            found += _places(part, (*path, number))
    return found


def _as_lists(value: Any) -> Any:
    """Objects as lists of [key, value], so that every part has a place of its own and may be changed."""
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, tuple):
        return ["{", *[[name, _as_lists(of)] for name, of in value]]
    return ["[", *[_as_lists(part) for part in value]] if isinstance(value, list) else value


def _as_json(value: Any) -> str:
    if isinstance(value, list) and value and value[0] == "{":
        pairs = [pair for pair in value[1:] if isinstance(pair, list) and len(pair) == 2]
        return dump(tuple((_key(name), Raw(_as_json(of))) for name, of in pairs))
    if isinstance(value, list):
        return "[" + ",".join(_as_json(part) for part in value[1:]) + "]"
    return dump(value)


def _key(name: Any) -> str:
    return name if isinstance(name, str) else Raw('"' + "".join(c for c in dump(name) if c not in '"\\') + '"')


@st.composite
def changed_json(draw: st.DrawFn, value: object) -> str:
    """JSON with one to three of its parts replaced, doubled or taken out."""
    tree = [_as_lists(value)]
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in _places(tree) if place and place != (0,) and place[-1:] != (0,)] or [(0,)]
        *above, last = draw(st.sampled_from(places))
        holder: Any = tree
        for number in above:
            holder = holder[number]
        how = draw(st.sampled_from(["replace", "double", "remove"]))
        if how == "replace" or not above:
            holder[last] = _as_lists(draw(odd_values))
        elif how == "double":
            holder.insert(draw(st.integers(1, len(holder))), holder[last])
        else:
            del holder[last]
    return _as_json(tree[0])


@st.composite
def files_with_changed_headers(draw: st.DrawFn) -> bytes:
    members, length = draw(headers())
    return raw_file(draw(changed_json(tuple(members))), bytes(length))


TOKENS = [
    *rb"""" { } [ ] , : - 0 9 . e \ \u0061""".split(),
    b" ",
    b"\xff",
    b"\xc3\xa4",
    b"\0",
    b"\n- ",
    b"&a ",
    b"*a",
    b"<<",
    b"!!int ",
]


@st.composite
def changed_bytes(draw: st.DrawFn, raw: bytes, tokens: Sequence[bytes] = TOKENS) -> bytes:
    """Bytes with one to three places changed, cut out, doubled, or replaced by what means something."""
    result = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(result)))
        until = at + draw(st.integers(0, 3))
        result[at:until] = draw(st.one_of(st.sampled_from(tokens), st.binary(max_size=3)))
    return bytes(result)


def with_right_length(file: bytes) -> bytes:
    """Say in the first 8 bytes where the header's last brace is, so that what is behind them gets looked at."""
    return max(0, file.rfind(b"}") - 7).to_bytes(8, "little") + file[8:]


@st.composite
def files_with_changed_bytes(draw: st.DrawFn) -> bytes:
    raw = draw(changed_bytes(draw(files())))
    return with_right_length(raw) if draw(st.booleans()) else raw


shard_names = st.one_of(
    st.sampled_from(
        ["x", "y", "./x", "sub/z", "../x", "/etc/passwd", "sub/../x", "link", "out", "fifo", "sub", ".", "x/", ""]
    ),
    names,
)


@st.composite
def indexes(draw: st.DrawFn) -> bytes:
    """An index, valid or with something changed as JSON or as bytes."""
    index = {"weight_map": draw(st.dictionaries(names, shard_names, min_size=1, max_size=4))}
    if draw(st.booleans()):
        index = {"metadata": {"total_size": 1}, **index}  # type: ignore[dict-item]  # of another type
    how = draw(st.sampled_from(["valid", "JSON", "bytes"]))
    if how == "JSON":
        return draw(changed_json(index)).encode()
    raw = draw(st.sampled_from([json.dumps(index), json.dumps(index, ensure_ascii=False)])).encode()
    return draw(changed_bytes(raw)) if how == "bytes" else raw


#: Keys of the configuration, each with values that are right and values that are wrong.
SETTINGS: dict[str, list[str]] = {
    "checkpoint": ["models/a", "/a", "pkg://yaml/.", "pkg://yaml/x", "pkg://", "''", "2024-01-01", "null"],
    "model": ["transformers", "a.b:c", "'a:'", "a:b:c", "1:20", "null"],
    "strategy": ["auto", "stream", "direct", "[auto]"],
    "prefetch": ["{chunk: 1MiB}", "{workers: auto, retries: 1}", "{io: direct}", "{chunk: .inf}", "{chunk: -1}", "&a {chunk: 2MiB}",
                 "{<<: {retries: 1}, retries: 2}", "{allow_outside_links: yes}", "[]", "null", "{retries: 0x10}"],
    "scheduler": ["{order: file}", "{timeout_s: 1.5}", "{timeout_s: .nan}", "{timeout_s: 1_000}", "*a", "{}"],
    "device": ["{target: cpu}", "{strict: off, dtype: float16}", "{target: 'cuda:1'}", "{target: 1:1}", "!!map {}"],
    "unknown": ["1", "&b [*b]", "!!set {a}", '!!float ""', "!!binary aGk="],
}  # fmt: skip


@st.composite
def configurations(draw: st.DrawFn) -> bytes:
    """A YAML file, valid or with something changed."""
    lines = [
        f"{draw(st.sampled_from(['', '', '', '? ']))}{key}: {draw(st.sampled_from(SETTINGS[key]))}"
        for key in draw(st.lists(st.sampled_from(sorted(SETTINGS)), max_size=4))
    ]
    raw = draw(st.sampled_from(["\n", "\r\n", "\n# x\n"])).join(lines).encode()
    return draw(changed_bytes(raw)) if draw(st.booleans()) else raw


#: What is saved of a tensor of three by four.
VIEWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda tensor: tensor,
    lambda tensor: tensor.clone().t(),
    lambda tensor: tensor[1:],
    lambda tensor: tensor[:, 1],
    lambda tensor: tensor[:0],
    lambda tensor: tensor[2, 3],
    lambda tensor: tensor.expand(2, 3, 4),
    lambda tensor: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
]
SAVED_DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
#: Of which torch cannot read again what it writes in the older layout.
ZIPPED_DTYPES = [*SAVED_DTYPES, torch.uint16, torch.float8_e4m3fn]

#: Instructions of pickle, numbers, and names that torch's pickles have.
PICKLE_TOKENS = [
    *rb"""" . ( ) N Q R b c s u t a e ] } q\0 h\0 h\1""".split(),
    *[b"K\0", b"K\1", b"K\xff", b"J\xff\xff\xff\xff", b"M\0\1", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89"],
    *[b"\x8a\x08" + number.to_bytes(8, "little") for number in (2**31, 2**62, 2**63)],
    *[b"X\1\0\0\0a", b"X\1\0\0\x000", b"X\3\0\0\0cpu", b"U\1a", b"G\0\0\0\0\0\0\0\0"],
    *[
        b"c" + name + b"\n"
        for name in (
            b"torch\nFloatStorage",
            b"torch\nBoolStorage",
            b"torch.storage\nUntypedStorage",
            b"torch._utils\n_rebuild_tensor_v2",
            b"torch._utils\n_rebuild_tensor_v3",
            b"torch._utils\n_rebuild_parameter",
            b"torch._tensor\n_rebuild_from_type_v2",
            b"torch\nfloat8_e4m3fn",
            b"torch\nTensor",
            b"torch\nSize",
            b"collections\nOrderedDict",
            b"__builtin__\nset",
            b"__builtin__\ncomplex",
            b"__builtin__\nbytearray",
            b"os\nsystem",
        )
    ],
]


@st.composite
def torch_files(draw: st.DrawFn, *, zipped: bool | None = None) -> bytes:
    """A file as torch saves it, in one of its two layouts: tensors, some of which share bytes, and other things."""
    zipped = draw(st.booleans()) if zipped is None else zipped
    dtypes = draw(st.lists(st.sampled_from(ZIPPED_DTYPES if zipped else SAVED_DTYPES), min_size=1, max_size=2))
    wholes = [torch.arange(12).reshape(3, 4).to(dtype) for dtype in dtypes]
    state: dict[str, object] = OrderedDict() if draw(st.booleans()) else {}
    for name in draw(st.lists(names, unique=True, min_size=1, max_size=4)):
        state[name] = draw(st.sampled_from(VIEWS))(draw(st.sampled_from(wholes)))
    if draw(st.booleans()):
        others = [None, 3, 2**70, 1.5, "x", [1], (2, 3), {"a": 1}, torch.Size([2]), {1, "x"}, 1j, bytearray(b"x")]
        state["other"] = draw(st.sampled_from(others))
    if draw(st.booleans()):
        state = {draw(st.sampled_from(["state_dict", "model"])): state, "epoch": 3}
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@st.composite
def torch_files_with_changed_bytes(draw: st.DrawFn) -> bytes:
    return draw(changed_bytes(draw(torch_files()), PICKLE_TOKENS))


@st.composite
def torch_files_with_changed_pickles(draw: st.DrawFn) -> bytes:
    """An archive around a pickle that is not the one that torch wrote: checksums and lengths are right."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(draw(torch_files(zipped=True)))) as old,
        zipfile.ZipFile(buffer, "w") as new,
    ):
        for name in old.namelist():
            raw = old.read(name)
            new.writestr(name, draw(changed_bytes(raw, PICKLE_TOKENS)) if name.endswith("data.pkl") else raw)
    return buffer.getvalue()
