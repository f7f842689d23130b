"""Turns: what is loaded beside the model's own storage comes one after the other, where a load is to hold little.

Tensors that a module loads itself, that are copied to storage whose elements do not lie in order, of which each process
keeps a part, or that are compared because a tied tensor is there under another name too, are loaded beside what the model
keeps; so is, for parameters on meta, what hooks slice off, or make something else of. Where all of them are placed at the
end of a load, all of them are held until then. In *turns* no more is held than the largest of them: a turn is one such
module with all that it is given, one such tensor, or one tied tensor under all its names. Turns come when all else is in the
model. Each is placed as soon as it is there, its memory is let go, and only then the next is read.

Not in turns, and placed at the end as ever: modules that have a tensor which is loaded elsewhere too (a tie), or lies in
memory that others have too, because the order in which these are written counts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch

from weightstream.device.kinds import PLAIN
from weightstream.device.placement import Place, Placement, beside_bytes, padded
from weightstream.device.sharing import find_sharing, length_in_memory
from weightstream.device.targets import Subtree

__all__ = ["Turn", "Turns", "find_turns"]


class Turn(NamedTuple):
    """What is placed together.

    Attributes:
        places: all of it, as indices in `Placement.places`.
        beside: those of them that are loaded beside what the model keeps, whole or in part; see `beside_bytes`.
        subtree: the module that loads itself, if it is one.
        doubles: pairs of places to be compared, if it is a tied tensor.
    """

    places: tuple[int, ...]
    beside: tuple[int, ...]
    subtree: Subtree | None = None
    doubles: tuple[tuple[Place, Place], ...] = ()

    def beside_bytes(self, places: list[Place], devices: Collection[int]) -> int:
        """Return how much is held, on these devices, beside what the model keeps."""
        found = [places[index] for index in self.beside if places[index].device in devices]
        return sum(place.held_bytes if self.subtree is None else beside_bytes(place) for place in found)

    def dropped_bytes(self, places: list[Place], devices: Collection[int]) -> int:
        """Return how much less of it there is when it has been placed. What is on meta takes as much as it has elements."""
        if self.subtree is None:
            return self.beside_bytes(places, devices)
        found = [places[index] for index in self.places if places[index].device in devices]
        kept_bytes = (
            sum(padded(target.tensor.nbytes) for target in self.subtree.targets if target.on_meta) if found else 0
        )
        return max(0, sum(place.held_bytes for place in found) - kept_bytes)


@dataclass(frozen=True, slots=True)
class Turns:
    """See the module.

    Attributes:
        turns: in the order in which they are placed, which is that of a load without turns: modules that load themselves
            come last, as they are registered, and their hooks see what they would see there.
        of: place -> which of them it belongs to. Places that are in none have no entry.
    """

    turns: tuple[Turn, ...]
    of: dict[int, int]

    def spared_bytes(self, places: list[Place], devices: Collection[int]) -> int:
        """Return how much less is held at a time, beside what the model keeps, than if all turns were held until the end."""
        sizes = [turn.beside_bytes(places, devices) for turn in self.turns]
        return sum(sizes) - max(sizes)

    def dropped_bytes(self, places: list[Place], devices: Collection[int]) -> int:
        """Return how much less there is, at a time, of all that is loaded, than if all turns were held until the end."""
        dropped = sum(turn.dropped_bytes(places, devices) for turn in self.turns)
        return dropped - max(turn.beside_bytes(places, devices) for turn in self.turns)


def find_turns(placement: Placement) -> Turns | None:
    """Return the turns of a load; None if it has none, or a single one, with which nothing is won.

    For a placement that is not atomic: there everything is placed at the end.
    """
    compared = {place.name for pair in (*placement.doubles, *placement.twins) for place in pair}
    candidates = [subtree for subtree in placement.subtrees if _may_come_alone(subtree, compared)]
    singles = (*placement.strided, *placement.sharded)
    tied = _tied(placement)
    if len(candidates) + len(singles) + len(tied) < 2:
        return None
    index_of = {place.name: index for index, place in enumerate(placement.places)}
    entangled = _entangled(placement) if candidates else set[int]()
    turns: list[Turn] = []
    for doubles in tied:
        beside = tuple(index_of[second.name] for _, second in doubles)
        turns.append(Turn((index_of[doubles[0][0].name], *beside), beside, doubles=tuple(doubles)))
    turns += [Turn((index,), (index,)) for index in (index_of[place.name] for place in singles)]
    for subtree in candidates:
        if id(subtree) not in entangled:
            beside = tuple(index_of[place.name] for place in subtree.places if beside_bytes(place))
            turns.append(Turn(tuple(index_of[place.name] for place in subtree.places), beside, subtree))
    if len(turns) < 2:
        return None
    return Turns(tuple(turns), {place: number for number, turn in enumerate(turns) for place in turn.places})


def _tied(placement: Placement) -> list[list[tuple[Place, Place]]]:
    """Return what is to be compared, tensor by tensor, where the first name's is in the model as soon as it is there."""
    tied: dict[str, list[tuple[Place, Place]]] = {}
    later = {place.name for place in (*placement.strided, *placement.sharded, *placement.shared)}
    later |= _inside(placement)
    for first, second in placement.doubles:
        if first.name not in later:
            tied.setdefault(first.name, []).append((first, second))
    return list(tied.values())


def _may_come_alone(subtree: Subtree, compared: Collection[str]) -> bool:
    """Tell whether a module may have something to let go, and no tensor that others load, or that is of a kind of its own.

    On meta it has if hooks slice or join what it is given, or make something else of it.
    """
    if subtree.tied or not any(place.num_bytes for place in subtree.places):
        return False
    if any(place.name in compared for place in subtree.places):
        return False
    if subtree.keeps_shapes and not any(map(beside_bytes, subtree.places)):
        return False
    return all(type(target.tensor) in PLAIN and target.tensor.layout is torch.strided for target in subtree.targets)


def _entangled(placement: Placement) -> set[int]:
    """Return the identities of modules that load themselves and have tensors in memory that others have too."""
    tensors: list[torch.Tensor] = []
    owners: list[Subtree | None] = []
    inside = _inside(placement)
    for subtree in placement.subtrees:
        own = [target.tensor for target in subtree.targets if _is_in_memory(target.tensor)]
        tensors += own
        owners += [subtree] * len(own)
    for place in placement.places:
        if place.name not in inside and place.tensor is not None and _is_in_memory(place.tensor):
            tensors.append(place.tensor)
            owners.append(None)
    found = find_sharing(tensors, list(map(length_in_memory, tensors)))
    return {id(owners[index]) for index in found}


def _inside(placement: Placement) -> set[str]:
    """Return the names of what modules that load themselves are given."""
    return {place.name for subtree in placement.subtrees for place in subtree.places}


def _is_in_memory(tensor: torch.Tensor) -> bool:
    return type(tensor) in PLAIN and not tensor.is_meta and tensor.layout is torch.strided
