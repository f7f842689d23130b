"""Files of `torch.save`: which bytes of the file each tensor is, so that they are read as those of safetensors are.

Both layouts are known: the zip archive of torch 1.6 and later, and the older one, where storages follow the pickles one
by one. What neither has is a rule that tensors tile the file: they may share bytes, and need not be contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, NoReturn, cast

from weightstream.errors import HeaderError, UnsupportedFormatError, some
from weightstream.prefetch.archive import Archive
from weightstream.prefetch.extras import ExtraState, ExtraTensor, is_extra_state, take_extra_states
from weightstream.prefetch.header import DTYPE_BITS, TensorSpec
from weightstream.prefetch.opening import read_exactly
from weightstream.prefetch.pickled import PickledDict, PickledTensor, Storage
from weightstream.prefetch.pickles import (
    MAX_OPCODES,
    MAX_PICKLE_BYTES,
    newer_protocol,
    read_pickle,
)
from weightstream.prefetch.unpickling import EndOfDataError
from weightstream.prefetch.versions import Versions, take_versions

__all__ = ["Contents", "read_torch_file"]

#: The old layout begins with these: a pickle of 0x1950a86a20f9469cfc6c, and one of the version, 1001.
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
_OLD_STARTS = (_OLD, _OLD.replace(b"\x80\x02", b"\x80\x03"))  # by their protocol

#: With protocols 4 and 5 the number stands in a frame.
_MAGIC_IN_FRAME = slice(11, 15)

#: Where trainers put the state dict, tried in this order.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")

#: Records of an archive that are a number.
_NUMBERS = frozenset({"version", ".format_version", ".storage_alignment"})

#: A number that torch gives each file, and logs.
_LOGGED = ".data/serialization_id"

#: How much of an old file is read to find the end of its pickles; if that is not enough, what was parsed is parsed again.
_FIRST_BYTES = 2**18

#: What the two small pickles of an old file may take: torch writes 30 instructions for the first, and some 2 for each
#: storage in the other, where it writes 34 for each tensor in the large one.
_MOST_ABOUT_SYSTEM, _MOST_OF_KEYS = 1000, MAX_OPCODES // 8

_MAX_INT = 2**63 - 1


class Contents(NamedTuple):
    """What one file of a checkpoint says. Safetensors have tensors alone.

    Attributes:
        specs: its tensors, in the order of their bytes.
        notes: what is in the file besides, in sentences.
        extras: extra state that is no tensor, by its names.
        versions: of modules, by their names.
    """

    specs: list[TensorSpec]
    notes: list[str]
    extras: dict[str, ExtraState]
    versions: Versions


def read_torch_file(fd: int, file_bytes: int, *, file: str, shard: int) -> Contents:
    """Read what a file of `torch.save` says about its tensors.

    Args:
        fd: a descriptor of the file; its position is neither used nor moved.
        file_bytes: the file's length.
        file: its name, for messages.
        shard: the number that the specs carry.

    Raises:
        HeaderError: the file breaks the format, or is truncated.
        UnsupportedFormatError: another format, something else than a dict of tensors, or a dtype without a name in the
            safetensors format.
        ReadError: the operating system refused the read.
    """
    start = read_exactly(fd, min(file_bytes, len(_OLD)), 0, file)
    if start.startswith(b"PK"):
        value, begins = _read_archive(fd, file_bytes, file)
    elif start in _OLD_STARTS:
        value, begins = _read_old(fd, file_bytes, file)
    elif start[_MAGIC_IN_FRAME] == _OLD[2:6]:
        raise newer_protocol(file, start[1])
    else:
        raise UnsupportedFormatError(
            "not a file of torch.save", file=file, expected="a zip archive, or torch's older layout", actual=start[:4]
        )
    tensors, found, notes, metadata = _find_tensors(value, file)
    versions, said = take_versions(metadata, file)
    specs = [_describe(name, tensor, begins, file, shard) for name, tensor in tensors.items()]
    specs.sort(key=lambda spec: (spec.begin, spec.end))

    def read(name: str, tensor: PickledTensor, most_bytes: int) -> ExtraTensor | None:
        spec = _describe(name, tensor, begins, file, shard)
        if spec.num_bytes > most_bytes:
            return None
        return ExtraTensor(spec.dtype, spec.shape, spec.stride, read_exactly(fd, spec.num_bytes, spec.begin, file))

    return Contents(specs, notes + said, take_extra_states(found, shard, read), versions)


def _read_archive(fd: int, file_bytes: int, file: str) -> tuple[object, dict[str, int]]:
    """Return what the archive's pickle stands for, and where the storages begin that it mentions."""
    archive = Archive(fd, file_bytes, file=file)
    prefix, records = archive.prefix, archive.records
    pickled = f"{prefix}/data.pkl"
    if f"{prefix}/constants.pkl" in records:
        raise UnsupportedFormatError("a TorchScript archive", file=file, hint="Save the module's state_dict instead")
    if pickled not in records or f"{prefix}/version" not in records:
        raise UnsupportedFormatError("a zip archive, but not one of torch.save", file=file, expected=pickled)
    if records[pickled].num_bytes > MAX_PICKLE_BYTES:
        _refuse(
            "the pickle is too long", file, f"at most {MAX_PICKLE_BYTES} bytes", f"{records[pickled].num_bytes} bytes"
        )
    _check_small_records(archive, file)
    try:
        value, end, storages = read_pickle(archive.read(pickled), file=file)
    except EndOfDataError as exc:
        raise HeaderError("the pickle has no end", file=file, hint="The file is damaged: fetch it again") from exc
    if end != records[pickled].num_bytes:
        _refuse("the pickle is followed by something else", file, f"{records[pickled].num_bytes} bytes", f"{end} bytes")
    begins: dict[str, int] = {}
    for key, storage in storages.items():
        name = f"{prefix}/data/{key}"
        size = _storage_bytes(storage, file)
        found = records[name].num_bytes if name in records else None
        if found != size:
            _refuse(f"the record {name[:100]} is not as long as the pickle says", file, f"{size} bytes", found)
        begins[key] = archive.locate(name)
    return value, begins


