"""Exchanging what is behind two tensors, while both stay the objects that they are, and putting back what was there."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self, cast

import torch

from weightstream.device.sharded import is_sharded

__all__ = ["Original", "exchange"]

#: What `torch.utils.swap_tensors` is made of: storage, sizes, dtype, device and what autograd knows change places; class,
#: attributes and every reference that somebody holds stay. One call for each of 46,000 parameters, so nothing around it.
exchange = cast(
    "Callable[[torch.Tensor, torch.Tensor], None]",
    torch._C._swap_tensor_impl,  # pyright: ignore[reportUnknownMemberType]
)


class Original(NamedTuple):
    """What a tensor with storage was: its names, the tensor, the memory that it had, and a copy of what was there."""

    names: list[str]
    tensor: torch.Tensor
    memory: torch.Tensor
    copy: torch.Tensor

    @classmethod
    def of(cls, names: list[str], tensor: torch.Tensor) -> Self:
        """Make a copy of a tensor as it is."""
        memory = tensor.detach()
        return cls(names, tensor, memory, memory.clone())

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the tensor what it was, also where a hook has given it other memory (`tensor.data = ...`)."""
        self.memory.copy_(self.copy)
        tensor, memory = self.tensor, self.memory
        is_other = (tensor.dtype, tensor.shape, tensor.device) != (memory.dtype, memory.shape, memory.device)
        if is_other or (not is_sharded(tensor) and tensor.data_ptr() != memory.data_ptr()):
            tensor.data = memory
