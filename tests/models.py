"""Models for tests, with what the loader treats in different ways: small and large, tied, in odd dtypes."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["SmallNet", "tensors_of"]


class SmallNet(nn.Module):
    """Small tensors, one with storage of its own (1 MiB or more), a scalar, an empty one, and an odd offset."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, width: int = 40, large: bool = True) -> None:
        super().__init__()
        self.flag = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)  # nothing behind it is aligned
        self.embed = nn.Embedding(50, width, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(3))
        self.large = nn.Linear(1, 270_000 if large else 300, bias=False, dtype=dtype)
        self.scale = nn.Parameter(torch.zeros((), dtype=dtype))
        self.nothing = nn.Parameter(torch.zeros(0, 4, dtype=dtype))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def tensors_of(model: nn.Module, *, dtype: torch.dtype | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random values for every tensor that a checkpoint of the model holds, floats in another dtype if asked for."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(dtype or tensor.dtype)
        else:
            values = torch.randint(100, tensor.shape, generator=generator).to(tensor.dtype)
        tensors[name] = values
    return tensors
