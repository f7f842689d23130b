"""The strict header reader: each rule of the format, and its agreement with the safetensors package."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.builders import entry, raw_file
from tests.fuzz.oracle import theirs
from weightstream.errors import HeaderError, ReadError, UnsupportedFormatError
from weightstream.prefetch.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    MAX_RANK,
    MAX_STRINGS,
    TensorSpec,
    count_strings,
    parse_header,
    parse_string_mapping,
    read_header,
    refuse_doubles,
)

Write = Callable[[bytes], Path]

#: An ordinary entry, as text, for headers that json.dumps would not write.
F32 = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.fixture(name="write")
def fixture_write(tmp_path: Path) -> Write:
    def write(raw: bytes) -> Path:
        path = tmp_path / "a.safetensors"
        path.write_bytes(raw)
        return path

    return write


def read(path: Path) -> list[TensorSpec]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd, os.fstat(fd).st_size, file=str(path), shard=0)
    finally:
        os.close(fd)


def parse(text: str | bytes) -> list[TensorSpec]:
    return parse_header(text.encode() if isinstance(text, str) else text, file="a.safetensors", shard=0)


# What is accepted


def test_specs_say_where_each_tensor_lies_in_the_file(write: Write) -> None:
    header = {"b": entry("BF16", [2, 3], 8, 20), "a": entry("F32", [2], 0, 8)}
    raw = raw_file(header, bytes(20))
    start = len(raw) - 20
    assert read(write(raw)) == [
        TensorSpec("a", "F32", (2,), 0, start, start + 8),
        TensorSpec("b", "BF16", (2, 3), 0, start + 8, start + 20),
    ]


def test_specs_carry_the_number_of_their_shard() -> None:
    specs = parse_header(f'{{"a":{F32}}}'.encode(), file="a.safetensors", shard=7)
    assert [(spec.shard, spec.num_bytes) for spec in specs] == [(7, 8)]


def test_position_of_the_descriptor_is_neither_used_nor_moved(write: Write) -> None:
    path = write(raw_file(f'{{"a":{F32}}}', bytes(8)))
    with path.open("rb", buffering=0) as file:
        file.seek(5)
        assert read_header(file.fileno(), path.stat().st_size, file="a", shard=0)
        assert file.tell() == 5


@pytest.mark.parametrize(
    ("header", "names"),
    [
        pytest.param("{}", [], id="no tensors"),
        pytest.param(f'{{"a":{F32}}}  \n\t ', ["a"], id="trailing spaces"),
        pytest.param(f'{{ "a" :\n{F32}}}', ["a"], id="spaces inside"),
        pytest.param(f'{{"":{F32}}}', [""], id="empty name"),
        pytest.param(f'{{"a\\"b":{F32}}}', ['a"b'], id="quote in a name"),
        pytest.param(f'{{"a\\\\":{F32}}}', ["a\\"], id="backslash in a name"),
        pytest.param(f'{{"\\u0061":{F32}}}', ["a"], id="escaped name"),
        pytest.param(f'{{"größe":{F32}}}', ["größe"], id="not ASCII"),
        pytest.param(f'{{"data_offsets":{F32}}}', ["data_offsets"], id="name like a field"),
        pytest.param(f'{{"x, -0":{F32}}}', ["x, -0"], id="minus zero in a name"),
        pytest.param(f'{{"__metadata__":{{}},"a":{F32}}}', ["a"], id="empty metadata"),
        pytest.param(f'{{"__metadata__":{{"format":"pt"}},"a":{F32}}}', ["a"], id="metadata"),
        pytest.param(f'{{"a":{F32},"__metadata__":{{"a":"\\"\\u0061"}}}}', ["a"], id="metadata last and escaped"),
        pytest.param(f'{{"\\u005f_metadata__":{{"a":"b"}},"a":{F32}}}', ["a"], id="metadata by an escaped name"),
        pytest.param(
            f'{{"\\u005f_metadata__":{{"a":"b","c":"d"}},"a":{F32}}}', ["a"], id="metadata with an entry's quotes"
        ),
        pytest.param(f'{{"__metadata__":{{"dtype":"F32"}},"a":{F32}}}', ["a"], id="metadata with a field's name"),
        pytest.param(
            f'{{"__metadata__":{{"dtype":"","shape":"","data_offsets":""}},"a":{F32}}}',
            ["a"],
            id="metadata with all fields' names",
        ),
        pytest.param('{"a":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}', ["a"], id="fields in another order"),
        pytest.param('{"a":{"dtype":"\\u00463\\u0032","shape":[2],"data_offsets":[0,8]}}', ["a"], id="escaped dtype"),
        pytest.param('{"a":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}', ["a"], id="scalar"),
        pytest.param('{"a":{"dtype":"F64","shape":[0,9],"data_offsets":[0,0]}}', ["a"], id="no elements"),
        pytest.param(
            '{"a":{"dtype":"F64","shape":[0,9223372036854775807],"data_offsets":[0,0]}}', ["a"], id="huge, but empty"
        ),
        pytest.param(
            f'{{"z":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"a":{F32},'
            '"y":{"dtype":"U8","shape":[0],"data_offsets":[8,8]}}',
            ["z", "a", "y"],
            id="empty ones at both ends",
        ),
    ],
)
def test_valid_header_is_accepted(header: str, names: list[str]) -> None:
    assert [spec.name for spec in parse(header)] == names


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_format_has_the_size_that_the_reference_gives_it(dtype: str) -> None:
    size = 8 * DTYPE_BITS[dtype] // 8
    header = json.dumps({"a": entry(dtype, [8], 0, size)})
    assert [spec.num_bytes for spec in parse(header)] == [size]
    assert theirs(raw_file(header, bytes(size))) == [("a", dtype, (8,), bytes(size))]
    with pytest.raises(HeaderError, match="do not fit dtype"):
        parse(json.dumps({"a": entry(dtype, [8], 0, size + 1)}))


@pytest.fixture(name="no_slow_way")
def fixture_no_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where JSON is parsed once more, which takes many times as long."""

    def refuse(*args: object, **keywords: object) -> None:
        pytest.fail("parsed a second time")

    monkeypatch.setattr(json, "loads", refuse)


