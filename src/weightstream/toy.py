"""The demo's model and checkpoint: the shape of a mixture-of-experts language model, filled with random bytes.

The checkpoint is written by hand and read back through safetensors, so that neither side of the comparison is ours.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightstream.building import target_device
from weightstream.display import MeterUpdate

__all__ = ["build_on_meta", "checkpoint_bytes", "differences", "is_complete", "start_device", "write_checkpoint"]

#: It comes without types.
safetensors: Any = import_module("safetensors")

#: In all 3,187 tensors and 558 MB: many small ones, some large ones, two dtypes.
_NUM_LAYERS = 16
_NUM_EXPERTS = 64
_HIDDEN = 1024
_EXPERT_HIDDEN = 64
_VOCABULARY = 4096

_SHARD_BYTES = 128 * 2**20
_BLOCK_BYTES = 8 * 2**20
_SEED = 20_240_229
#: Changes with what is written, so that checkpoints of other versions are not taken for this one's.
_RECIPE = "weightstream demo 1"
_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
_INDEX = "model.safetensors.index.json"


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = _linear(_HIDDEN, _EXPERT_HIDDEN)
        self.up_proj = _linear(_HIDDEN, _EXPERT_HIDDEN)
        self.down_proj = _linear(_EXPERT_HIDDEN, _HIDDEN)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(_HIDDEN, dtype=torch.float32)
        self.attention = nn.ModuleDict({name: _linear(_HIDDEN, _HIDDEN) for name in ("query", "key", "value", "out")})
        self.expert_norm = nn.RMSNorm(_HIDDEN, dtype=torch.float32)
        self.router = nn.Linear(_HIDDEN, _NUM_EXPERTS, bias=False, dtype=torch.float32)
        self.experts = nn.ModuleList(_Expert() for _ in range(_NUM_EXPERTS))


class _Model(nn.Module):
    """Never run: only its shape matters here."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _HIDDEN, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(_Layer() for _ in range(_NUM_LAYERS))
        self.norm = nn.RMSNorm(_HIDDEN, dtype=torch.float32)
        self.head = _linear(_HIDDEN, _VOCABULARY)


def build_on_meta() -> nn.Module:
    """Build the model without memory for its parameters."""
    with torch.device("meta"):
        return _Model()


def start_device(target: str) -> str:
    """Start the driver of the device that the demo will use, which is no part of loading; return the device's name."""
    device = target_device(target)
    torch.empty(1, device=device)
    return str(device)


def _shards(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of each shard, in the order of the model."""
    groups: list[dict[str, torch.Tensor]] = [{}]
    num_bytes = 0
    for name, tensor in model.state_dict().items():
        if num_bytes + tensor.nbytes > _SHARD_BYTES and groups[-1]:
            groups.append({})
            num_bytes = 0
        groups[-1][name] = tensor
        num_bytes += tensor.nbytes
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": group for number, group in enumerate(groups, 1)}


def _header(tensors: dict[str, torch.Tensor]) -> bytes:
    entries: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sizes(model: nn.Module) -> dict[str, int]:
    return {
        file: len(_header(tensors)) + sum(tensor.nbytes for tensor in tensors.values())
        for file, tensors in _shards(model).items()
    }


def checkpoint_bytes(model: nn.Module) -> int:
    """Return what the checkpoint takes on disk, its index included."""
    return sum(_sizes(model).values()) + len(_index(model))


def _index(model: nn.Module) -> bytes:
    weight_map = {name: file for file, tensors in _shards(model).items() for name in tensors}
    metadata = {"total_size": sum(tensor.nbytes for tensor in model.state_dict().values()), "recipe": _RECIPE}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1).encode()


def is_complete(model: nn.Module, folder: Path) -> bool:
    """Tell whether the checkpoint is there as this version writes it."""
    try:
        return (folder / _INDEX).read_bytes() == _index(model) and all(
            (folder / file).stat().st_size == num_bytes for file, num_bytes in _sizes(model).items()
        )
    except OSError:
        return False


def write_checkpoint(model: nn.Module, folder: Path, update: MeterUpdate) -> None:
    """Write shards of random bytes, always the same ones, and their index.

    Raises:
        OSError: it cannot be written.
    """
    generator = torch.Generator().manual_seed(_SEED)
    block = bytearray(_BLOCK_BYTES)
    numbers = torch.frombuffer(block, dtype=torch.int64)
    total = sum(_sizes(model).values())
    done = 0
    for file, tensors in _shards(model).items():
        left = sum(tensor.nbytes for tensor in tensors.values())
        with (folder / file).open("xb") as shard:
            done += shard.write(_header(tensors))
            while left:
                numbers.random_(generator=generator)
                written = shard.write(memoryview(block)[: min(left, _BLOCK_BYTES)])
                left -= written
                done += written
                update(total, done)
    (folder / _INDEX).write_bytes(_index(model))


def differences(model: nn.Module, folder: Path, update: MeterUpdate) -> list[str]:
    """Compare a loaded model with its checkpoint, byte by byte.

    Returns:
        The names of tensors that differ, or that only one of the two has.
    """
    state = model.state_dict()
    total = sum(tensor.nbytes for tensor in state.values())
    done = 0
    wrong: list[str] = []
    for file in _shards(model):
        with _one_thread(), safetensors.safe_open(folder / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - it is no mapping
                expected: torch.Tensor = shard.get_tensor(name)
                loaded = state.pop(name, None)
                if loaded is None or not _same_bytes(loaded, expected):
                    wrong.append(name)
                done += expected.nbytes
                update(total, done)
    return wrong + list(state)


@contextmanager
def _one_thread() -> Generator[None, None, None]:
    """Keep torch from sharing out each small comparison: seen to take 11 s instead of 0.5 s on two busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _same_bytes(loaded: torch.Tensor, expected: torch.Tensor) -> bool:
    if loaded.is_meta or loaded.dtype != expected.dtype or loaded.shape != expected.shape:
        return False
    return torch.equal(loaded.cpu().view(torch.uint8), expected.view(torch.uint8))