def _check_small_records(archive: Archive, file: str) -> None:
    """Check what torch looks at beside the pickle and the storages."""
    prefix = f"{archive.prefix}/"
    for name, record in archive.records.items():
        kind = name.removeprefix(prefix)
        if kind.startswith("data/"):
            continue
        archive.locate(name)
        if kind == "byteorder" and (record.num_bytes != 6 or archive.read(name) != b"little"):
            raise UnsupportedFormatError(
                "the file's numbers are not little-endian", file=file, hint="Save it again here"
            )
        if kind in _NUMBERS and (record.num_bytes > 16 or not archive.read(name).strip().isdigit()):
            _refuse(f"the record {name} is not a number", file, None, None)
        if kind == _LOGGED and (record.num_bytes > 100 or not archive.read(name).isascii()):
            _refuse(f"the record {name} is not what torch writes there", file, "40 digits", None)


def _read_old(fd: int, file_bytes: int, file: str) -> tuple[object, dict[str, int]]:
    """Return what the file's pickle stands for, and where the storages begin: they follow the pickles, in this order."""
    system, value, storages, keys, position = _read_old_pickles(fd, file_bytes, file)
    if not isinstance(system, dict) or cast("dict[object, object]", system).get("little_endian") is not True:
        raise UnsupportedFormatError("the file's numbers are not little-endian", file=file, hint="Save it again here")
    listed = cast("list[object]", keys) if isinstance(keys, list) else []
    if len(listed) != len(storages) or not all(isinstance(key, str) and key in storages for key in listed):
        _refuse("the list of storages is not that of the pickle", file, f"{len(storages)} keys", f"{len(listed)}")
    begins: dict[str, int] = {}
    for key in cast("list[str]", listed):
        storage = storages[key]
        if storage.is_untyped:  # torch writes it, and cannot read it
            raise UnsupportedFormatError("an untyped storage in the older layout", file=file, hint="Save it again")
        if position + 8 > file_bytes:
            _refuse("the file is truncated", file, f"{position + 8} bytes or more", f"{file_bytes} bytes")
        count = int.from_bytes(read_exactly(fd, 8, position, file), "little")
        if count != storage.num_elements:
            _refuse(f"the storage {key[:100]} has another length", file, f"{storage.num_elements} elements", count)
        begins[key] = position + 8
        position += 8 + _storage_bytes(storage, file)
    if position != file_bytes or len(begins) != len(listed):
        _refuse("the file is truncated, or longer than it says", file, f"{position} bytes", f"{file_bytes} bytes")
    return value, begins


def _read_old_pickles(fd: int, file_bytes: int, file: str) -> tuple[object, object, dict[str, Storage], object, int]:
    """Return about the writer's machine, what was saved, its storages, the list of their keys, and where that ends."""
    length = _FIRST_BYTES
    while True:  # nothing says how long the pickles are
        raw = read_exactly(fd, min(length, file_bytes), 0, file)
        try:
            system, position, _ = read_pickle(raw, len(_OLD), file=file, is_old=True, most_opcodes=_MOST_ABOUT_SYSTEM)
            value, position, storages = read_pickle(raw, position, file=file, is_old=True)
            keys, position, _ = read_pickle(raw, position, file=file, is_old=True, most_opcodes=_MOST_OF_KEYS)
        except EndOfDataError as exc:
            if length >= min(file_bytes, MAX_PICKLE_BYTES):
                raise HeaderError(
                    "the pickles have no end",
                    file=file,
                    expected=f"at most {MAX_PICKLE_BYTES} bytes",
                    hint="The file is damaged: fetch it again",
                ) from exc
            length = MAX_PICKLE_BYTES  # at once: what has been read is read again
            continue
        return system, value, storages, keys, position


