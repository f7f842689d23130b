"""Kinds of tensors that cannot be loaded, or would lose something: refused by name, before anything moves."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from weightstream.device.sharded import check_sharded, is_sharded
from weightstream.errors import PlacementError

__all__ = ["PLAIN", "check_kind", "refuse_hooks"]

#: Classes of tensors about which nothing is to be asked.
PLAIN = (nn.Parameter, torch.Tensor)

#: Methods of `torch.Tensor` that classes override if their storage is of a kind of its own.
_OWN_STORAGE = ("__torch_dispatch__", "to", "cuda", "cpu")


def check_kind(tensor: torch.Tensor, name: str) -> None:
    """Refuse tensors whose storage is not plain memory; subclasses that only add attributes or methods are fine.

    A class that says itself how it is dispatched (torchao) or moved to a device (bitsandbytes quantises then) stores
    something else than what it looks like, or will.
    """
    kind = type(tensor)
    if is_sharded(tensor):
        check_sharded(tensor, name)
        return
    if is_lazy(tensor):
        raise PlacementError(
            "the parameter has no shape yet (a lazy module)", tensor=name, hint="Run the module once before loading"
        )
    if any(getattr(kind, method) is not getattr(torch.Tensor, method) for method in _OWN_STORAGE):
        raise PlacementError(
            f"the parameter is a tensor subclass with a storage of its own kind ({kind.__module__}.{kind.__qualname__})",
            tensor=name,
            hint="Load the plain tensor first and wrap or quantise it afterwards",
        )


def refuse_hooks(name: str) -> NoReturn:
    """Refuse a parameter on meta that has gradient hooks: they stay with what it had there."""
    raise PlacementError(
        "the parameter is on meta and has a gradient hook, which would be lost",
        tensor=name,
        hint="Register hooks on parameters after loading",
    )
