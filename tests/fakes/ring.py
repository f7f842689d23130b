"""A ring that makes a slot's bytes wrong the moment it is given back."""

from __future__ import annotations

import torch

from weightstream.prefetch.ring import Ring, Slot

__all__ = ["STALE", "PoisonedRing"]

#: What a released slot holds.
STALE = 0xDB


class PoisonedRing(Ring):
    """Overwrites every slot before it is free again, so that whoever still reads from it gets wrong bytes."""

    def release(self, *slots: Slot) -> None:
        for slot in slots:
            torch.frombuffer(slot.view, dtype=torch.uint8).fill_(STALE)
        super().release(*slots)
