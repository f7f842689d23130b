"""What recording a timeline costs: loads with and without a recorder, in turn, in one process.

Run: python -m benchmarks.recording CHECKPOINT [--chunk 1MiB] [--runs 40]. Each pair of loads is in another order than
the one before it; the result is the median of each side, and of the difference within pairs, which what changes on the
machine from minute to minute does not touch. The page cache is filled first (a load that finds nothing there may read past
it, every time); the machine should be quiet.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import weightstream as ws
from weightstream.building import model_for
from weightstream.prefetch.checkpoint import open_checkpoint

__all__ = ["main"]


@dataclass(frozen=True, slots=True)
class Cost:
    """One load: seconds until it was done, seconds of all cores, and the chunks that were recorded (0: none were)."""

    wall_s: float
    cpu_s: float
    num_chunks: int


async def measure(loader: ws.Loader, model: nn.Module, *, records: bool) -> Cost:
    """Load once, in place."""
    recorder = ws.Recorder() if records else None
    gc.collect()
    cpu_s, begin_s = time.process_time(), time.perf_counter()
    await loader.load(model, recorder=recorder)
    wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - cpu_s
    chunks = {span.chunk for span in recorder.timeline().spans if span.kind == "read"} if recorder else ()
    return Cost(wall_s, cpu_s, len(chunks))


async def measure_pairs(checkpoint: Path, chunk: str, num_pairs: int) -> list[dict[bool, Cost]]:
    """Load into one model, through one ring: a load that has to get fresh memory takes what time the machine's host takes."""
    sections = {"prefetch": {"chunk": chunk, "host_memory": "256MiB"}, "device": {"target": "cpu"}}
    config = ws.LoaderConfig.model_validate({"checkpoint": checkpoint, "strategy": "stream", **sections})
    with open_checkpoint(checkpoint) as opened:
        model = model_for(opened.tensors.values()).to_empty(device="cpu")
    pairs: list[dict[bool, Cost]] = []
    async with ws.Loader(config) as loader:
        await (await loader.start_warm()).wait()
        for run in range(-2, num_pairs):  # the first two warm up
            order = (True, False) if run % 2 else (False, True)
            pair = {records: await measure(loader, model, records=records) for records in order}
            if run >= 0:
                pairs.append(pair)
    return pairs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recording", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--chunk", default="16MiB")
    parser.add_argument("--runs", type=int, default=40, help="pairs of loads (40)")
    options = parser.parse_args(arguments)
    pairs = asyncio.run(measure_pairs(options.checkpoint, options.chunk, options.runs))
    print(f"{options.runs} pairs, {pairs[0][True].num_chunks:,} chunks of {options.chunk}")
    for name in ("wall_s", "cpu_s"):
        without, with_it = ([getattr(pair[records], name) for pair in pairs] for records in (False, True))
        ratios = sorted(there / here - 1 for here, there in zip(without, with_it, strict=True))
        # Where the median lies with 95 %, by ranks (Hollander and Wolfe: n/2 -+ 1.96 sqrt(n)/2).
        rank = max(0, math.floor(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))))
        print(
            f"{name}: {statistics.median(without):.4f} without, {statistics.median(with_it):.4f} with it;"
            f" {statistics.median(ratios):+.2%} within pairs, 95 %: {ratios[rank]:+.2%} to {ratios[-1 - rank]:+.2%}"
        )


if __name__ == "__main__":
    main()