@pytest.mark.usefixtures("no_slow_way")
@pytest.mark.parametrize(
    "header",
    [
        pytest.param(f'{{"a":{F32}}}', id="without metadata"),
        pytest.param(f'{{"__metadata__":{{"format":"pt"}},"a":{F32}}}', id="metadata first"),
        pytest.param(f'{{"a":{F32},"__metadata__":{{"format":"pt","x":""}}}}', id="metadata last"),
        pytest.param(f'{{"__metadata__":{{}},"model-0.w":{F32}}} ', id="empty metadata"),
    ],
)
def test_ordinary_header_is_parsed_once(header: str) -> None:
    assert len(parse(header)) == 1


@pytest.mark.usefixtures("no_slow_way")
def test_header_of_fifty_thousand_entries_is_parsed_once() -> None:
    header = {f"layers.{i}.weight": entry("BF16", [i % 5, 2], 0, 0) for i in range(50_000)}
    position = 0
    for i, value in enumerate(header.values()):
        value["data_offsets"] = [position, position := position + i % 5 * 4]
    specs = parse(json.dumps({"__metadata__": {"format": "pt"}, **header}))
    assert len(specs) == 50_000
    assert sum(spec.num_bytes for spec in specs) == position


# What is refused


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(b"", "too short for a safetensors file: expected 8 bytes or more, found 0", id="empty"),
        pytest.param(bytes(7), "too short .* found 7", id="seven bytes"),
        pytest.param(bytes(8), "does not start with '{'", id="eight bytes, no header"),
        pytest.param((1).to_bytes(8, "little"), "ends inside its header.*9 bytes or more, found 8", id="eight bytes"),
        pytest.param(raw_file("{}", length=3), "ends inside its header", id="length past the end"),
        pytest.param(
            raw_file("{}", length=MAX_HEADER_BYTES + 1), f"too long.*at most {MAX_HEADER_BYTES} bytes", id="too long"
        ),
        pytest.param(b"\xff" * 16, "too long", id="length of 64 set bits"),
        pytest.param(raw_file(f'{{"a":{F32}}}', bytes(7)), r"truncated: expected 70 bytes, found 69 bytes", id="short"),
        pytest.param(raw_file(f'{{"a":{F32}}}', bytes(9)), r"longer than its header says", id="long"),
        pytest.param(raw_file("{}", b"x"), "longer than its header says: expected 10 bytes", id="data of no tensor"),
        pytest.param(raw_file("{} "[:2], length=1), "not valid", id="length that cuts the JSON"),
    ],
)
def test_file_of_a_wrong_length_is_refused(write: Write, raw: bytes, message: str) -> None:
    path = write(raw)
    with pytest.raises(HeaderError, match=message) as caught:
        read(path)
    assert caught.value.file == str(path)


