"""The survey: finds out, before a load, what `auto` decides on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter

from weightstream.device.backend import Backend
from weightstream.device.placement import Place
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.filesystem import FileSystem, file_system_of
from weightstream.prefetch.header import TensorSpec
from weightstream.prefetch.memory import available_bytes
from weightstream.prefetch.source import ByteRange, Source
from weightstream.ranks import find_ranks
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.files import Files
from weightstream.scheduler.plan import LoadPlan
from weightstream.scheduler.slots import slots_of_own, slots_of_stream
from weightstream.scheduler.strategy import Decision, Situation, decide

__all__ = ["choose", "survey"]

#: Residency is looked at in ranges of this size, a few pages of each.
_LOOK_BYTES = 64 * 2**20


def choose(  # noqa: PLR0913 (what there is to decide on)
    engine: Engine,
    files: Files,
    checkpoint: Checkpoint,
    source: Source,
    specs: Sequence[TensorSpec],
    places: Sequence[Place],
    backends: Sequence[Backend],
    make: Callable[[Decision], LoadPlan],
    *,
    beside_bytes: int = 0,
    spared_bytes: int = 0,
    delivers: bool = False,
) -> tuple[Decision, LoadPlan]:
    """Return what the configuration asks for, or what `auto` decides, and the plan for it.

    Args:
        engine: whose configuration and memory.
        files: whatever may hang in a file system is done through these.
        checkpoint: what is loaded.
        source: how it is read.
        specs: the tensors that are wanted, sorted by shard and by `begin`.
        places: what becomes of each.
        backends: where to. For several, one ring feeds them all.
        make: makes the plan.
        beside_bytes: what is held beside parameters with storage; see `Situation`.
        spared_bytes: how much less `direct` holds.
        delivers: whether a consumer takes them one by one. Such tensors wait in `host_memory`, and never in a file.
    """
    config = engine.config
    if config.strategy != "auto":
        decision = Decision(config.strategy, "asked for")
        return decision, make(decision)
    situation = dataclasses.replace(
        survey(engine, files, checkpoint, source, specs, places, backends, delivers=delivers),
        beside_bytes=beside_bytes,
        spared_bytes=spared_bytes,
    )
    decision = decide(situation)
    plan = make(decision)
    if decision.strategy == "preload":  # how many slots that takes says the plan alone
        needed_bytes = slots_of_own(plan, "preload", config.prefetch.io).needed_bytes
        situation = dataclasses.replace(situation, preload_bytes=needed_bytes)
        decision = decide(situation)
        if decision.strategy != "preload":
            plan = make(decision)
    if decision.strategy == "stream":  # and so it does here
        least, most = slots_of_stream(plan, config.prefetch.io)
        decision = decide(dataclasses.replace(situation, least_slots=least, num_slots=most))
        if decision.strategy != "stream":
            plan = make(decision)
    return decision, plan


def survey(
    engine: Engine,
    files: Files,
    checkpoint: Checkpoint,
    source: Source,
    specs: Sequence[TensorSpec],
    places: Sequence[Place],
    backends: Sequence[Backend],
    *,
    delivers: bool = False,
) -> Situation:
    """Look at the machine and at what is wanted; see `choose`.

    Of several devices that which has least room beside its weights counts; of what the CPU is to hold, so much less host
    memory is free.
    """
    prefetch = engine.config.prefetch
    num_bytes = staged_bytes = landing_bytes = filled_bytes = cast_bytes = 0
    new_bytes = [0] * len(backends)
    for place in places:
        size = place.num_bytes
        num_bytes += size
        if place.is_cast:
            cast_bytes += size
        if place.mode == "fill":
            filled_bytes += size
        else:
            new_bytes[place.device] += (
                size // place.stored_dtype.itemsize * place.dtype.itemsize if place.is_cast else size
            )
        if delivers or not backends[place.device].lands or place.is_cast:
            staged_bytes += size
        elif place.mode == "fill":
            landing_bytes += size
    if cast_bytes:  # chunks that hold such tensors too go through slots
        staged_bytes, landing_bytes = staged_bytes + landing_bytes, 0
    num_slots = -(-staged_bytes // prefetch.chunk)
    is_host = all(one.lands for one in backends)
    free_bytes = [engine.staging.free_device_bytes(one) for one in backends]
    left_bytes = {at: free - new_bytes[at] for at, free in enumerate(free_bytes) if free is not None}
    fullest = min(left_bytes, key=lambda at: left_bytes[at]) if left_bytes else 0
    on_host_bytes = sum(size for size, one in zip(new_bytes, backends, strict=True) if one.lands)
    can_stay = is_host and len(backends) == 1 and not (delivers or filled_bytes or cast_bytes)
    can_stay = can_stay and prefetch.page_cache == "keep" and prefetch.io != "direct"
    file_system = files.call(lambda: _file_system(checkpoint, files))
    wants_residency = can_stay and file_system.kind == "local"
    return Situation(
        device=", ".join(str(one.device) for one in backends),
        fullest=str(backends[fullest].device),
        is_host=is_host,
        num_bytes=num_bytes,
        new_bytes=0 if delivers else on_host_bytes if is_host else new_bytes[fullest],
        in_place=filled_bytes > 0,
        can_stay=can_stay,
        staged_bytes=staged_bytes,
        preload_bytes=staged_bytes + landing_bytes,
        host_memory_bytes=engine.staging.budget.limit_bytes,
        left_bytes=engine.staging.budget.left_bytes,
        beside_bytes=0,
        spared_bytes=0,
        held_bytes=engine.staging.ring.statistics().num_bytes,
        chunk_bytes=prefetch.chunk,
        slot_bytes=engine.staging.ring.slot_bytes,
        least_slots=min(2, num_slots),
        num_slots=num_slots,
        free_host_bytes=available_bytes() - (0 if is_host or delivers else on_host_bytes),
        free_device_bytes=free_bytes[fullest],
        num_ranks=find_ranks().local_size,
        file_system=file_system,
        resident_share=files.call(lambda: _resident_share(source, specs)) if wants_residency else None,
    )


def _file_system(checkpoint: Checkpoint, files: Files) -> FileSystem:
    if not checkpoint.shards:
        return FileSystem("local", "nothing")
    shard = checkpoint.shards[0]
    files.begin(shard.path)
    try:
        return file_system_of(shard.fd)
    except OSError as error:  # it may be read from all the same; but what is mapped should be of something steady
        return FileSystem("network", f"a file system that does not say what it is ({error.strerror})")


def _resident_share(source: Source, specs: Sequence[TensorSpec]) -> float | None:
    """Return how much of the shards, between the first and the last byte wanted of each, is in the page cache."""
    ranges: list[ByteRange] = []
    for shard, group in groupby(specs, attrgetter("shard")):  # sorted by shard and by their begin
        wanted = list(group)
        last = max(map(attrgetter("end"), wanted))
        ranges += [
            ByteRange(shard, begin, min(begin + _LOOK_BYTES, last))
            for begin in range(wanted[0].begin, last, _LOOK_BYTES)
        ]
    shares = source.resident_shares(ranges)
    total = sum(one.end - one.begin for one in ranges)
    if not total or None in shares:
        return None
    return sum((share or 0.0) * (one.end - one.begin) for one, share in zip(ranges, shares, strict=True)) / total
