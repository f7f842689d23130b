"""Whether a model holds what its checkpoint's files hold: every parameter, every byte. Uses none of the loaders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

__all__ = ["verify"]


def verify(model: nn.Module, shards: Sequence[Path], device: torch.device) -> int:
    """Compare a model's parameters with the files, bit by bit; return how many there are.

    Raises:
        ValueError: one is missing, left over, on another device, or differs in dtype, shape or a bit.
    """
    parameters = dict(model.named_parameters())
    count = len(parameters)
    for name, expected in _stored(shards, device):
        found = parameters.pop(name, None)
        if found is None:
            raise ValueError(f"{name} is in the checkpoint, but not among the model's parameters")
        if found.device.type != device.type:
            raise ValueError(f"{name} is on {found.device}, not on {device}")
        if found.dtype != torch.bfloat16 or list(found.shape) != list(expected.shape):
            raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, not bfloat16 {list(expected.shape)}")
        if not torch.equal(found.detach().view(torch.int16), expected):
            raise ValueError(f"{name} differs from what is in the file")
    if parameters:
        raise ValueError(
            f"{len(parameters)} parameters are not in the checkpoint, the first is {next(iter(parameters))}"
        )
    return count


def _stored(shards: Sequence[Path], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what is stored, on the device, as 16-bit integers: NaNs, which random bits may be, are equal to nothing."""
    for shard in shards:
        with shard.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        content = torch.from_numpy(np.fromfile(shard, dtype=np.int16, offset=8 + length)).to(device)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (offset // 2 for offset in entry["data_offsets"])
                yield name, content[begin:end].view(entry["shape"])
