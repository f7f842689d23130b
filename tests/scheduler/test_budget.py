"""Errors about `prefetch.host_memory` name a value with which the same load succeeds, and no larger one than it takes."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from tests.builders import assert_same, write_in_order
from tests.fakes.rig import KIB, Rig
from weightstream.errors import MemoryBudgetError
from weightstream.prefetch.ring import slot_bytes_for

MakeRig = Callable[..., Rig]

CHUNK = 64 * KIB
WIDTH = 130

#: What the configuration allows.
LEAST = 2 * slot_bytes_for(CHUNK)


def plain(where: str) -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, device=where) for _ in range(4)))


def loading_themselves(where: str) -> nn.Module:
    return nn.Sequential(*(nn.BatchNorm1d(WIDTH * WIDTH, device=where) for _ in range(3)), nn.Linear(WIDTH, WIDTH))


def tied_twice(where: str) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, device=where) for _ in range(6)))
    for number in range(3):
        cast("Any", model[number + 3]).weight = cast("Any", model[number]).weight
    return model


def strided(where: str) -> nn.Module:
    return nn.ParameterList(nn.Parameter(torch.zeros(WIDTH, 2 * WIDTH, device=where).t()) for _ in range(3))


def in_one_memory(where: str) -> nn.Module:
    whole = torch.zeros(4 * WIDTH, WIDTH, device=where)
    return nn.ParameterList(
        [nn.Parameter(whole), *(nn.Parameter(whole[i * WIDTH : (i + 1) * WIDTH]) for i in range(4))]
    )


def halves(where: str) -> nn.Module:
    return plain(where).to(torch.bfloat16)


KINDS = [plain, loading_themselves, tied_twice, strided, in_one_memory, halves]


def tensors_for(model: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        number = torch.arange(tensor.numel()).remainder(WIDTH * WIDTH).reshape(tensor.shape)  # alike in shared memory
        found[name] = number.to(torch.float32 if tensor.is_floating_point() else tensor.dtype)
    return found


MACHINES = pytest.mark.parametrize(
    ("device", "io"), [("host", "buffered"), ("host", "direct"), ("fake", "buffered")], ids=["host", "direct", "fake"]
)


async def load_with_the_value_named(load: Callable[[int], Awaitable[None]]) -> None:
    try:
        await load(LEAST)
    except MemoryBudgetError as error:
        (value,) = re.findall(r"Set prefetch.host_memory to (\d+) bytes", str(error))
    else:
        return
    with pytest.raises(MemoryBudgetError):
        await load(int(value) - 1)
    await load(int(value))


@pytest.mark.parametrize("device", ["host", "fake"])
@pytest.mark.parametrize("strategy", ["stream", "preload", "direct", "auto"])
@pytest.mark.parametrize("make", KINDS)
async def test_with_the_value_named_the_load_succeeds(
    make_rig: MakeRig, tmp_path: Path, make: Callable[[str], nn.Module], strategy: str, device: str
) -> None:
    """Of several loads at once somebody else may have taken what there is; here one is alone."""
    rig = make_rig(device, io="direct" if strategy == "preload" else "buffered")
    tensors = tensors_for(make("cpu"))
    path = write_in_order(tmp_path, tensors)

    for commit in ("progressive", "atomic"):

        async def load(host_memory: int) -> None:
            model = make("cpu")
            async with rig.loader(chunk=CHUNK, host_memory=host_memory, strategy=strategy, commit=commit) as loader:  # noqa: B023 (called here)
                await loader.load(model, path)
            for name, tensor in model.state_dict().items():
                assert_same(tensor, tensors[name].to(tensor.dtype))

        await load_with_the_value_named(load)


@MACHINES
@pytest.mark.parametrize("strategy", ["stream", "preload", "direct", "auto"])
async def test_with_the_value_named_a_consumer_gets_every_tensor(
    make_rig: MakeRig, tmp_path: Path, strategy: str, device: str, io: str
) -> None:
    rig = make_rig(device, io=io)
    tensors = {"large": torch.rand(500, 100), "small": torch.rand(7), "other": torch.rand(100, 100)}
    path = write_in_order(tmp_path, tensors)

    async def load(host_memory: int) -> None:
        async with rig.loader(chunk=CHUNK, host_memory=host_memory, strategy=strategy) as loader:
            found = {name: tensor.clone() async for name, tensor in loader.stream(path)}
        assert found.keys() == tensors.keys()

    await load_with_the_value_named(load)
