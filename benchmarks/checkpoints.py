"""The checkpoints that the measurements load, and the models that they fit.

`SMALL`: 46,000 tensors of 16 KiB in 3 shards, 0.75 GB, in 69,000 modules: a mixture of experts kept apart. `LARGE`: 200
tensors of 12.8 MB in 5 shards, 2.56 GB. `LLAMA`: a dense model that transformers builds itself. All are bfloat16 with
random bits, and are written without any loader's help: `verify` compares what was loaded with the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

__all__ = ["LARGE", "LLAMA", "SMALL", "Recipe", "build", "shards_of", "write"]

_PIECE_BYTES = 64 * 2**20
_TENSORS_PER_LAYER = 1000
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a checkpoint holds.

    Attributes:
        name: of its folder, with the numbers below.
        family: `experts`: `count` matrices of `rows` x `columns`, in pairs, 1,000 a layer. `llama`: a Llama of `count`
            layers, `columns` wide, with a feed-forward of `rows`.
        num_shards: in how many files.
    """

    name: str
    count: int
    rows: int
    columns: int
    num_shards: int
    family: Literal["experts", "llama"] = "experts"

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.count}x{self.rows}x{self.columns}-{self.num_shards}"


SMALL = Recipe("small", 46_000, 128, 64, 3)
LARGE = Recipe("large", 200, 2500, 2560, 5)
LLAMA = Recipe("llama", 12, 5632, 2048, 3, family="llama")


class _Matrix(nn.Module):
    """A linear layer's tensor, without the initialisation, which would take longer than the rest of the program."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=torch.bfloat16, device=device))


def _experts(recipe: Recipe) -> Iterator[tuple[int, int, str, tuple[int, int]]]:
    """Yield layer, expert, name and shape of each matrix."""
    for number in range(recipe.count):
        layer, place = divmod(number, _TENSORS_PER_LAYER)
        if place % 2:
            yield layer, place // 2, "down", (recipe.columns, recipe.rows)
        else:
            yield layer, place // 2, "up", (recipe.rows, recipe.columns)


def build(recipe: Recipe, device: torch.device | str = "meta") -> nn.Module:
    """Return the model of a recipe; on another device than meta, its memory has been written to."""
    target = torch.device(device)
    if recipe.family == "llama":
        return _llama(recipe)[1].to_empty(device=target)
    model = nn.Module()
    model.layers = nn.ModuleList()
    for layer, expert, name, shape in _experts(recipe):
        if layer == len(model.layers):
            model.layers.append(nn.Module())
            model.layers[layer].experts = nn.ModuleList()
        experts = model.layers[layer].experts
        assert isinstance(experts, nn.ModuleList)
        if expert == len(experts):
            experts.append(nn.Module())
        experts[expert].add_module(name, _Matrix(shape, target))
    if target.type != "meta":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    return model


def _llama(recipe: Recipe) -> tuple[Any, nn.Module]:
    """Return transformers' configuration of the model, and the model on meta."""
    transformers: Any = import_module("transformers")
    config = transformers.LlamaConfig(
        hidden_size=recipe.columns,
        intermediate_size=recipe.rows,
        num_hidden_layers=recipe.count,
        num_attention_heads=recipe.columns // 64,
        num_key_value_heads=max(1, recipe.columns // 256),
        vocab_size=32_000,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model: nn.Module = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    return config, model


def write(recipe: Recipe, folder: Path) -> Path:
    """Write the checkpoint into a folder of its own below `folder`, unless it is there; return it."""
    target = folder / recipe.folder
    if (target / INDEX).exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    if recipe.family == "llama":
        config, model = _llama(recipe)
        (target / "config.json").write_text(config.to_json_string())
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    else:
        shapes = {f"layers.{layer}.experts.{e}.{name}.weight": shape for layer, e, name, shape in _experts(recipe)}
    try:
        _write_shards(target, shapes, recipe.num_shards)
    except OSError:
        for shard in shards_of(target):  # a disk that is full stays so otherwise
            shard.unlink()
        raise
    return target


def _write_shards(target: Path, shapes: Mapping[str, Sequence[int]], num_shards: int) -> None:
    """Share the tensors out among the shards as they come; inside a shard they lie by name, as safetensors sorts them."""
    random = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    names = list(shapes)
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[number * len(names) // num_shards : (number + 1) * len(names) // num_shards]
        _write_shard(target / file, {name: shapes[name] for name in sorted(part)}, random)
        weight_map |= dict.fromkeys(part, file)
    whole = target / f"{INDEX}.part"
    whole.write_text(
        json.dumps({"metadata": {"total_size": 2 * sum(map(_numel, shapes.values()))}, "weight_map": weight_map})
    )
    whole.rename(target / INDEX)  # the index comes last: where it is, everything is


def _write_shard(path: Path, shapes: Mapping[str, Sequence[int]], random: np.random.Generator) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * _numel(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for position in range(0, end, _PIECE_BYTES):
            stream.write(random.bytes(min(_PIECE_BYTES, end - position)))
        stream.flush()
        os.fsync(stream.fileno())  # the page cache keeps what has not been written


def _numel(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def shards_of(path: Path) -> list[Path]:
    """Return the shards of a checkpoint that `write` has written, in order."""
    return sorted(path.glob("*.safetensors"))