DEEP = 100_000


@pytest.mark.parametrize(
    ("header", "message"),
    [
        pytest.param(b"", "does not start", id="nothing"),
        pytest.param(f' {{"a":{F32}}}', "does not start", id="space first"),
        pytest.param(f'\ufeff{{"a":{F32}}}', "does not start", id="byte order mark"),
        pytest.param("[]", "does not start", id="array"),
        pytest.param("{", "not valid", id="cut"),
        pytest.param(f'{{"a":{F32},}}', "not valid", id="comma at the end"),
        pytest.param(f'{{"a":{F32}}}\0', "trailing", id="NUL behind it"),
        pytest.param(f'{{"a":{F32}}}{{}}', "trailing", id="two objects"),
        pytest.param(f"{{'a':{F32}}}", "not valid", id="other quotes"),
        pytest.param(f'{{"a\n":{F32}}}', "not valid", id="line break in a name"),
        pytest.param(b'{"a\xff":' + F32.encode() + b"}", "utf-8", id="not UTF-8"),
        pytest.param(b'{"\xed\xa0\x80":' + F32.encode() + b"}", "utf-8", id="surrogate in UTF-8"),
        pytest.param(b'{"__metadata__":{"a":"\xff"},"a":' + F32.encode() + b"}", "utf-8", id="metadata not UTF-8"),
        pytest.param(f'{{"a":{F32}}}'.encode("utf-16-le"), "not valid", id="UTF-16"),
        pytest.param(f'{{"\\ud800":{F32}}}', "surrogate", id="half a surrogate pair"),
        pytest.param('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "not valid", id="NaN"),
        pytest.param('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}', "not valid", id="infinity"),
        pytest.param('{"a":' + "[" * DEEP + "]" * DEEP + "}", "got `array`", id="deep arrays"),
        pytest.param('{"a":{"x":' + "[" * DEEP + "]" * DEEP + "}}", "recursion", id="deep arrays in an unknown field"),
        pytest.param('{"a":' * DEEP + "1" + "}" * DEEP, "recursion|Expected", id="deep objects"),
        pytest.param('{"a":null}', "Expected `object`, got `null`", id="null for an entry"),
        pytest.param('{"a":["F32",[2],[0,8]]}', "Expected `object`, got `array`", id="array for an entry"),
        pytest.param('{"a":{}}', "missing required field `dtype`", id="entry without fields"),
        pytest.param('{"a":{"dtype":"F32","shape":[2]}}', "missing required field `data_offsets`", id="no offsets"),
        pytest.param('{"a":{"dtype":null,"shape":[2],"data_offsets":[0,8]}}', "Expected `str`", id="null for a dtype"),
        pytest.param('{"a":{"dtype":"F32","shape":null,"data_offsets":[0,8]}}', "array`, got `null`", id="null shape"),
        pytest.param(
            '{"a":{"dtype":"F32","shape":2,"data_offsets":[0,8]}}', "array`, got `int`", id="number for a shape"
        ),
        pytest.param(
            '{"a":{"dtype":"F32","shape":"2","data_offsets":[0,8]}}',
            "no list|Expected `array`",
            id="string for a shape",
        ),
        pytest.param(
            '{"a":{"dtype":"F32","shape":[2],"data_offsets":"08"}}', "no pair|Expected `array`", id="string for offsets"
        ),
        pytest.param(
            '{"a":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}}', "Expected `int`", id="string in a shape"
        ),
        pytest.param(
            '{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', "Expected `int`", id="float in a shape"
        ),
        pytest.param('{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', "Expected `int`", id="exponent"),
        pytest.param('{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}', "Expected `int`", id="true"),
        pytest.param('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}}', "length 2", id="one offset"),
        pytest.param('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}', "length 2", id="three offsets"),
        pytest.param('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', "-0", id="minus zero"),
        pytest.param('{"a":{"dtype":"F32","shape":[ -0],"data_offsets":[0,0]}}', "-0", id="minus zero in a shape"),
        pytest.param(
            '{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}', "out of range", id="5,000 digits"
        ),
        pytest.param(
            '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":' + "9" * 5000 + "}}",
            "digits",
            id="5,000 digits in an unknown field",
        ),
    ],
)
def test_header_that_is_not_the_json_of_the_format_is_refused(header: str | bytes, message: str) -> None:
    with pytest.raises(HeaderError, match=message) as caught:
        parse(header)
    assert caught.value.file == "a.safetensors"


@pytest.mark.parametrize(
    "header",
    [
        pytest.param('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}', id="one more"),
        pytest.param('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"":1}}', id="without a name"),
        pytest.param('{"a":{"Dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', id="other capitals"),
        pytest.param('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":{"y":NaN}}}', id="with nonsense in it"),
        pytest.param(f'{{"a":{F32},"b":{{"x":1}}}}', id="instead of all fields"),
    ],
)
def test_unknown_field_is_refused(header: str) -> None:
    with pytest.raises(HeaderError, match=r"unknown field|malformed"):
        parse(header)


@pytest.mark.parametrize(
    "metadata",
    ["null", "[]", '"pt"', "1", '{"a":1}', '{"a":null}', '{"a":{"b":"c"}}', '{"a":["b"]}'],
)
def test_metadata_that_is_not_an_object_of_strings_is_refused(metadata: str) -> None:
    with pytest.raises(HeaderError, match=r"Expected `(object|str)`"):
        parse(f'{{"__metadata__":{metadata},"a":{F32}}}')


ONE_FIELD_TWICE = '{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("header", "key"),
    [
        pytest.param(f'{{"a":{F32},"a":{F32}}}', "a", id="name"),
        pytest.param(f'{{"a":{F32},"\\u0061":{F32}}}', "a", id="name, once escaped"),
        pytest.param(f'{{"a\\"b":{F32},"a\\u0022b":{F32}}}', 'a"b', id="name with a quote"),
        pytest.param(f'{{"data_offsets":{F32},"data_offsets":{F32}}}', "data_offsets", id="name like a field"),
        pytest.param(f'{{"a":{ONE_FIELD_TWICE}}}', "shape", id="field"),
        pytest.param(
            '{"a":{"dtype":"F32","shape":[2],"sh\\u0061pe":[2],"data_offsets":[0,8]}}',
            "shape",
            id="field, once escaped",
        ),
        pytest.param('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "dtype", id="dtype"),
        pytest.param(
            '{"a":{"dtype":null,"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "dtype", id="first one null"
        ),
        pytest.param(f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{F32}}}', "x", id="in metadata"),
        pytest.param(f'{{"__metadata__":{{"x":"1","\\u0078":"2"}},"a":{F32}}}', "x", id="in metadata, once escaped"),
        pytest.param(
            f'{{"__metadata__":{{"x":"1"}},"__metadata__":{{"x":"1"}},"a":{F32}}}', "__metadata__", id="metadata"
        ),
        pytest.param(
            f'{{"__metadata__":{{}},"a":{F32},"_\\u005fmetadata__":{{}}}}', "__metadata__", id="metadata, once escaped"
        ),
        # Refused for the one reason or the other: quotes that are missing must not make up for those that are too many.
        pytest.param(f'{{"a":{ONE_FIELD_TWICE},"b":{{"dtype":"U8","shape":[0]}}}}', "shape", id="and a field missing"),
        pytest.param(f'{{"a":{F32},"a":{F32},"b":{{}}}}', "a", id="and an entry empty"),
        pytest.param(f'{{"a":{F32},"a":{F32},"b":null}}', "a", id="and an entry null"),
    ],
)
def test_key_that_is_there_twice_is_refused(header: str, key: str) -> None:
    with pytest.raises(HeaderError, match=r"twice|has no pair|Expected") as caught:
        parse(header)
    if "twice" in str(caught.value):
        assert repr(key) in str(caught.value)


