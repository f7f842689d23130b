"""Checkpoints for tests, good ones and broken ones, as real files; and what a process holds while they are loaded."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from weightstream.prefetch.header import DTYPE_BITS

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

#: torch's dtypes as the format names them.
FORMAT_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.complex64: "C64",
}


# Files


def entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, object]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def raw_file(header: bytes | str | Mapping[str, object], data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header at all; `length` is what its first 8 bytes say instead."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A file as the safetensors package writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def write_index(folder: Path, weight_map: Mapping[str, str], name: str = INDEX) -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path


def shard_name(number: int, num_shards: int) -> str:
    return f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"


def write_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], *, num_shards: int = 1) -> Path:
    """A folder with one file, or with several and their index; each shard gets the next few tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    if num_shards == 1:
        write_shard(folder / SINGLE, tensors)
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        part = names[number * len(names) // num_shards : (number + 1) * len(names) // num_shards]
        file = shard_name(number, num_shards)
        write_shard(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_sparse(path: Path, tensors: Iterable[tuple[str, str, Sequence[int]]]) -> Path:
    """A file of zeros that takes no room on the disk: (name, dtype, shape) of its tensors, in order."""
    header: dict[str, object] = {}
    position = 0
    for name, dtype, shape in tensors:
        size = DTYPE_BITS[dtype] // 8
        for n in shape:
            size *= n
        header[name] = entry(dtype, shape, position, position + size)
        position += size
    raw = raw_file(header)
    path.write_bytes(raw)
    os.truncate(path, len(raw) + position)
    return path


def write_in_order(folder: Path, tensors: Mapping[str, torch.Tensor], *, num_shards: int = 1) -> Path:
    """As `write_checkpoint`, but tensors lie in the order given, one behind the other, aligned to nothing.

    The safetensors package sorts them; the format asks for neither that nor for alignment. Tied tensors are allowed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    items = list(tensors.items())
    for number in range(num_shards):
        file = SINGLE if num_shards == 1 else shard_name(number, num_shards)
        header: dict[str, object] = {}
        parts: list[bytes] = []
        position = 0
        for name, tensor in items[number * len(items) // num_shards : (number + 1) * len(items) // num_shards]:
            part = bytes_of(tensor)
            header[name] = entry(FORMAT_NAMES[tensor.dtype], tensor.shape, position, position + len(part))
            parts.append(part)
            position += len(part)
            weight_map[name] = file
        (folder / file).write_bytes(raw_file(header, b"".join(parts)))
    if num_shards > 1:
        write_index(folder, weight_map)
    return folder


def write_sums(folder: Path, name: str = "SHA256SUMS") -> Path:
    """A manifest of all weights in a folder, as they are now."""
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    ]
    (folder / name).write_text("".join(lines))
    return folder / name


def flip(file: Path, position: int) -> None:
    """Change one bit of one byte of a file; its length and times stay."""
    before = file.stat()
    raw = bytearray(file.read_bytes())
    raw[position] ^= 0x01
    file.write_bytes(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def bytes_of(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, in the order of its elements."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Check shape, dtype and every byte."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert bytes_of(found) == bytes_of(expected)


def random_tensors(
    shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(tuple(shape), generator=generator).to(dtype) for name, shape in shapes.items()}


# What a process holds


def open_files() -> dict[str, str]:
    """This process's descriptors, and what each is of. The one that lists them is left out: it is closed by then."""
    found: dict[str, str] = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = str(Path(f"/proc/self/fd/{fd}").readlink())
        except FileNotFoundError:
            continue
    return found


@contextmanager
def leaves_nothing() -> Generator[None, None, None]:
    """Check that what is done inside leaves no descriptor and none of our threads. What others let go meanwhile is theirs."""
    before = open_files()
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("weightstream"):
            thread.join(5)  # it may be at its last instructions, and close what was kept open for a read
            assert not thread.is_alive(), f"{thread.name} still runs"
    assert open_files().items() <= before.items()


@contextmanager
def unreadable(path: Path) -> Generator[None, None, None]:
    """Make a file or folder of ours unreadable while the context lasts, also for root, and threads started in it."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with obeying_modes():
            yield
    finally:
        path.chmod(mode)


@contextmanager
def obeying_modes() -> Generator[None, None, None]:
    """Take from the calling thread, if it is root's, the capabilities that make modes and owners meaningless (capset(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, the calling thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] = effective & ~0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0
