"""Every small change of small files, against the safetensors package: each disagreement has one of the known reasons."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.builders import entry, raw_file
from tests.fuzz import oracle
from weightstream.prefetch import header
from weightstream.prefetch.header import MAX_RANK

TWO = {"a": entry("F32", [2], 0, 8), "b": entry("U8", [1, 3], 8, 11)}

FILES = {
    "two tensors": raw_file(json.dumps(TWO, separators=(",", ":")), bytes(range(11))),
    "metadata": raw_file(json.dumps({"__metadata__": {"format": "pt", "x": ""}, **TWO}), bytes(range(11))),
    "escapes": raw_file('{"\\u0061\\"\\\\":{"dtype":"F\\u0034","shape":[2],"data_offsets":[0,1]}} ', b"x"),
    "nothing": raw_file("{}"),
}
each_file = pytest.mark.parametrize("file", FILES.values(), ids=FILES)

#: Bytes that mean something in a header.
TOKENS = b'{}[]",:\\-+.0129eEuntf \n\t\0\x7f\x80\xc3\xff'


def count(files: Iterator[bytes]) -> Counter[str]:
    """How many files had which outcome; a disagreement without a reason fails inside."""
    return Counter(reason for file in files for reason in oracle.check_header(file))


@each_file
def test_every_byte_with_a_bit_changed_or_as_another_that_means_something(file: bytes) -> None:
    outcomes = count(
        file[:i] + bytes([other]) + file[i + 1 :]
        for i, byte in enumerate(file)
        for other in {*TOKENS, *(byte ^ 1 << bit for bit in range(8))}
    )
    assert outcomes["accepted"]
    assert outcomes["refused"]


@each_file
def test_every_truncation_and_extension(file: bytes) -> None:
    count(file[:length] for length in range(len(file)))
    outcomes = count(file + bytes([byte]) * number for byte in (0, 0x20, 0x7D, 0xFF) for number in range(1, 20))
    assert set(outcomes) == {"refused"}


@each_file
def test_every_length_of_the_header(file: bytes) -> None:
    lengths = [*range(len(file) + 20), 10**8, 10**8 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    outcomes = count(length.to_bytes(8, "little") + file[8:] for length in lengths)
    assert outcomes["accepted"] >= 1


@each_file
def test_every_deletion_doubling_and_insertion_in_the_header(file: bytes) -> None:
    text, data = file[8 : 8 + file[0]], file[8 + file[0] :]
    places = range(len(text) + 1)
    count(raw_file(text[:i] + text[i + n :], data) for i in places for n in range(1, 12))
    count(raw_file(text[: i + n] + text[i:], data) for i in places for n in range(1, 60))
    count(raw_file(text[:i] + bytes([token]) + text[i:], data) for i in places for token in TOKENS)


F4 = '"dtype":"F4","shape":[2],"data_offsets":[0,1]'


@pytest.mark.parametrize(
    ("reason", "text", "data"),
    [
        pytest.param("doubled key", f'{{"a":{{{F4}}},"\\u0061":{{{F4}}}}}', b"x", id="tensor twice"),
        pytest.param("doubled key", '{"__metadata__":{"x":"1","x":"2"}}', b"", id="metadata twice"),
        pytest.param("unknown field", f'{{"a":{{{F4},"x":[]}}}}', b"x", id="unknown field"),
        pytest.param("entry as an array", '{"a":["F4",[2],[0,1]]}', b"x", id="entry as an array"),
        pytest.param(
            "dtype as an object",
            '{"a":{"dtype":{"F4":null},"shape":[2],"data_offsets":[0,1]}}',
            b"x",
            id="dtype as an object",
        ),
        pytest.param("space before the brace", " {}", b"", id="space before the brace"),
        pytest.param("metadata null", '{"__metadata__":null}', b"", id="metadata null"),
        pytest.param(
            "dimension above 63 bits", json.dumps({"a": entry("U8", [0, 2**63], 0, 0)}), b"", id="dimension of 64 bits"
        ),
        pytest.param(
            "dimension above 63 bits", json.dumps({"a": entry("U8", [2**62, 2, 0], 0, 0)}), b"", id="product of 64 bits"
        ),
        pytest.param(
            "rank above the limit", json.dumps({"a": entry("U8", [1] * (MAX_RANK + 1), 0, 1)}), b"x", id="rank"
        ),
    ],
)
def test_every_reason_to_be_stricter_is_a_real_one(reason: str, text: str, data: bytes) -> None:
    assert oracle.check_header(raw_file(text, data)) == {reason}


def test_limit_on_strings_is_a_reason_to_be_stricter(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (header, oracle):  # the real limit takes long to reach
        monkeypatch.setattr(module, "MAX_STRINGS", 9)
    assert oracle.check_header(FILES["two tensors"]) == {"strings above the limit"}


def test_every_reason_is_in_the_list() -> None:
    assert oracle.reasons(FILES["two tensors"]) == set()
    assert set(oracle.STRICTER) == {*oracle.APPLIES, "space before the brace"}
