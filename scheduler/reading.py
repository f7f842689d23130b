"""How a load reads: what is in the page cache comes from there, and a tuner is given charge of the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.eviction import Eviction
from weightstream.prefetch.filesystem import FileSystem, file_system_of
from weightstream.prefetch.source import Source
from weightstream.prefetch.tuner import (
    COPYING_WORKERS,
    FIRST_READ_BYTES,
    FIRST_WORKERS,
    MAX_WORKERS,
    Setting,
    Tuner,
)
from weightstream.scheduler.plan import LoadPlan

__all__ = ["Reading", "Residency", "look_at_cache", "look_for_passing", "make_eviction", "make_tuner"]

#: A chunk of which so much is in the page cache is read from there.
_RESIDENT_SHARE = 0.5


class Reading(NamedTuple):
    """What a flow needs to know of it.

    Attributes:
        source: where bytes come from; used by reader threads.
        tuner: says how to read; guarded by the flow's lock.
        resident: for each chunk, whether it is read from the page cache, as it is there already.
        passes: for each chunk, whether it passes through a slot on its way to parameters; see `look_for_passing`.
        widen: told, on a reader thread, how many readers there should be from now on.
        eviction: takes what was read from storage out of the page cache again; None: it stays.
        paths: of the shards, for messages.
        stall_s: how long one read may take before it is given up; None: for ever.
    """

    source: Source
    tuner: Tuner
    resident: Sequence[bool]
    passes: Sequence[bool]
    widen: Callable[[int], None]
    eviction: Eviction | None = None
    paths: Sequence[Path] = ()
    stall_s: float | None = None


class Residency(NamedTuple):
    """What the page cache holds. `resident`: for each chunk, whether it is there; `unknown`: how many may be, or not.

    `network`: what the file system is called that the others come from, if that is behind a network.
    """

    resident: list[bool]
    unknown: int
    network: str | None = None

    @property
    def num_cold(self) -> int:
        return len(self.resident) - sum(self.resident)

    def describe(self) -> str:
        said = f"page cache: {sum(self.resident)} of {len(self.resident)} chunks are in it and are read from there"
        return f"{said}; the others come over a network ({self.network})" if self.network and self.num_cold else said


def look_at_cache(plan: LoadPlan, checkpoint: Checkpoint, source: Source, config: PrefetchConfig) -> Residency:
    """Find out which chunks are in the page cache. Not asked where all is read past it anyway."""
    network = _network_of(checkpoint)
    if config.io == "direct":
        return Residency([chunk.is_mapped for chunk in plan.chunks], 0, network)
    shares = source.resident_shares([chunk.source for chunk in plan.chunks])
    shares = [1.0 if chunk.is_mapped else share for chunk, share in zip(plan.chunks, shares, strict=True)]
    return Residency([(share or 0.0) >= _RESIDENT_SHARE for share in shares], shares.count(None), network)


def look_for_passing(checkpoint: Checkpoint, plan: LoadPlan, found: Residency) -> list[bool]:
    """Say of each chunk whether readers must take it to a slot first, and not at once to parameters that have storage.

    A read in the kernel cannot be called back, and a load that is cancelled does not wait for long. It could write to
    memory that somebody uses for something else by then. So only what is in the page cache of a file system of this
    machine, which answers at once, is read straight into parameters: there the copy is what takes the time.
    """
    in_place = [chunk for chunk in plan.chunks if chunk.transfer.in_place]
    shards = {chunk.source.shard for chunk in in_place}
    far = {shard for shard in shards if _file_system(checkpoint.shards[shard].fd).kind == "network"}
    passes = [False] * len(plan.chunks)
    for chunk in in_place:
        passes[chunk.index] = chunk.source.shard in far or not found.resident[chunk.index]
    return passes


def _network_of(checkpoint: Checkpoint) -> str | None:
    systems = [_file_system(shard.fd) for shard in checkpoint.shards[:1]]
    return next((system.name for system in systems if system.kind == "network"), None)


def _file_system(fd: int) -> FileSystem:
    try:
        return file_system_of(fd)
    except OSError:
        return FileSystem("network", "it does not say what it is")


def make_eviction(checkpoint: Checkpoint, plan: LoadPlan, found: Residency, config: PrefetchConfig) -> Eviction | None:
    """Make what takes out of the page cache again what a load reads from storage, if the configuration asks for it."""
    if config.page_cache == "keep":
        return None
    cold = [chunk.source for chunk, resident in zip(plan.chunks, found.resident, strict=True) if not resident]
    return Eviction(checkpoint.shards, cold, is_everything=len(cold) == len(plan.chunks))


def make_tuner(
    plan: LoadPlan,
    source: Source,
    found: Residency,
    config: PrefetchConfig,
    *,
    workers: int,
    adaptive: bool,
    has_slots: bool,
    known: Setting | None,
) -> Tuner:
    """Make the tuner of a load.

    Args:
        plan: what is read.
        source: where from.
        found: what need not come from storage.
        config: `io`, `workers` and `chunk` are used.
        workers: the number of reads at a time to begin with.
        adaptive: whether their number, unless it was asked for, and their size may change.
        has_slots: whether there are slots, which direct reads need.
        known: what an earlier load from the same file system ended with, if there was one.
    """
    cold = [chunk for chunk, resident in zip(plan.chunks, found.resident, strict=True) if not resident]
    can_direct = config.io == "auto" and has_slots and any(source.has_direct(chunk.source.shard) for chunk in cold)
    read_bytes = min(FIRST_READ_BYTES, config.chunk) if adaptive else config.chunk
    follows = adaptive and config.workers == "auto"
    # What is surely cold begins past the page cache, where that is possible; what may be warm, through it.
    direct = config.io == "direct" or (can_direct and not found.unknown)
    if follows and cold:
        copies = direct and not all(chunk.transfer.slot_bytes for chunk in cold)  # on the way to host memory
        workers = FIRST_WORKERS + (COPYING_WORKERS if copies else 0)
    first = Setting(direct=direct, workers=workers, read_bytes=read_bytes)
    if known is not None and follows and cold and (can_direct or known.direct == first.direct):
        first = known
    return Tuner(
        first,
        is_known=first is known,
        total_bytes=sum(chunk.num_bytes for chunk in cold),
        can_direct=can_direct,
        max_workers=MAX_WORKERS if follows else None,
        max_read_bytes=config.chunk if adaptive else None,
    )
