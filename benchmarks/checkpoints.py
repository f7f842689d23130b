"""The checkpoints that the measurements load, and the models that they fit.

`small`: 46,000 tensors of 16 KiB in 3 shards, 0.75 GB, in 69,000 modules: a mixture of experts kept apart.
`large`: 200 tensors of 12.8 MB in 5 shards, 2.56 GB.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

__all__ = ["build", "write"]


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)
        self.down = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)


def _small() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList()
    for _ in range(46):
        layer = nn.Module()
        layer.experts = nn.ModuleList(_Expert() for _ in range(500))
        model.layers.append(layer)
    return model


def _large() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(2560, 2500, bias=False, dtype=torch.bfloat16) for _ in range(200))
    return model


_KINDS = {"small": (_small, 3), "large": (_large, 5)}


def build(kind: str) -> nn.Module:
    """Return the model of a kind, on meta."""
    with torch.device("meta"):
        return _KINDS[kind][0]()


def write(kind: str, folder: Path) -> Path:
    """Write the checkpoint of a kind into a folder of its own below `folder`, unless it is there; return it."""
    target = folder / kind
    index = target / "model.safetensors.index.json"
    if index.exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    num_shards = _KINDS[kind][1]
    parameters = list(build(kind).named_parameters())
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    per_shard = -(-len(parameters) // num_shards)
    for shard in range(num_shards):
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = parameters[shard * per_shard : (shard + 1) * per_shard]
        tensors = {
            key: torch.randint(-(2**15), 2**15, tensor.shape, dtype=torch.int16, generator=generator).view(tensor.dtype)
            for key, tensor in part
        }
        save_file(tensors, target / name)
        weight_map.update(dict.fromkeys(tensors, name))
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target