@pytest.mark.parametrize(
    "padding", [pytest.param("", id="short, so named"), pytest.param(" " * 2**20, id="long, so not named")]
)
@pytest.mark.parametrize(
    "header",
    [
        pytest.param(f'{{"a":{F32},"a":{F32}', id="name twice"),
        pytest.param('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}', id="unknown field"),
        pytest.param('{"a":{"dtype":"F32","shape":[2]}', id="missing field"),
    ],
)
def test_members_that_do_not_fit_are_refused_in_headers_of_any_length(header: str, padding: str) -> None:
    with pytest.raises(HeaderError, match=r"twice|unknown|missing"):
        parse(f"{header}{padding}}}")


def test_rank_has_a_limit() -> None:
    for rank in (MAX_RANK, MAX_RANK + 1):
        header = json.dumps({"a": entry("F32", [1] * rank, 0, 4)})
        if rank == MAX_RANK:
            assert len(parse(header)[0].shape) == rank
        else:
            with pytest.raises(HeaderError, match=f"of length <= {MAX_RANK}"):
                parse(header)


def test_number_of_strings_has_a_limit_that_is_checked_before_anything_is_decoded() -> None:
    with pytest.raises(HeaderError, match=f"more than {MAX_STRINGS // 5} tensors"):
        parse(b"{" + b'""' * (MAX_STRINGS + 1))


