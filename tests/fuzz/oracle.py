"""What must be true of any input at all: the properties that hypothesis, atheris and the kept corpus all check.

Each `check_*` takes an input, compares our reading of it with the reference's, and returns what came of it: `accepted`,
`refused` (by both), or the reasons for which we are stricter than the reference. `STRICTER` lists every such reason. A
disagreement without one of them is an error, as is any exception of another class than those that are promised.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from pydantic import ValidationError

from weightstream.config import LoaderConfig
from weightstream.device.dtypes import torch_dtype, torch_shape
from weightstream.errors import CheckpointError, HeaderError, UnsupportedFormatError, WeightstreamError
from weightstream.prefetch.checkpoint import open_checkpoint
from weightstream.prefetch.finding import is_repository
from weightstream.prefetch.header import DTYPE_BITS, MAX_RANK, MAX_STRINGS, TensorSpec, read_header
from weightstream.prefetch.index import parse_index
from weightstream.prefetch.torchfile import read_torch_file

ACCEPTED, REFUSED = frozenset({"accepted"}), frozenset({"refused"})

#: A tensor as both sides describe it: name, dtype, shape, bytes.
Tensor = tuple[str, str, tuple[int, ...], bytes]


class Pairs(list[tuple[str, Any]]):
    """A JSON object with all of its members, also those whose key is there twice."""


#: Where we are stricter than the safetensors package, and why.
STRICTER: dict[str, str] = {
    "doubled key": "it keeps the last of two tensors, or members of metadata, of one name: which one is meant?",
    "unknown field": "it ignores fields that the format does not name: a typing mistake, or a format of tomorrow",
    "entry as an array": 'it reads ["F32",[2],[0,8]] as an entry, which its specification does not know',
    "dtype as an object": 'it reads {"F32":null} as a dtype, which its specification does not know',
    "space before the brace": "it skips it, though its specification says that the first byte is a brace",
    "metadata null": "it takes null for no metadata, which its specification does not know",
    "dimension above 63 bits": "it counts up to 2**64, and torch up to 2**63",
    "rank above the limit": f"more than {MAX_RANK} dimensions take time and serve nobody",
    "strings above the limit": f"more than {MAX_STRINGS} strings take time and memory and serve nobody",
}


def _is_pairs(value: object) -> bool:
    return isinstance(value, Pairs)


def _entries(header: Pairs) -> Iterator[Any]:
    return (value for name, value in header if name != "__metadata__")


def _fields(header: Pairs, field: str, position: int) -> Iterator[Any]:
    """The values of one field in all entries, also in those that are arrays."""
    for entry in _entries(header):
        if isinstance(entry, Pairs):
            yield from (value for name, value in entry if name == field)
        elif isinstance(entry, list) and len(entry) > position:
            yield entry[position]


def _numbers(value: object) -> Iterator[int]:
    if isinstance(value, list):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, int):
        yield value


def _is_above_63_bits(shape: object) -> bool:
    product = 1
    for n in _numbers(shape):
        product *= n
        if n >= 2**63 or product >= 2**63:
            return True
    return product * 64 >= 2**63


def _has_doubles(pairs: Pairs) -> bool:
    return len({name for name, _ in pairs}) != len(pairs)


APPLIES: dict[str, Callable[[Pairs], bool]] = {
    "doubled key": lambda header: (
        _has_doubles(header) or any(_has_doubles(value) for name, value in header if isinstance(value, Pairs))
    ),
    "unknown field": lambda header: any(
        {name for name, _ in entry} - {"dtype", "shape", "data_offsets"}
        for entry in _entries(header)
        if isinstance(entry, Pairs)
    ),
    "entry as an array": lambda header: any(
        isinstance(entry, list) and not _is_pairs(entry) for entry in _entries(header)
    ),
    "dtype as an object": lambda header: any(_is_pairs(dtype) for dtype in _fields(header, "dtype", 0)),
    "metadata null": lambda header: any(name == "__metadata__" and value is None for name, value in header),
    "dimension above 63 bits": lambda header: any(map(_is_above_63_bits, _fields(header, "shape", 1))),
    "rank above the limit": lambda header: any(
        isinstance(shape, list) and len(shape) > MAX_RANK for shape in _fields(header, "shape", 1)
    ),
    "strings above the limit": lambda header: _num_strings(header) > MAX_STRINGS,
}


def _num_strings(value: object) -> int:
    if isinstance(value, Pairs):
        return sum(1 + _num_strings(member) for _, member in value)
    return sum(map(_num_strings, value)) if isinstance(value, list) else isinstance(value, str)


def reasons(file: bytes) -> frozenset[str]:
    """The reasons of `STRICTER` that apply to a file which the reference accepts."""
    length = int.from_bytes(file[:8], "little")
    raw = file[8 : 8 + length]
    header = json.loads(raw, object_pairs_hook=Pairs)
    found = {name for name, applies in APPLIES.items() if applies(header)}
    return frozenset(found if raw.startswith(b"{") else {*found, "space before the brace"})


# The header


@contextmanager
def _in_memory(raw: bytes) -> Iterator[int]:
    fd = os.memfd_create("input")
    try:
        os.write(fd, raw)
        yield fd
    finally:
        os.close(fd)


def ours(file: bytes) -> list[Tensor]:
    """A file's tensors as we read them."""
    with _in_memory(file) as fd:
        specs = read_header(fd, len(file), file="input", shard=0)
    return sorted((spec.name, spec.dtype, spec.shape, file[spec.begin : spec.end]) for spec in specs)


