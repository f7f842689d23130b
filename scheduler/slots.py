"""Slots: how many a load needs that has a ring of its own, and how large its chunks are then. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from weightstream.device.layout import padded
from weightstream.prefetch.header import TensorSpec
from weightstream.prefetch.memory import PAGE_BYTES
from weightstream.scheduler.plan import LoadPlan
from weightstream.scheduler.strategy import ChosenStrategy

__all__ = ["DIRECT_SLOTS", "OwnSlots", "chunk_bytes", "slots_of_own", "slots_of_stream"]

#: Slots for direct reads of a load that may or may not come to use them. Not measured: eight are read into while eight
#: are copied from.
DIRECT_SLOTS = 16


#: With `preload` chunks are made smaller until slots for all of them take no more than this, as often as their bytes do,
#: and never smaller than that. Not measured.
_MOST_WASTE = 1.25
_LEAST_CHUNK_BYTES = 64 * 2**10


def chunk_bytes(chunk: int, specs: Sequence[TensorSpec], strategy: ChosenStrategy) -> int:
    """Return how large chunks may be: as configured, or less.

    With `direct` no larger than the largest tensor; with `preload` so that slots for all of them at once take little more
    than their bytes: where tensors do not lie next to each other, as in files of torch.save, each ends a chunk, and its slot is
    not full.

    Args:
        chunk: as configured.
        specs: what is wanted, sorted by shard and by `begin`.
        strategy: how it is loaded.
    """
    if strategy == "direct":
        return min(chunk, _whole_pages(max((padded(spec.num_bytes) for spec in specs), default=1)))
    if strategy == "preload":
        runs, sizes = _runs(specs), [chunk]
        while sizes[-1] >= 2 * _LEAST_CHUNK_BYTES:
            sizes.append(_whole_pages(sizes[-1] // 2))
        enough = (size for size in sizes if _slots_bytes(runs, size) <= _MOST_WASTE * sum(runs))
        return next(enough, None) or min(sizes, key=lambda size: _slots_bytes(runs, size))
    return chunk


def _runs(specs: Sequence[TensorSpec]) -> list[int]:
    """Return how long the stretches are that tensors fill which lie next to each other."""
    runs: list[int] = []
    last = None
    for spec in specs:
        if last is not None and (last.shard, last.end) == (spec.shard, spec.begin):
            runs[-1] += padded(spec.num_bytes)
        else:
            runs.append(padded(spec.num_bytes))
        last = spec
    return runs


def _slots_bytes(runs: list[int], size: int) -> int:
    return sum(-(-run // size) for run in runs) * min(size, max(runs, default=0))


def slots_of_stream(plan: LoadPlan, io: Literal["auto", "buffered", "direct"]) -> tuple[int, int]:
    """Return how many slots of the ring a plan needs to overlap anything, and how many it can use at most.

    What goes to parameters that have storage in host memory needs one unless it is in the page cache, which is not known yet.
    """
    unmapped = [chunk.transfer for chunk in plan.chunks if not chunk.is_mapped]
    held = len(unmapped) if io == "direct" else sum(1 for transfer in unmapped if transfer.slot_bytes)
    passing = sum(1 for transfer in unmapped if transfer.in_place and not transfer.slot_bytes)
    other = len(unmapped) if io == "auto" else passing
    return min(2, max(held, passing)), max(held, min(other, DIRECT_SLOTS))


@dataclass(frozen=True, slots=True)
class OwnSlots:
    """The ring of a load that has one of its own.

    Attributes:
        slot_bytes: of each slot.
        least, most: how many slots it needs, and how many it can use.
        optional: it needs them for direct reads alone, which it can do without.
    """

    slot_bytes: int
    least: int
    most: int
    optional: bool

    @property
    def needed_bytes(self) -> int:
        return self.least * self.slot_bytes


def slots_of_own(
    plan: LoadPlan,
    strategy: Literal["preload", "direct"],
    io: Literal["auto", "buffered", "direct"],
    *,
    num_cold: int | None = None,
) -> OwnSlots:
    """Return what ring a plan needs: a slot for every chunk that waits in one (`preload`), or one slot (`direct`).

    Chunks that are read directly into host memory where they stay pass through slots, too. With `preload` there is one
    for them beside all those that are filled and wait, or everybody would wait. What is in the page cache, or mapped,
    is not read directly.

    Args:
        plan: what is loaded.
        strategy: how.
        io: how it is read.
        num_cold: how many chunks may be read directly, unless `io` says so of all; None: not known yet.
    """
    held = sum(1 for chunk in plan.chunks if chunk.transfer.slot_bytes)
    passing = 0 if io == "buffered" else sum(1 for chunk in plan.chunks if not chunk.is_mapped) - held
    if io == "auto" and num_cold is not None:
        passing = min(passing, num_cold)
    may_be_direct = io == "direct" or (io == "auto" and num_cold != 0)
    whole = [chunk.num_bytes + 2 * PAGE_BYTES for chunk in plan.chunks] if may_be_direct else []
    slot_bytes = _whole_pages(max([1, *whole, *(chunk.transfer.slot_bytes for chunk in plan.chunks)]))
    if strategy == "direct":
        least = most = min(1, held + passing)
    else:
        least, most = held + min(1, passing), held + min(DIRECT_SLOTS, passing)
    return OwnSlots(slot_bytes, least, most, optional=not held and io == "auto")


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
