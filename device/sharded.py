"""Tensors that are split over several devices: torch's DTensor, of which each process has a part of its own.

Imports none of torch.distributed: a model that has such tensors has done so.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, TypeGuard

import torch

from weightstream.errors import PlacementError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["check_sharded", "is_sharded", "local_part", "local_parts", "split_like"]


def _library() -> ModuleType | None:
    return sys.modules.get("torch.distributed.tensor")


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Say whether this is a DTensor."""
    library = _library()
    return library is not None and isinstance(tensor, library.DTensor)


def check_sharded(tensor: DTensor, name: str) -> None:
    """Refuse a DTensor of which no process could say what its part of a checkpoint's tensor is.

    Raises:
        PlacementError: it is on meta, or split in another way than by rows or columns.
    """
    library = _library()
    assert library is not None
    if tensor.device.type == "meta":
        raise PlacementError(
            "the parameter is a DTensor on meta",
            tensor=name,
            expected="local tensors that have storage",
            hint="Call model.to_empty(device=...) before loading",
        )
    for placement in tensor.placements:
        if type(placement) not in (library.Shard, library.Replicate):
            raise PlacementError(
                "the parameter is a DTensor that is split in a way that cannot be loaded",
                tensor=name,
                expected="Shard or Replicate",
                actual=repr(placement),
            )


def split_like(tensor: DTensor, whole: torch.Tensor) -> DTensor:
    """Return a whole tensor, split as another is: of it, this process keeps its own part. Talks to no other process."""
    library = _library()
    assert library is not None
    split: DTensor = library.distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return split


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the storage that a DTensor has here; of any other tensor, itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_parts(tensor: DTensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the storage that a DTensor has here, and what of a whole tensor belongs there."""
    return tensor.to_local(), split_like(tensor, whole).to_local()