def theirs(file: bytes) -> list[Tensor] | None:
    """A file's tensors as the safetensors package reads them, from memory and from a file; None: it refuses."""
    try:
        found: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(file)  # type: ignore[no-untyped-call]  # no stubs
    except safetensors.SafetensorError:
        return None
    return sorted((name, one["dtype"], tuple(one["shape"]), bytes(one["data"])) for name, one in found)


def check_message(error: WeightstreamError) -> None:
    """Check that an error can be shown anywhere: short, and without characters that mean something to a terminal."""
    message = str(error)
    assert len(message) < 5000
    assert message.replace("\n", "").isprintable()


def _explained(why: frozenset[str], error: Exception) -> frozenset[str]:
    assert why, f"refused without a reason that is known: {error}"
    return why


def check_header(file: bytes) -> frozenset[str]:
    """Check one safetensors file: accepted means that the reference accepts it and sees the same tensors."""
    reference = theirs(file)
    try:
        found = ours(file)
    except (HeaderError, UnsupportedFormatError) as error:
        check_message(error)
        return REFUSED if reference is None else _explained(reasons(file), error)
    assert found == reference
    assert all(dtype in DTYPE_BITS for _, dtype, _, _ in found)
    return ACCEPTED


# Files of torch.save


def _torch_tensors(file: bytes, names: set[str]) -> dict[str, torch.Tensor]:
    """The tensors that torch finds, in the dict or in one inside it that has just these names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol 3")
        value = torch.load(io.BytesIO(file), weights_only=True, map_location="cpu")
    for found in (value, *value.values()):
        if isinstance(found, dict):
            tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
            if set(tensors) == names:
                return tensors
    raise AssertionError(f"torch finds no dict with {names}")


def _check_same(spec: TensorSpec, tensor: torch.Tensor, file: bytes) -> None:
    """Compare by the bytes that both look at: expanded tensors may have any number of elements."""
    assert tensor.dtype is torch_dtype(spec.dtype)
    assert tuple(tensor.shape) == torch_shape(spec.dtype, spec.shape)
    assert tensor.is_contiguous() if spec.stride is None else tensor.stride() == spec.stride
    stored = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().tobytes()
    begin = tensor.storage_offset() * tensor.element_size()
    assert stored[begin : begin + spec.num_bytes] == file[spec.begin : spec.end]


def check_torch(file: bytes) -> frozenset[str]:
    """Check one file of torch.save: accepted means that torch accepts it, without code, and sees the same tensors.

    What else it may hold is another matter: torch also makes what a model does not need.
    """
    with _in_memory(file) as fd:
        try:
            found = read_torch_file(fd, len(file), file="input", shard=0)
        except (HeaderError, UnsupportedFormatError) as error:
            check_message(error)
            return REFUSED
    assert all(len(note) < 5000 and note.isprintable() for note in found.notes)
    expected = _torch_tensors(file, {spec.name for spec in found.specs})
    for spec in found.specs:
        _check_same(spec, expected[spec.name], file)
    return ACCEPTED


# The index


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _reference_index(raw: bytes) -> dict[str, str] | None:
    """The weight_map as Python's own JSON reads it; None: not an index."""
    try:
        index = json.loads(
            raw.decode(), object_pairs_hook=Pairs, parse_int=len, parse_float=len, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError):
        return None
    if not isinstance(index, Pairs) or _has_doubles(index):
        return None
    pairs = dict(index).get("weight_map")
    if not isinstance(pairs, Pairs) or not pairs or _has_doubles(pairs):
        return None
    return dict(pairs) if all(isinstance(value, str) for _, value in pairs) else None


