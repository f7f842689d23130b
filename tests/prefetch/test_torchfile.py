"""Files of `torch.save`: which bytes each tensor is, what is taken of them, and everything that is refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.builders import assert_same, leaves_nothing
from weightstream.errors import HeaderError, UnsupportedFormatError
from weightstream.prefetch import pickles, versions
from weightstream.prefetch.checkpoint import open_checkpoint
from weightstream.prefetch.pickles import read_pickle
from weightstream.prefetch.torchfile import _OLD as OLD
from weightstream.prefetch.torchfile import read_torch_file

BASE = torch.arange(40, dtype=torch.float32).reshape(5, 8)


def save(path: Path, value: object, *, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor as the bytes that its spec points to."""
    names = {"F32": torch.float32, "I64": torch.int64, "U8": torch.uint8, "BF16": torch.bfloat16}
    with leaves_nothing(), open_checkpoint(path) as checkpoint:
        found: dict[str, torch.Tensor] = {}
        for name, spec in checkpoint.tensors.items():
            raw = bytearray(os.pread(checkpoint.shards[0].fd, spec.num_bytes, spec.begin))
            if not raw:
                found[name] = torch.empty(spec.shape, dtype=names[spec.dtype])
                continue
            flat = torch.frombuffer(raw, dtype=names[spec.dtype])
            found[name] = flat.view(spec.shape) if spec.stride is None else flat.as_strided(spec.shape, spec.stride)
    return found


class Other(torch.Tensor):
    """Not a class that anybody else knows."""


def ordered() -> OrderedDict[str, torch.Tensor]:
    state = torch.nn.BatchNorm1d(4).state_dict()
    assert isinstance(state, OrderedDict)
    assert hasattr(state, "_metadata")
    return state


def marked() -> dict[str, torch.Tensor]:
    tensor, parameter = torch.ones(3), torch.nn.Parameter(torch.ones(2))
    tensor.note = parameter.note = "x"  # type: ignore[attr-defined]
    return {"tensor": tensor, "parameter": parameter}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: {"a": BASE, "b": torch.ones(3, dtype=torch.bfloat16)}, id="dict"),
        pytest.param(ordered, id="OrderedDict with metadata"),
        pytest.param(
            lambda: {"p": torch.nn.Parameter(BASE.clone()), "n": torch.nn.Parameter(BASE, False)}, id="parameters"
        ),
        pytest.param(marked, id="attributes"),
        pytest.param(lambda: {"a": BASE, "same": BASE, "part": BASE[1:3], "last": BASE[4, 7]}, id="shared bytes"),
        pytest.param(lambda: {"t": BASE.t(), "c": BASE[:, 3], "w": BASE[1:4, 2:5]}, id="strides"),
        pytest.param(lambda: {"e": torch.ones(1, 3).expand(4, 3), "u": torch.ones(2).expand(1, 2)}, id="expanded"),
        pytest.param(lambda: {"z": torch.zeros(0, 3), "y": BASE[5:], "x": torch.zeros(3, 0, 2)}, id="empty"),
        pytest.param(lambda: {"s": torch.tensor(3), "\ud83d\ude00 é": torch.ones(1)}, id="scalar, odd name"),
    ],
)
def test_bytes_are_those_that_torch_loads(tmp_path: Path, make: Callable[[], dict[str, Any]], *, zipped: bool) -> None:
    path = save(tmp_path / "a.bin", make(), zipped=zipped)
    expected = torch.load(path, weights_only=True)
    found = tensors_in(path)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert_same(found[name], tensor)


def own_attributes() -> list[str]:
    """Names of what torch's own classes compute, or check when it is set."""
    classes = [*torch.Tensor.__mro__, *torch.nn.Parameter.__mro__]
    return sorted({name for kind in classes for name, value in vars(kind).items() if hasattr(type(value), "__set__")})


