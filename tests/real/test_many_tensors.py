"""A mixture-of-experts model of more than 46,000 parameters arrives whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.builders import write_checkpoint
from tests.real.conftest import Target

NUM_LAYERS, NUM_EXPERTS = 48, 320


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(2, 3, dtype=torch.bfloat16))
        self.up = nn.Parameter(torch.empty(2, 3, dtype=torch.bfloat16))
        self.down = nn.Parameter(torch.empty(3, 2, dtype=torch.bfloat16))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(5))
        self.router = nn.Parameter(torch.empty(NUM_EXPERTS, 3))
        self.experts = nn.ModuleList(Expert() for _ in range(NUM_EXPERTS))


def build() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(Layer() for _ in range(NUM_LAYERS)))


@pytest.fixture(scope="module", name="checkpoint")
def fixture_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in build().state_dict().items()}
    numbers = torch.arange(sum(shape.numel() for shape, _ in shapes.values()), dtype=torch.int32)
    parts = torch.split(numbers, [shape.numel() for shape, _ in shapes.values()])
    tensors = {
        name: (part * 97 % 30_011).to(dtype).reshape(shape)
        for (name, (shape, dtype)), part in zip(shapes.items(), parts, strict=True)
    }
    return write_checkpoint(tmp_path_factory.mktemp("many") / "model", tensors, num_shards=5)


async def test_model_of_46_000_parameters_is_bit_equal(checkpoint: Path, target: Target) -> None:
    model = build()
    report = await target.fill(model, checkpoint)
    assert report.num_tensors == NUM_LAYERS * (2 + 3 * NUM_EXPERTS) > 46_000
    assert report.num_shards == 5
    state = model.state_dict()
    found = torch.cat([tensor.reshape(-1).float() for tensor in state.values()]).cpu()
    numbers = torch.arange(found.numel(), dtype=torch.int32) * 97 % 30_011
    types = torch.cat([torch.full((tensor.numel(),), tensor.dtype is torch.bfloat16) for tensor in state.values()])
    assert torch.equal(found, torch.where(types, numbers.bfloat16().float(), numbers.float()))