def _has_surrogates(raw: bytes) -> bool:
    r"""Tell whether a `\ud800` without its other half is in JSON, which Python's reader lets pass."""
    return any("\ud800" <= c <= "\udfff" for c in json.dumps(json.loads(raw, parse_int=len), ensure_ascii=False))


def _depth(raw: bytes) -> int:
    """The number of brackets that are open at once, at most, if none were in strings."""
    deepest = depth = 0
    for byte in raw:
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    return deepest


def _index_reasons(raw: bytes) -> frozenset[str]:
    """Why we are stricter than Python's JSON, which lets half a surrogate pair pass, and nests more deeply."""
    applies = {"half a surrogate pair": _has_surrogates(raw), "deep": _depth(raw) > 100}
    return frozenset(reason for reason, is_so in applies.items() if is_so)


def check_index(raw: bytes) -> frozenset[str]:
    """Check one index: accepted means that Python's JSON reads the same map, with no key twice."""
    reference = _reference_index(raw)
    try:
        found = parse_index(raw, file="input")
    except CheckpointError as error:
        check_message(error)
        return REFUSED if reference is None else _explained(_index_reasons(raw), error)
    assert found == reference
    return ACCEPTED


def check_opening(folder: Path, raw: bytes) -> None:
    """Check that an index opens files below `folder` alone, whatever names are in it."""
    path = folder / "model.safetensors.index.json"
    path.write_bytes(raw)
    try:
        checkpoint = open_checkpoint(path)
    except WeightstreamError as error:
        check_message(error)
        return
    with checkpoint:
        root = folder.resolve()
        for shard in checkpoint.shards:
            opened = Path(f"/proc/self/fd/{shard.fd}").readlink()
            assert opened.is_relative_to(root), opened


# The configuration

_folder = tempfile.TemporaryDirectory(prefix="weightstream-")
_YAML = Path(_folder.name) / "config.yaml"


def _reference_config(raw: bytes) -> LoaderConfig | None:
    """The configuration as PyYAML and pydantic alone read it; None: they refuse."""
    try:
        values = yaml.safe_load(raw)
        if isinstance(values, dict):
            path = values.get("checkpoint")
            if isinstance(path, str) and path and not path.startswith("pkg://") and not is_repository(path):
                values["checkpoint"] = str(_YAML.parent / path)
        return LoaderConfig(**({} if values is None else values))
    except Exception:  # noqa: BLE001 - of many classes: that is why ours are compared with it
        return None


#: Where we are stricter than PyYAML and pydantic, and what our message then says.
YAML_STRICTER = {
    "doubled key": "stands here",
    "deep": "levels",
    "large": "keys and values",
    "long": "longer than",
    "contains itself": "contains itself",
    "half a surrogate pair": "surrogate pair",
}
#: Of these, those in which the reference may take as much time and memory as there is.
COSTLY = {"deep", "large", "long", "contains itself"}


def check_yaml(raw: bytes) -> frozenset[str]:
    """Check one YAML file: accepted means that PyYAML's safe loader and pydantic give the same configuration."""
    _YAML.write_bytes(raw)
    try:
        found = LoaderConfig.from_yaml(_YAML)
    except ValidationError as error:
        why = frozenset(reason for reason, text in YAML_STRICTER.items() if text in str(error))
        reference = _reference_config(raw) if why.isdisjoint(COSTLY) else None
        return REFUSED if reference is None else _explained(why, error)
    assert found == _reference_config(raw)
    return ACCEPTED