@pytest.mark.parametrize("name", own_attributes())
@pytest.mark.parametrize("kind", [torch.tensor, lambda value: torch.nn.Parameter(torch.tensor(value))], ids=["t", "p"])
def test_attributes_under_the_names_of_torch_s_own_are_refused(
    tmp_path: Path, name: str, kind: Callable[[float], torch.Tensor]
) -> None:
    tensor = kind(1.0)
    setattr(tensor, "?" * len(name), "x")
    path = save(tmp_path / "a.bin", {"a": tensor}, zipped=False)
    assert set(tensors_in(path)) == {"a"}
    path.write_bytes(path.read_bytes().replace(b"?" * len(name), name.encode()))
    with pytest.raises(HeaderError, match="attributes that are not a tensor's to set"):
        tensors_in(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 3")  # torch's
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_protocol_3_is_read_as_torch_reads_it(tmp_path: Path, *, zipped: bool) -> None:
    value = {**ordered(), "p": torch.nn.Parameter(BASE.clone()), "t": BASE.t(), "n": -3, "big": 2**80}
    path = tmp_path / "a.bin"
    torch.save(value, path, pickle_protocol=3, _use_new_zipfile_serialization=zipped)
    expected = torch.load(path, weights_only=True)
    found = tensors_in(path)
    assert set(found) == set(expected) - {"n", "big"}
    for name, tensor in found.items():
        assert_same(tensor, expected[name])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's
@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_newer_protocol_is_refused_as_by_torch(tmp_path: Path, protocol: int, *, zipped: bool) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": BASE}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    with leaves_nothing(), pytest.raises(UnsupportedFormatError, match=f"found protocol {protocol}. Save it again"):
        open_checkpoint(path)


def test_tensors_are_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.bin", {"b": BASE[3:], "a": BASE[:2], "c": torch.ones(3)})
    assert list(tensors_in(path)) == ["a", "b", "c"]


def test_archive_that_another_program_wrote_is_read(tmp_path: Path) -> None:
    """Without torch's long end record, and without padding."""
    path = save(tmp_path / "a.bin", {"a": BASE})
    again = tmp_path / "b.bin"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_same(tensors_in(again)["a"], BASE)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_state_dict_is_found_where_trainers_put_it(tmp_path: Path, key: str) -> None:
    inner = {"a": BASE, "n": 3}
    path = save(tmp_path / "a.pt", {"step": torch.ones(1), key: inner, "epoch": 2, "ema": {"a": BASE + 1}})
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint.tensors) == {"a"}
        assert checkpoint.notes == (
            f"format: taken from under {key!r} in {path}; left out, as they are no tensors: step, epoch, ema",
            f"format: {path}; left out, as they are no tensors: n",
        )
    assert_same(tensors_in(path)["a"], BASE)


def test_module_that_is_called_model_is_no_state_dict(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"model": torch.ones(1), "model.weight": BASE})
    assert set(tensors_in(path)) == {"model", "model.weight"}


# What is refused


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo never",)


def script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "x")


def compressed(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": BASE}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def big_endian(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": BASE}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # TorchScript's
@pytest.mark.parametrize(
    ("value", "says"),
    [
        pytest.param(script, "a TorchScript archive", id="TorchScript"),
        pytest.param(plain_pickle, "not a file of torch.save", id="plain pickle"),
        pytest.param(other_zip, "a zip archive, but not one of torch.save", id="another zip"),
        pytest.param(compressed, "compressed, encrypted, or a folder", id="compressed"),
        pytest.param(big_endian, "not little-endian", id="big-endian"),
        pytest.param({"a": BASE, "x": Evil()}, r"needs (posix|nt)\.system", id="code"),
        pytest.param(torch.nn.Linear(2, 2), r"needs torch\.nn\.modules\.linear\.Linear", id="module"),
        pytest.param({"w": BASE.as_subclass(Other)}, r"needs .*Other", id="subclass"),
        pytest.param(BASE, "not a dict of tensors: found PickledTensor", id="one tensor"),
        pytest.param([BASE], "not a dict of tensors: found list", id="list"),
        pytest.param({"epoch": 3, "net": {"a": BASE}}, "no tensors are in the dict.* found epoch, net", id="other key"),
        pytest.param({3: BASE}, "a tensor's name is not a string: found 3", id="number as name"),
        pytest.param(
            {"a": torch.ones(2, dtype=torch.complex128)}, "cannot be loaded: found complex128", id="complex128"
        ),
        pytest.param({"a": torch.ones(2, dtype=torch.complex64).conj()}, "conjugated or negated", id="conjugated"),
        pytest.param({"a": BASE, "x": {(1, 2)}}, "a set of something else than strings, numbers and bytes", id="set"),
        pytest.param({"a": BASE, "x": frozenset({1})}, r"needs __builtin__\.frozenset", id="frozenset"),
        pytest.param({"a": torch.eye(3).to_sparse()}, r"needs torch\._utils\._rebuild_sparse_tensor", id="sparse"),
    ],
)
def test_what_is_no_dict_of_plain_tensors_is_unsupported(tmp_path: Path, value: Any, says: str) -> None:
    path = tmp_path / "a.pt"
    if callable(value) and not isinstance(value, torch.nn.Module):
        value(path)
    else:
        save(path, value)
    with leaves_nothing(), pytest.raises(UnsupportedFormatError, match=says) as caught:
        open_checkpoint(path)
    assert caught.value.file == str(path)


