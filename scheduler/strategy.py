"""Strategies: which there are, and which one `auto` takes.

The decision is a pure function of a `Situation`, which `survey` finds out. docs/strategies.md has it as a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from weightstream.prefetch.filesystem import FileSystem

__all__ = ["ChosenStrategy", "Decision", "Situation", "decide"]

#: What a load really does.
ChosenStrategy = Literal["stream", "preload", "direct", "map"]

#: So much of the checkpoint is in the page cache where it counts as being there. Not measured: what is missing is brought
#: in while parameters are bound.
_RESIDENT = 0.9


@dataclass(frozen=True, slots=True)
class Decision:
    """What a load does, and why, in one sentence."""

    strategy: ChosenStrategy
    reason: str


@dataclass(frozen=True, slots=True)
class Situation:
    """What `auto` decides on.

    Attributes:
        device: where tensors go; `is_host`: whether that is host memory. `fullest`: of several, that with the least room
            beside its weights, whose `new_bytes` and `free_device_bytes` count.
        num_bytes: of the tensors that are wanted.
        new_bytes: of the storage that the loader makes for them, on the device.
        in_place: whether some of them go into storage that the model has.
        can_stay: whether they can be views of the mapped files: on the CPU, for parameters on meta, without a cast.
        staged_bytes: how much of them goes through slots with `stream`, the page cache provided; `preload_bytes`: what slots
            take for all at once that does with `preload`.
        host_memory_bytes: what `prefetch.host_memory` allows, `left_bytes` of which nobody has taken.
        beside_bytes: what of that tensors take which are held until the end beside parameters with storage; `spared_bytes`:
            how much less `direct` holds of them, which takes them in turns.
        held_bytes: how large the ring is that the loader has already. `chunk_bytes`: `prefetch.chunk`.
        slot_bytes: of the ring. `least_slots`, `num_slots`: how many `stream` needs so that anything overlaps, and how many it
            can use.
        free_host_bytes: what the machine, or its control group, has left; `num_ranks` processes on it share that.
        free_device_bytes: None: unknown, or the host.
        file_system: what the checkpoint is on.
        resident_share: how much of it is in the page cache, 0.0 to 1.0; None: unknown, or of no interest.
    """

    device: str
    is_host: bool
    num_bytes: int
    new_bytes: int
    in_place: bool
    can_stay: bool
    staged_bytes: int
    preload_bytes: int
    host_memory_bytes: int
    left_bytes: int
    beside_bytes: int
    spared_bytes: int
    held_bytes: int
    chunk_bytes: int
    slot_bytes: int
    least_slots: int
    num_slots: int
    free_host_bytes: int
    free_device_bytes: int | None
    num_ranks: int
    file_system: FileSystem
    resident_share: float | None
    fullest: str = ""

    @property
    def share_bytes(self) -> int:
        """This process's share of the host's free memory."""
        return self.free_host_bytes // self.num_ranks

    @property
    def room_bytes(self) -> int:
        """What staging may take of it (7/8), beside weights that are in host memory."""
        return self.share_bytes * 7 // 8 - (self.new_bytes if self.is_host else 0)

    @property
    def least_ring_bytes(self) -> int:
        return self.least_slots * self.slot_bytes

    @property
    def ring_bytes(self) -> int:
        """What `stream` stages with: less than it may where there is less. A ring that is there already counts as room."""
        allowed_bytes = min(self.host_memory_bytes, self.left_bytes + self.held_bytes) - self.beside_bytes
        room_bytes = min(allowed_bytes, max(self.room_bytes, 0) + self.held_bytes)
        return min(self.num_slots, max(room_bytes, 0) // self.slot_bytes) * self.slot_bytes


def decide(situation: Situation) -> Decision:
    """Choose a strategy."""
    strategy, why = _choose(situation)
    return Decision(strategy, f"auto: {why} ({_facts(situation)})")


def _choose(s: Situation) -> tuple[ChosenStrategy, str]:  # noqa: PLR0911 (one line for each row of the table)
    if s.spared_bytes and s.beside_bytes + s.least_ring_bytes > s.left_bytes + s.held_bytes:
        return "direct", f"`host_memory` has no room for {_size(s.beside_bytes)} beside the model at once, but in turns"
    can_map = s.can_stay and s.file_system.kind != "network"
    if can_map and s.file_system.kind == "memory":
        return "map", "the files are in memory already, and a copy would double them"
    if can_map and s.resident_share is not None and s.resident_share >= _RESIDENT:
        return "map", "the page cache has the files, and parameters can be views of them without a copy"
    if can_map and s.num_bytes > s.share_bytes:
        return "map", "the weights are larger than the free memory, and pages of a mapped file need not all be there"
    if s.ring_bytes < s.least_ring_bytes:
        return "direct", f"host memory has no room for a ring of {_size(s.least_ring_bytes)}"
    if s.free_device_bytes is not None and s.free_device_bytes - s.new_bytes < 2 * s.chunk_bytes:
        return "direct", f"beside the weights the device has no room for two chunks of {_size(s.chunk_bytes)}"
    fits = s.preload_bytes <= min(s.left_bytes - s.beside_bytes, s.room_bytes // 2)
    if s.in_place and s.file_system.kind == "network" and fits:
        return "preload", "parameters that are in use are not written to before every byte has come over the network"
    if not s.staged_bytes:
        passing = f", or through a ring of at most {_size(s.ring_bytes)}" if s.ring_bytes else ""
        return "stream", f"readers bring the bytes to the parameters' own memory{passing}"
    return "stream", f"reading and copying overlap, through a ring of at most {_size(s.ring_bytes)}"


def _facts(s: Situation) -> str:
    kind = "" if s.file_system.kind == "memory" else f", {s.file_system.kind}"
    cache = "" if s.resident_share is None else f", {s.resident_share:.0%} in the page cache"
    ranks = "" if s.num_ranks == 1 else f" for {s.num_ranks} ranks"
    device = "" if s.free_device_bytes is None else f", {_size(s.free_device_bytes)} free on {s.fullest or s.device}"
    where = f"{_size(s.num_bytes)} for {s.device}, on {s.file_system.name}{kind}{cache}"
    return f"{where}; {_size(s.free_host_bytes)} of host memory free{ranks}{device}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