def _storage_bytes(storage: Storage, file: str) -> int:
    if storage.is_untyped:
        return storage.num_elements
    if storage.dtype not in DTYPE_BITS:
        raise UnsupportedFormatError("a storage of a dtype that cannot be loaded", file=file, actual=storage.dtype)
    return storage.num_elements * DTYPE_BITS[storage.dtype] // 8


def _find_tensors(value: object, file: str) -> tuple[dict[str, PickledTensor], dict[str, object], list[str], object]:
    """Return the state dict: the one that trainers put under a name of its own, or the whole.

    Its tensors, its extra state that is no tensor, sentences about the rest, and what is said of its modules.
    """
    if not isinstance(value, dict):
        raise UnsupportedFormatError("not a dict of tensors", file=file, actual=type(value).__name__)
    whole = cast("dict[object, object]", value)
    for key in _STATE_KEYS:
        found = whole.get(key)
        if isinstance(found, dict):
            inner = cast("dict[object, object]", found)
            tensors = _tensors_of(inner)
            if tensors:
                extras = _extras_of(inner)
                taken = tensors.keys() | extras.keys()
                notes = _left_out(file, key, whole, {key})
                notes += _left_out(file, None, inner, taken, extras)
                return _named(tensors, file), extras, notes, _metadata_of(inner)
    tensors, extras = _tensors_of(whole), _extras_of(whole)
    if not tensors and not extras and whole:
        raise UnsupportedFormatError(
            "no tensors are in the dict, nor in one inside it with a usual name",
            file=file,
            expected="name -> tensor, there or under " + ", ".join(_STATE_KEYS),
            actual=some(whole),
            hint="Save the state_dict alone",
        )
    notes = _left_out(file, None, whole, tensors.keys() | extras.keys(), extras)
    return _named(tensors, file), extras, notes, _metadata_of(whole)


def _metadata_of(state: object) -> object:
    return state.metadata if isinstance(state, PickledDict) else None


def _extras_of(found: dict[object, object]) -> dict[str, object]:
    return {
        key: value
        for key, value in found.items()
        if isinstance(key, str) and is_extra_state(key) and not isinstance(value, PickledTensor)
    }


def _tensors_of(found: dict[object, object]) -> dict[object, PickledTensor]:
    return {key: value for key, value in found.items() if isinstance(value, PickledTensor)}


def _named(tensors: Mapping[object, PickledTensor], file: str) -> dict[str, PickledTensor]:
    for key in tensors:
        if not isinstance(key, str):
            raise UnsupportedFormatError("a tensor's name is not a string", file=file, actual=repr(key))
    return cast("dict[str, PickledTensor]", dict(tensors))


def _left_out(
    file: str, inside: str | None, whole: Mapping[object, object], taken: Collection[object], extras: Iterable[str] = ()
) -> list[str]:
    rest = [key for key in whole if key not in taken]
    said = f"taken from under {inside!r} in {file}" if inside is not None else file
    if rest:
        said += f"; left out, as they are no tensors: {some(rest)}"
    if extras:
        said += f"; for modules alone, as it is no tensor: {some(extras)}"
    return [f"format: {said}"] if rest or extras or inside is not None else []


def _describe(name: str, tensor: PickledTensor, begins: dict[str, int], file: str, shard: int) -> TensorSpec:
    """Turn what a pickle says about a tensor into the bytes that it is, and check that they are the storage's."""
    dtype, shape, storage = tensor.dtype, tensor.shape, tensor.storage
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise UnsupportedFormatError("a dtype that cannot be loaded", file=file, tensor=name, actual=dtype)
    if not storage.is_untyped and storage.dtype != dtype:
        _refuse("the tensor has another dtype than its storage", file, storage.dtype, dtype, name)
    itemsize = 1 if dtype == "F4" else bits // 8
    if len(shape) != len(tensor.stride) or math.prod(shape) * itemsize > _MAX_INT:
        _refuse("shape and strides do not fit each other, or overflow", file, None, str(shape[:8]), name)
    span = 0
    if 0 not in shape:
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, tensor.stride, strict=True))
    available = storage.num_elements // itemsize if storage.is_untyped else storage.num_elements
    if tensor.offset + span > available:
        _refuse("the tensor is not inside its storage", file, f"{available} elements", tensor.offset + span, name)
    begin = begins[storage.key] + tensor.offset * itemsize
    stride = None if _is_contiguous(shape, tensor.stride) else tensor.stride
    if dtype == "F4" and shape:  # two to an element of torch's
        shape = (*shape[:-1], shape[-1] * 2)
    return TensorSpec(name, dtype, shape, shard, begin, begin + span * itemsize, stride)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return 0 in shape
        expected *= size
    return True


def _refuse(what: str, file: str, expected: object, actual: object, tensor: str | None = None) -> NoReturn:
    raise HeaderError(what, file=file, tensor=tensor, expected=expected, actual=actual, hint="Fetch the file again")
