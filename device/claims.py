"""Claims: which tensors of models running loads are filling, in this whole process.

Two loads into one parameter would mix weights, and the rollback of one would undo what the other has placed. So a load claims
what it fills until it has ended, and another that would fill a part of it is refused, whatever `Loader` it is of.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

from weightstream.device.placement import Placement
from weightstream.errors import PlacementError

__all__ = ["claim", "num_ended"]

_lock = threading.Lock()
#: The ids of the tensors of each load, which keeps them alive.
_claims: list[set[int]] = []
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
    tensors = {id(place.tensor): place.name for place in placement.places if place.tensor is not None}
    trees = filter(placement.wants, placement.subtrees)
    tensors |= {id(target.tensor): target.name for tree in trees for target in tree.targets}
    claimed = set(tensors)
    with _lock:
        if taken := next((found for other in _claims if (found := claimed & other)), None):
            raise _refusal(tensors[taken.pop()], "another load, which has not ended, is filling this tensor")
        is_stale = ended != _num_ended
        _claims.append(claimed)
    try:
        if is_stale:
            for place in placement.places:
                if place.mode == "adopt" and place.tensor is not None and not place.tensor.is_meta:
                    raise _refusal(place.name, "another load has filled this tensor while this one began")
        yield
    finally:
        with _lock:
            _claims[:] = [other for other in _claims if other is not claimed]
            _num_ended += 1


def _refusal(name: str, what: str) -> PlacementError:
    return PlacementError(what, tensor=name, hint="Wait for the other load before the next into the same model")
