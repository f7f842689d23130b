"""A program: loads a checkpoint in a process that has done nothing else, and prints what memory that took.

    python fresh_process.py HOW CHECKPOINT CONFIG

HOW: `model` (on meta), `allocated` (a model with storage), `iter_tensors`, `stream` or `warm`. CONFIG: a `LoaderConfig`, as JSON. What is printed is JSON too, in bytes.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

import weightstream as ws
from weightstream.prefetch.checkpoint import open_checkpoint


def memory_bytes(field: str) -> int:
    """A line of /proc/self/status: VmRSS, or VmHWM, its highest value since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def model_for(path: str, device: str) -> nn.Module:
    """A model that has exactly the checkpoint's tensors: on meta, or of ones, so that its memory is there."""
    model = nn.Module()
    with open_checkpoint(path) as checkpoint:
        for name, spec in checkpoint.tensors.items():
            model.register_parameter(name, nn.Parameter(torch.ones(spec.shape, device=device)))
    return model


def consume(tensor: torch.Tensor) -> int:
    """Do something that takes longer than reading, so that readers would run ahead if nothing held them back."""
    hashlib.sha256(tensor.view(-1).numpy().data).digest()
    return tensor.nbytes


async def stream(path: str, config: ws.LoaderConfig) -> int:
    num_bytes = 0
    async with ws.Loader(config) as loader:
        async for _, tensor in loader.stream(path):
            num_bytes += consume(tensor)
    return num_bytes


async def warm(path: str, config: ws.LoaderConfig) -> int:
    async with ws.Loader(config) as loader:
        return (await loader.warm(path)).num_bytes


def load(how: str, path: str, config: ws.LoaderConfig, model: nn.Module | None) -> int:
    """Load, and return how many bytes went through."""
    if model is not None:
        return ws.load_sync(model, path, config=config).num_bytes
    if how == "iter_tensors":
        return sum(consume(tensor) for _, tensor in ws.iter_tensors(path, config))
    return asyncio.run((stream if how == "stream" else warm)(path, config))


def main() -> None:
    how, path, text = sys.argv[1:]
    config = ws.LoaderConfig.model_validate_json(text)
    devices = {"model": "meta", "allocated": "cpu"}
    model = model_for(path, devices[how]) if how in devices else None
    asyncio.run(asyncio.sleep(0))
    _ = ws.Loader, ws.load_sync  # imported here, not in the load
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; ru_maxrss cannot be reset and lies after a fork
    before = memory_bytes("VmRSS")
    loaded = load(how, path, config, model)
    peak = memory_bytes("VmHWM")
    after = memory_bytes("VmRSS")
    held = sum(parameter.nbytes for parameter in model.parameters()) if model is not None else 0
    found = {"peak_bytes": peak - before, "loaded_bytes": loaded, "held_bytes": held, "after_bytes": after - before}
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