@pytest.mark.parametrize("dtype", ["", "f32", "F8_E4M3FN", "torch.float32", "F128", "F6"])
def test_unknown_dtype_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(UnsupportedFormatError, match="unknown dtype") as caught:
        parse(json.dumps({"a": entry(dtype, [2], 0, 8)}))
    assert (caught.value.file, caught.value.tensor, caught.value.actual) == ("a.safetensors", "a", dtype)


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets", "message"),
    [
        pytest.param("F32", [-2], [0, 8], "negative", id="negative dimension"),
        pytest.param("F32", [-1, -2], [0, 8], "negative", id="negative dimensions, positive product"),
        pytest.param("F32", [0, -2], [0, 0], "negative", id="negative behind a zero"),
        pytest.param("U8", [2**63], [0, 8], "overflows", id="dimension of 64 bits"),
        pytest.param("U8", [2**64 + 8], [0, 8], "overflows", id="dimension of 65 bits"),
        pytest.param("U8", [2**32, 2**32], [0, 0], "overflows", id="product"),
        pytest.param("U8", [2**32, 2**32, 0], [0, 0], "overflows", id="product, times zero"),
        pytest.param("U8", [2**62], [0, 2**62], "too many", id="bits"),
        pytest.param("F64", [2**61], [0, 0], "too many", id="bytes, around to zero"),
        pytest.param("F4", [1], [0, 1], "whole bytes", id="half a byte"),
        pytest.param("F6_E2M3", [2], [0, 2], "whole bytes", id="twelve bits"),
        pytest.param("F32", [2], [0, 7], "expected 8 bytes, found 7 bytes", id="offsets too close"),
        pytest.param("F32", [2], [0, 9], "expected 8 bytes, found 9 bytes", id="offsets too far apart"),
        pytest.param("F32", [2], [8, 0], "found -8 bytes", id="offsets reversed"),
        pytest.param("F32", [2], [-8, 0], "do not fit", id="negative offset"),
        pytest.param("F32", [2], [2**64, 2**64 + 8], "hole", id="offsets of 65 bits"),
        pytest.param("F32", [2], [8, 16], "hole .* expected offset 0, found offset 8", id="hole at the start"),
    ],
)
def test_shape_and_offsets_that_cannot_be_are_refused(
    dtype: str, shape: list[int], offsets: list[int], message: str
) -> None:
    with pytest.raises(HeaderError, match=message) as caught:
        parse(json.dumps({"a": entry(dtype, shape, *offsets)}))
    assert caught.value.tensor == "a"


@pytest.mark.parametrize(
    ("begin", "end", "message"),
    [
        pytest.param(9, 17, "hole .* expected offset 8, found offset 9", id="hole"),
        pytest.param(7, 15, "overlap .* expected offset 8, found offset 7", id="overlap by one byte"),
        pytest.param(0, 8, "overlap", id="same bytes"),
    ],
)
def test_tensors_that_do_not_tile_the_file_are_refused(begin: int, end: int, message: str) -> None:
    with pytest.raises(HeaderError, match=message):
        parse(json.dumps({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], begin, end)}))


@pytest.mark.parametrize("offset", [4, 9], ids=["inside another", "behind a hole"])
def test_empty_tensor_must_lie_on_a_border_too(offset: int) -> None:
    with pytest.raises(HeaderError, match=r"hole|overlap"):
        parse(json.dumps({"a": entry("F32", [2], 0, 8), "b": entry("F32", [0], offset, offset)}))


# What the operating system says


def test_refused_read_is_a_read_error(write: Write) -> None:
    path = write(raw_file("{}"))
    fd = os.open(path, os.O_WRONLY)
    try:
        with pytest.raises(ReadError, match=r"the header at offset 0: Bad file descriptor \(errno 9\)") as caught:
            read_header(fd, path.stat().st_size, file=str(path), shard=0)
        assert caught.value.file == str(path)
    finally:
        os.close(fd)


def test_file_that_shrank_since_its_length_was_taken_is_a_read_error(write: Write) -> None:
    path = write(raw_file("{}"))
    fd = os.open(path, os.O_RDONLY)
    os.truncate(path, 9)
    try:
        with pytest.raises(ReadError, match="the file ended while the header was being read: expected 1 more bytes"):
            read_header(fd, 10, file=str(path), shard=0)
    finally:
        os.close(fd)


