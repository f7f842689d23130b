"""Claims: which tensors of models running loads are filling, in this whole process.

Two loads into one parameter would mix weights, and the rollback of one would undo what the other has placed. So a load claims
what it fills until it has ended, and another that would fill a part of it is refused, whatever `Loader` it is of. The same
holds for parameters that are not one object and yet lie over the same memory; different parts of one buffer do not.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Generator
from contextlib import contextmanager

import torch

from weightstream.device.placement import Placement
from weightstream.device.sharded import local_part
from weightstream.device.sharing import length_in_memory
from weightstream.errors import PlacementError

__all__ = ["claim", "num_ended"]

#: What a load fills, by the identity of each tensor: its name, and the tensor.
_Claim = dict[int, tuple[str, torch.Tensor]]

_FILLED = "another load has filled this tensor while this one began"

_lock = threading.Lock()
_claims: list[_Claim] = []
_num_ended = 0


def num_ended() -> int:
    """Return how many claims have ended, to be asked before a placement is made; see `claim`."""
    return _num_ended


@contextmanager
def claim(placement: Placement, ended: int) -> Generator[None, None, None]:
    """Have a load fill the tensors of its placement alone.

    Args:
        placement: of the load.
        ended: `num_ended` before the placement was made: another load may have filled its tensors since then.

    Raises:
        PlacementError: another load fills one of them, or has just done so.
    """
    global _num_ended  # noqa: PLW0603 (one for the process)
    claimed: _Claim = {
        id(place.tensor): (place.name, place.tensor) for place in placement.places if place.tensor is not None
    }
    for subtree in filter(placement.wants, placement.subtrees):
        claimed |= {id(target.tensor): (target.name, target.tensor) for target in subtree.all_targets}
    with _lock:
        for other in _claims:
            if taken := _common(claimed, other):
                raise _refusal(taken, "another load, which has not ended, is filling this tensor")
        is_stale = ended != _num_ended
        _claims.append(claimed)
    try:
        if is_stale:
            for place in placement.places:
                if place.mode == "adopt" and place.tensor is not None and not place.tensor.is_meta:
                    raise _refusal(place.name, _FILLED)
            for target in (target for subtree in placement.subtrees for target in subtree.targets):
                if target.on_meta and not target.tensor.is_meta:
                    raise _refusal(target.name, _FILLED)
        yield
    finally:
        with _lock:
            _claims[:] = [other for other in _claims if other is not claimed]
            _num_ended += 1


def _common(claimed: _Claim, other: _Claim) -> str | None:
    """Return the name of a tensor that is in both, or lies in the memory of one that is in the other."""
    if both := claimed.keys() & other.keys():
        return claimed[both.pop()][0]
    taken = _in_memory(other)
    begins = {device: [begin for begin, _, _ in ranges] for device, ranges in taken.items()}
    for device, ranges in _in_memory(claimed).items():
        for begin, end, name in ranges:
            before = bisect_left(begins.get(device, ()), end)  # of those that begin before its end, the last ends last
            if before and taken[device][before - 1][1] > begin:
                return name
    return None


def _in_memory(claimed: _Claim) -> dict[torch.device, list[tuple[int, int, str]]]:
    """Return the memory of tensors on each device: beginnings, in order, the furthest end until then, and names.

    Looked at only where two loads run at once. What lies in the gaps of a tensor with strides counts as its memory.
    """
    found: dict[torch.device, list[tuple[int, int, str]]] = {}
    for name, tensor in claimed.values():
        local = local_part(tensor)
        if not local.is_meta and local.layout is torch.strided and (length := length_in_memory(local)):
            found.setdefault(local.device, []).append((local.data_ptr(), local.data_ptr() + length, name))
    for ranges in found.values():
        ranges.sort()
        furthest = 0
        for index, (begin, end, name) in enumerate(ranges):
            furthest = max(furthest, end)
            ranges[index] = begin, furthest, name
    return found


def _refusal(name: str, what: str) -> PlacementError:
    return PlacementError(what, tensor=name, hint="Wait for the other load before the next into the same model")