def with_pickle(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickled)
        file.writestr("a/version", "3")
        file.writestr("a/data/0", bytes(16))
    return path


def tensor_pickle(
    *,
    numel: int = 4,
    offset: int = 0,
    shape: bytes = b"K\x04\x85",
    stride: bytes = b"K\x01\x85",
    behind: bytes = b"",
) -> bytes:
    """A dict with one tensor of float32, as torch writes it."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuJ" + struct.pack("<i", numel)
    storage += behind + b"tQ"
    return (
        b"\x80\2}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J" + struct.pack("<i", offset)
        + shape + stride + b"\x89NtRs."
    )  # fmt: skip


def beside(called: bytes, arguments: bytes) -> bytes:
    """The same, with the result of a call beside the tensor: under a name of its own."""
    return tensor_pickle()[:-1] + b"X\1\0\0\0bc" + called + b"\n" + arguments + b"Rs."


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("called", "arguments"),
    [
        pytest.param(b"torch\nSize", b"K\2K\3\x86\x85", id="sizes"),
        pytest.param(b"torch\ndevice", b"X\4\0\0\0cudaK\1\x86", id="device"),
        pytest.param(b"torch\ndevice", b"X\3\0\0\0cpu\x85", id="device without a number"),
        pytest.param(b"collections\nOrderedDict", b")", id="OrderedDict"),
        pytest.param(b"_codecs\nencode", b"X\2\0\0\0\xc3\xbfX\6\0\0\0latin1\x86", id="bytes"),
        pytest.param(b"__builtin__\nset", b"](K\1Ne\x85", id="set"),
        pytest.param(b"builtins\nset", b"]\x85", id="set of protocol 3"),
        pytest.param(b"__builtin__\ncomplex", b"G" + bytes(8) + b"G" + bytes(8) + b"\x86", id="complex"),
        pytest.param(b"__builtin__\nbytearray", b")", id="bytearray"),
    ],
)
def test_what_lies_beside_tensors_is_left_out(tmp_path: Path, called: bytes, arguments: bytes) -> None:
    path = with_pickle(tmp_path / "a.pt", beside(called, arguments))
    assert tensors_in(path).keys() == {"a"}
    assert torch.load(path, weights_only=True).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("called", "arguments"),
    [
        pytest.param(b"torch\nSize", b"K\2\x85", id="size of a number"),
        pytest.param(b"torch\nSize", b"X\1\0\0\0a\x85\x85", id="size of strings"),
        pytest.param(b"torch\nSize", b"K\2\x85K\2\x85\x86", id="two sizes"),
        pytest.param(b"torch\ndevice", b"X\4\0\0\0tape\x85", id="unknown device"),
        pytest.param(b"torch\ndevice", b")", id="no device"),
        pytest.param(b"collections\nOrderedDict", b"K\2\x85", id="OrderedDict of a number"),
        pytest.param(b"_codecs\nencode", b"X\3\0\0\0\xe2\x82\xacX\6\0\0\0latin1\x86", id="no bytes"),
        pytest.param(b"_codecs\nencode", b"K\2X\6\0\0\0latin1\x86", id="encoded number"),
        pytest.param(b"__builtin__\nset", b"K\2\x85", id="set of a number"),
        pytest.param(b"__builtin__\nset", b"]]\x86", id="set of two lists"),
        pytest.param(b"__builtin__\ncomplex", b"X\1\0\0\0aX\1\0\0\0b\x86", id="complex of strings"),
        pytest.param(b"__builtin__\nbytearray", b"]N\x86", id="bytearray of a list and nothing"),
        pytest.param(b"__builtin__\nbytearray", b"X\1\0\0\0a\x85", id="bytearray of a string"),
        pytest.param(
            b"torch._utils\n_rebuild_parameter_with_state", b"(h\0\x88ccollections\nOrderedDict\n)RK\5t", id="state"
        ),
    ],
)
def test_what_torch_could_not_make_is_refused(tmp_path: Path, called: bytes, arguments: bytes) -> None:
    pickled = beside(called, arguments).replace(b"NtRs", b"NtRq\0s", 1)
    path = with_pickle(tmp_path / "a.pt", pickled)
    with pytest.raises(Exception):  # noqa: B017 (of many classes)
        torch.load(path, weights_only=True)
    with pytest.raises(HeaderError, match="the pickle is not valid"):
        open_checkpoint(path)


def test_the_pickle_of_these_tests_is_a_good_one(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.pt", tensor_pickle())
    assert_same(tensors_in(path)["a"], torch.zeros(4))
    assert_same(torch.load(path, weights_only=True)["a"], torch.zeros(4))


NESTED = b"\x80\2)" + b"\x85" * 100_000 + b"q\0"
TWICE = b"\x80\2)" + b"q\0h\0\x86" * 60


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        pytest.param(b"", "the pickle has no end", id="empty"),
        pytest.param(tensor_pickle()[:-1], "the pickle has no end", id="no stop"),
        pytest.param(tensor_pickle() + b".", "followed by something else", id="more behind"),
        pytest.param(b"\x80\1}.", "protocol 1", id="protocol 1"),
        pytest.param(b"\x80\3B\1\0\0\0a.", "which torch does not write", id="bytes of protocol 3"),
        pytest.param(b"\x80\2ios\nsystem\n.", "which torch does not write", id="INST"),
        pytest.param(b"\x80\2\x94.", "which torch does not write", id="later protocol"),
        pytest.param(b"\x80\2.", "not valid", id="nothing on the stack"),
        pytest.param(b"\x80\2u.", "not valid", id="no mark"),
        pytest.param(b"\x80\2h\7.", "not valid", id="nothing in the memo"),
        pytest.param(b"\x80\2}X\1\0\0\0\xffNs.", "not valid", id="not UTF-8"),
        pytest.param(b"\x80\2}NX\1\0\0\0as.", "neither a string nor a number", id="None as key"),
        pytest.param(NESTED + b"}h\0Ns.", "neither a string nor a number", id="deep tuple as key"),
        pytest.param(TWICE + b"}q\1h\0Ns.", "neither a string nor a number", id="tuple that grows as key"),
        pytest.param(b"\x80\2}(X\1\0\0\0aNX\1\0\0\0aNu.", "a key that is there twice", id="key twice"),
        pytest.param(b"\x80\2c" + b"x" * 2000, "a name without an end", id="long name"),
        pytest.param(b"\x80\2X\xff\xff\xff\xffa.", "the pickle has no end", id="long string"),
        pytest.param(b"\x80\2" + b"N0" * 3, "which torch does not write", id="POP"),
        pytest.param(
            tensor_pickle(numel=5), "not as long as the pickle says: expected 20 bytes, found 16", id="longer"
        ),
        pytest.param(tensor_pickle(numel=-1), "whole number", id="negative length"),
        pytest.param(tensor_pickle(behind=b"N"), "something else than a storage", id="storage of the older layout"),
        pytest.param(tensor_pickle(offset=1), "not inside its storage: expected 4 elements, found 5", id="offset"),
        pytest.param(tensor_pickle(offset=-1), "whole number", id="negative offset"),
        pytest.param(tensor_pickle(shape=b"K\x05\x85"), "not inside its storage", id="too large"),
        pytest.param(tensor_pickle(stride=b"K\x02\x85"), "not inside its storage", id="wide strides"),
        pytest.param(tensor_pickle(stride=b"K\x01K\x01\x86"), "do not fit each other", id="ranks differ"),
        pytest.param(tensor_pickle(shape=b"X\1\0\0\0a\x85"), "whole number", id="no number"),
        pytest.param(tensor_pickle(shape=b"\x88\x85"), "whole number", id="bool"),
        pytest.param(
            tensor_pickle(shape=b"J\xff\xff\xff\x7f" * 3 + b"\x87", stride=b"K\0K\0K\0\x87"), "overflow", id="overflow"
        ),
        pytest.param(
            tensor_pickle(shape=b"(" + b"K\1" * 33 + b"t", stride=b"(" + b"K\1" * 33 + b"t"), "32 dim", id="dimensions"
        ),
    ],
)
def test_pickle_that_breaks_the_rules_is_refused(tmp_path: Path, pickled: bytes, says: str) -> None:
    path = with_pickle(tmp_path / "a.pt", pickled)
    with leaves_nothing(), pytest.raises(HeaderError, match=says) as caught:
        open_checkpoint(path)
    assert caught.value.file == str(path)


def test_set_of_what_cannot_be_hashed_is_refused_though_the_list_grew_behind_another_set(tmp_path: Path) -> None:
    """A list is looked at from where it was looked at last: [1] makes a set, and [1, []], the same list, none."""
    lists = b"c__builtin__\nset\n]q\1K\1a\x85RX\1\0\0\0c" + b"c__builtin__\nset\nh\1"
    pickled = tensor_pickle()[:-1] + b"(X\1\0\0\0b" + lists
    good, bad = pickled + b"K\2a\x85Ru.", pickled + b"]a\x85Ru."
    assert tensors_in(with_pickle(tmp_path / "good.pt", good)).keys() == {"a"}
    assert torch.load(tmp_path / "good.pt", weights_only=True)["c"] == {1, 2}
    with pytest.raises(UnsupportedFormatError, match="a set of something else"):
        open_checkpoint(with_pickle(tmp_path / "bad.pt", bad))
    array = pickled + b"c__builtin__\nbytearray\n)Ra\x85Ru."
    with pytest.raises(UnsupportedFormatError, match="a set of something else"):
        open_checkpoint(with_pickle(tmp_path / "array.pt", array))


def test_many_sets_of_one_long_list_take_no_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[object] = []

    def look_at(item: object) -> bool:
        looked_at.append(item)
        return True

    monkeypatch.setattr(pickles, "_is_quick_to_hash", look_at)
    once = b"c__builtin__\nset\nh\1\x85R"
    value, _, _ = read_pickle(b"\x80\2](" + b"K\7" * 1000 + b"eq\1" + b"(" + once * 1000 + b"t.", file="a.pt")
    assert len(cast("tuple[object, ...]", value)) == len(looked_at) == 1000


def test_too_many_instructions_are_refused() -> None:
    with pytest.raises(HeaderError, match="more than 1000 instructions"):
        read_pickle(b"\x80\2" + b"N" * 1000 + b".", file="a.pt", most_opcodes=1000)
    read_pickle(b"\x80\2" + b"N" * 998 + b".", file="a.pt", most_opcodes=1000)


@pytest.mark.parametrize("which", ["about the system", "of the keys"])
def test_small_pickles_of_an_old_file_have_limits_of_their_own(tmp_path: Path, which: str) -> None:
    whole = save(tmp_path / "a.bin", {"a": BASE}, zipped=False).read_bytes()
    _, value, _ = read_pickle(whole, len(OLD), file="a.bin", is_old=True)
    _, keys, _ = read_pickle(whole, value, file="a.bin", is_old=True)
    begin, most = (len(OLD), 1000) if which == "about the system" else (keys, 2**18)
    (tmp_path / "a.bin").write_bytes(whole[:begin] + b"\x80\2" + b"N" * 2**19 + b".")
    with pytest.raises(HeaderError, match=f"more than {most} instructions"):
        open_checkpoint(tmp_path / "a.bin")


def test_long_shape_is_refused_before_it_is_looked_at(tmp_path: Path) -> None:
    """One tuple can be the shape of every tensor: a million numbers for each of a million tensors."""
    path = with_pickle(tmp_path / "a.pt", tensor_pickle(shape=b"(" + b"X\0\0\0\0" * 33 + b"t"))
    with pytest.raises(HeaderError, match="a tensor of more than 32 dimensions"):
        open_checkpoint(path)


def test_pickle_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightstream.prefetch.torchfile.MAX_PICKLE_BYTES", 1000)
    with pytest.raises(HeaderError, match="too long: expected at most 1000 bytes, found 1001 bytes"):
        open_checkpoint(with_pickle(tmp_path / "a.pt", bytes(1001)))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, *, zipped: bool) -> None:
    path = save(tmp_path / "a.bin", {"a": BASE, "b": torch.ones(3)}, zipped=zipped)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises((HeaderError, UnsupportedFormatError)):
            open_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(HeaderError, match="longer than"):
        open_checkpoint(path)


def test_record_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", tensor_pickle())
        file.writestr("a/version", "3")
    with pytest.raises(HeaderError, match=r"the record a/data/0 is not as long .* expected 16 bytes"):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_record_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.pt", tensor_pickle())
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("a/data/0", bytes(16))
    with pytest.raises(HeaderError, match="a name is there twice: found a/data/0"):
        open_checkpoint(path)


def test_end_of_the_first_read_is_not_the_end_of_the_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightstream.prefetch.torchfile._FIRST_BYTES", 64)
    path = save(tmp_path / "a.bin", {"a": BASE}, zipped=False)
    assert_same(tensors_in(path)["a"], BASE)


# Damage


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 3")  # torch's
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_every_changed_byte_is_refused_or_makes_no_difference_to_torch(tmp_path: Path, *, zipped: bool) -> None:
    """What is accepted, torch accepts too, with the same tensors; nothing but our own errors comes out."""
    path = save(
        tmp_path / "a.bin", {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(2).half()}, zipped=zipped
    )
    whole = path.read_bytes()
    accepted = 0
    for position in range(len(whole)):
        for change in (1, 0xFE):
            raw = bytearray(whole)
            raw[position] ^= change
            path.write_bytes(raw)
            fd = os.open(path, os.O_RDONLY)
            try:
                specs = read_torch_file(fd, len(raw), file=str(path), shard=0).specs
            except (HeaderError, UnsupportedFormatError):
                continue
            finally:
                os.close(fd)
            accepted += 1
            expected = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
            assert {spec.name for spec in specs} == set(expected)
            for spec in specs:
                assert spec.shape == tuple(expected[spec.name].shape)
    assert accepted > 100  # the tensors' own bytes, padding, times


def test_one_long_dict_of_versions_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []

    def look(entries: object) -> tuple[dict[str, object], bool]:
        looks.append(entries)
        return {}, True

    monkeypatch.setattr(versions, "_plain", look)
    entries = {"version": 2}
    found, notes = versions.take_versions({str(number): entries for number in range(1000)}, "a.pt")
    assert (len(found), notes, len(looks)) == (1000, [], 1)
    monkeypatch.undo()
    found, notes = versions.take_versions({"a": dict.fromkeys(map(str, range(101)), 1), "b": 7, 3: {}}, "a.pt")
    assert found == {"a": {}, "b": {}}
    assert notes == ["format: left out of a.pt: what is not plain data in the _metadata of a, b, 3"]