def test_short_reads_are_continued(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(raw_file(f'{{"a":{F32}}}', bytes(8)))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: pread(fd, min(count, 3), offset))
    assert [spec.name for spec in read(path)] == ["a"]


# Properties

property_settings = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class _DoubledKeyError(Exception):
    pass


def _slow_reference(text: bytes) -> Any:
    """Parse JSON the sure way: every object's pairs are looked at."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise _DoubledKeyError
        return dict(pairs)

    return json.loads(text, object_pairs_hook=check)


def _has_doubles(text: bytes) -> bool:
    try:
        _slow_reference(text)
    except _DoubledKeyError:
        return True
    return False


def _escaped(key: str) -> str:
    return "".join(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else c for c in key)


keys = st.one_of(
    st.sampled_from(["a", "b", 'a"', "a\\", "dtype", "shape", "data_offsets", "__metadata__", "ä", "", "😀"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
)
#: A key as it is written, between its quotes: plainly, or with more escapes than it needs.
written = st.one_of(
    keys.map(lambda key: json.dumps(key, ensure_ascii=False)),
    keys.map(json.dumps),
    keys.map(lambda key: f'"{_escaped(key)}"'),
)


def _members(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.lists(st.tuples(written, values).map(":".join), max_size=6)
    return pairs.map(lambda members: "{" + ",".join(members) + "}")


@property_settings
@given(
    st.recursive(st.none() | st.integers() | keys, lambda of: st.lists(of) | st.dictionaries(keys, of)), st.booleans()
)
@example({"\\": '\\"'}, True)
@example(['\\\\"', '"\\'], True)
def test_strings_are_counted_whatever_is_in_them(value: object, plainly: bool) -> None:  # noqa: FBT001
    raw = json.dumps(value, ensure_ascii=not plainly).encode()
    assert count_strings(raw) == _num_strings(value)


def _num_strings(value: object) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_num_strings, value.values()))
    return sum(map(_num_strings, value)) if isinstance(value, list) else isinstance(value, str)


@pytest.mark.parametrize("refuse", [refuse_doubles, parse_string_mapping])
def test_key_that_is_there_twice_is_named_in_short_texts_only(refuse: Callable[[bytes], object]) -> None:
    for padding, message in ((0, "the key 'a' is there twice"), (2**20, "^a key is there twice")):
        with pytest.raises(ValueError, match=message):
            refuse(b'{"a":"","a":""' + b" " * padding + b"}")


@property_settings
@given(_members(written))
@example('{"a":"b","\\u0061":"b"}')
@example('{"a":"\\"","b":"c"}')
def test_mapping_of_strings_is_refused_exactly_when_a_key_is_there_twice(text: str) -> None:
    raw = text.encode()
    if _has_doubles(raw):
        with pytest.raises(ValueError, match="twice"):
            parse_string_mapping(raw)
    else:
        assert parse_string_mapping(raw) == _slow_reference(raw)


FIELDS = ('"dtype":"U8"', '"shape":[0]', '"data_offsets":[0,0]', '"dtyp\\u0065":"\\u00558"', '"shape":[0]')
entries = st.one_of(
    st.just("{" + ",".join(FIELDS[:3]) + "}"),
    st.lists(st.sampled_from(FIELDS), min_size=3, max_size=5).map(lambda fields: "{" + ",".join(fields) + "}"),
)
not_metadata = written.filter(lambda key: json.loads(key) != "__metadata__")


@property_settings
@given(
    st.lists(st.tuples(not_metadata, entries).map(":".join), max_size=5),
    st.lists(_members(written).map('"__metadata__":{}'.format), max_size=2),
    st.randoms(use_true_random=False),
)
def test_header_is_refused_exactly_when_a_key_is_there_twice_or_a_field_missing(
    tensors: list[str], metadata: list[str], random: Any
) -> None:
    members = tensors + metadata
    random.shuffle(members)
    raw = ("{" + ",".join(members) + "}").encode()
    complete = all(
        {"dtype", "shape", "data_offsets"} == set(json.loads(f"{{{text}}}").popitem()[1]) for text in tensors
    )
    if complete and not _has_doubles(raw):
        names = set(_slow_reference(raw)) - {"__metadata__"}
        assert {spec.name for spec in parse(raw)} == names
    else:
        with pytest.raises((HeaderError, UnsupportedFormatError)):
            parse(raw)
