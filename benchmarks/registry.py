"""All arms of the comparison, and which of them are of interest where."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import ours, peers
from benchmarks.arms import Arm

__all__ = ["all_arms", "arms_for"]


def all_arms() -> dict[str, Arm]:
    """Return every arm by its key: ours first, then the peers, then the ceilings."""
    return {arm.key: arm for arm in (*ours.ARMS, *peers.ARMS, *ours.CEILINGS)}


def arms_for(family: str, device: str, cache: str, wanted: Sequence[str] = ()) -> list[Arm]:
    """Return the arms for a recipe's family, a type of device and a state of the page cache.

    `wanted` chooses by key; empty: the default ones.
    """
    return [
        arm
        for arm in all_arms().values()
        if family in arm.families
        and device in arm.devices
        and cache in arm.caches
        and (arm.key in wanted if wanted else arm.default)
    ]
