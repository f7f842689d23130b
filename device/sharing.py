"""Which tensors of a model share memory with others without being the same tensor: views of one another.

Reads addresses; changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["find_sharing", "length_in_memory"]


def find_sharing(tensors: Sequence[torch.Tensor], lengths: Sequence[int]) -> set[int]:
    """Return the indices of tensors whose memory may overlap that of another one.

    Args:
        tensors: strided ones.
        lengths: of the memory of each, in bytes, from its first element to its last. Tensors that lie in each other's
            gaps are found too.
    """
    addresses = [tensor.data_ptr() for tensor in tensors]
    found: set[int] = set()
    furthest = owner = -1
    for index in sorted(range(len(addresses)), key=addresses.__getitem__):
        begin, length = addresses[index], lengths[index]
        if not length:
            continue
        if begin < furthest:
            found |= {owner, index}
        if begin + length > furthest:
            furthest, owner = begin + length, index
    return found


def length_in_memory(tensor: torch.Tensor) -> int:
    """Return the distance in bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
