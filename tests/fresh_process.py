"""A program: loads a checkpoint in a process that has done nothing else, and prints what memory that took.

    python -m tests.fresh_process HOW DEVICE CHECKPOINT CONFIG

HOW: `model` (on meta), `allocated` (a model with storage), `hooked` (the same, whose modules load themselves), `iter_tensors`, `stream` or `warm`. DEVICE: `host`, or `fake`
for an accelerator whose memory is not in this process; not with `iter_tensors`. CONFIG: a `LoaderConfig`, as JSON. What is
printed is JSON too, in bytes.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import nn

import weightstream as ws
from tests.fakes.accelerator import DistantAccelerator
from weightstream.prefetch.checkpoint import open_checkpoint
from weightstream.scheduler.machine import Machine


def memory_bytes(field: str) -> int:
    """A line of /proc/self/status: VmRSS, or VmHWM, its highest value since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def model_for(path: str, device: str, *, hooked: bool) -> nn.Module:
    """A model that has exactly the checkpoint's tensors: on meta, or of ones, so that its memory is there."""
    model = nn.Module()
    with open_checkpoint(path) as checkpoint:
        for name, spec in checkpoint.tensors.items():
            module, _, key = name.rpartition(".")
            owner = nn.Module() if module else model
            owner.register_parameter(key, nn.Parameter(torch.ones(spec.shape, device=device)))
            if module:
                model.add_module(module, owner)
            if hooked:
                register = cast("Callable[..., object]", owner.register_load_state_dict_pre_hook)
                register(lambda *_: None)
    return model


def consume(tensor: torch.Tensor) -> int:
    """Do something that takes longer than reading, so that readers would run ahead if nothing held them back."""
    hashlib.sha256(tensor.view(-1).numpy().data).digest()
    return tensor.nbytes


async def stream(loader: ws.Loader, path: str) -> int:
    return sum([consume(tensor) async for _, tensor in loader.stream(path)])


async def load(how: str, loader: ws.Loader, path: str, model: nn.Module | None, said: list[str]) -> int:
    """Load, and return how many bytes went through. `said`: gets what the report says was decided."""
    async with loader:
        if how == "stream":
            return await stream(loader, path)
        report = await (loader.warm(path) if model is None else loader.load(model, path))
        said += report.decisions
        return report.num_bytes


def main() -> None:
    how, device, path, text = sys.argv[1:]
    config = ws.LoaderConfig.model_validate_json(text)
    devices = {"model": "meta", "allocated": "cpu", "hooked": "cpu"}
    model = model_for(path, devices[how], hooked=how == "hooked") if how in devices else None
    accelerator = DistantAccelerator()
    loader = ws.Loader(config, machine=Machine(open_backend=lambda _: accelerator) if device == "fake" else None)
    asyncio.run(asyncio.sleep(0))
    _ = ws.iter_tensors  # imported here, not in the load
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; ru_maxrss cannot be reset and lies after a fork
    before = memory_bytes("VmRSS")
    said: list[str] = []
    if how == "iter_tensors":
        loaded = sum(consume(tensor) for _, tensor in ws.iter_tensors(path, config))
    else:
        loaded = asyncio.run(load(how, loader, path, model, said))
    peak = memory_bytes("VmHWM")
    after = memory_bytes("VmRSS")
    accelerator.close()
    assert accelerator.hazards == []
    assert (accelerator.num_copies > 0) == (device == "fake")
    held = 0
    if model is not None and device == "host":
        held = sum(parameter.nbytes for parameter in model.parameters())
    found = {"peak_bytes": peak - before, "loaded_bytes": loaded, "held_bytes": held, "after_bytes": after - before}
    for sentence in said:
        if sentence.startswith("preload: "):
            found["slots_bytes"], found["resident_bytes"], found["left_bytes"] = map(int, re.findall(r"\d+", sentence))
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
