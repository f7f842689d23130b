"""Reporting: what a load that has come to its end has to say, put together from what took part in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from weightstream.device.backend import Backend
from weightstream.device.placement import Place
from weightstream.errors import some
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.ranks import find_ranks
from weightstream.scheduler.ledger import Ledger
from weightstream.scheduler.pipeline import Pipeline
from weightstream.scheduler.report import LoadReport
from weightstream.scheduler.sinks import Prepared

__all__ = ["device_names", "make_report"]


def make_report(
    checkpoint: Checkpoint,
    prepared: Prepared,
    pipeline: Pipeline,
    ledger: Ledger,
    *,
    host_peak_bytes: int,
    num_retries: int,
    fallbacks: Sequence[str],
) -> LoadReport:
    """Make the report of a load.

    Args:
        checkpoint: what was loaded.
        prepared: to where, and how.
        pipeline: what its bytes went through.
        ledger: where its time went.
        host_peak_bytes: how much host memory was held at most.
        num_retries: how often something was tried again.
        fallbacks: what was given up on the way, besides what `prepared` knows of.
    """
    placement, backends, plan, decision = prepared
    wall_s = ledger.wall_s
    ranks = find_ranks()
    verification = pipeline.verification
    told = list(fallbacks)
    totals = _totals(placement.places)
    own, computed = placement.loaded_themselves, placement.computed
    if own:
        told.append(f"{len(own)} modules were loaded through hooks of their own: {some(own)}")
    if computed:
        told.append(f"unexpected, but no error, because the model computes it itself: {some(computed)}")
    if placement.ignored:
        told.append(f"on one side alone, and ignored as the settings say: {some(placement.ignored)}")
    return LoadReport(
        checkpoint=str(checkpoint.path),
        strategy=decision.strategy,
        reason=decision.reason,
        device=device_names(backends),
        dtype=_dtypes(totals),
        num_tensors=len(placement.places),
        num_shards=len(checkpoint.shards),
        num_bytes=plan.num_bytes,
        wall_s=wall_s,
        throughput_bytes_per_s=plan.num_bytes / wall_s if wall_s > 0 else 0.0,
        phases=dict(ledger.phases),
        overlap=ledger.overlap,
        host_peak_bytes=host_peak_bytes,
        pinned_bytes=pipeline.pinned_bytes,
        device_peak_bytes=sum(blocks.device_peak_bytes for blocks in pipeline.blocks),
        num_copies=pipeline.stage.num_copies + pipeline.flow.filling.num_copies,
        num_retries=num_retries,
        decisions=(*checkpoint.notes, *placement.decisions(len(checkpoint.tensors)), *pipeline.decisions()),
        fallbacks=tuple(told),
        missing_keys=tuple(placement.missing_keys),
        unexpected_keys=(*placement.unexpected_keys, *computed),
        unloaded_keys=tuple(placement.unloaded),
        verified="none" if verification is None else verification.describe(),
        hash_s=0.0 if verification is None else verification.hash_s,
        rank=ranks.rank,
        world_size=ranks.world_size,
        read_bytes=pipeline.flow.bytes_read,
        mapped_bytes=plan.mapped_bytes,
        cast_bytes=sum(size for (stored, dtype), size in totals.items() if stored is not dtype),
        cached_read_s=pipeline.flow.filling.cached_read_s,
        storage_read_s=pipeline.flow.filling.storage_read_s,
        storage_cpu_s=pipeline.flow.filling.storage_cpu_s,
    )


def device_names(backends: Sequence[Backend]) -> str:
    """Return what a report and a timeline call the devices."""
    return ", ".join("page-cache" if backend.device.type == "meta" else str(backend.device) for backend in backends)


def _totals(places: list[Place]) -> dict[tuple[torch.dtype, torch.dtype], int]:
    """Return how many bytes are of each stored dtype and each dtype in the model."""
    totals: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for place in places:
        key = place.stored_dtype, place.dtype
        totals[key] = totals.get(key, 0) + place.num_bytes
    return totals


def _dtypes(totals: Mapping[tuple[torch.dtype, torch.dtype], int]) -> str:
    sizes: dict[torch.dtype, int] = {}
    for (_, dtype), size in totals.items():
        sizes[dtype] = sizes.get(dtype, 0) + size
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in sorted(sizes, key=lambda one: -sizes[one]))
