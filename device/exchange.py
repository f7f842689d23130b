"""Exchanging what is behind two tensors, while both stay the objects that they are."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

__all__ = ["exchange"]

#: What `torch.utils.swap_tensors` is made of: storage, sizes, dtype, device and what autograd knows change places; class,
#: attributes and every reference that somebody holds stay. One call for each of 46,000 parameters, so nothing around it.
exchange = cast(
    "Callable[[torch.Tensor, torch.Tensor], None]",
    torch._C._swap_tensor_impl,  # pyright: ignore[reportUnknownMemberType]
)
