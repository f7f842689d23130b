"""How responsive an event loop stays while a model of 46,000 tensors loads on it, and what a busy loop costs the load.

Run: python -m benchmarks.responsiveness [--folder FOLDER] [--runs N]

Part 1: another task on the loop sleeps for a millisecond, again and again, and notes how late it wakes up, first with
nothing else to do, then while the model loads. Part 2: the same load while the loop's thread is blocked for a second, or
computes for one, against the load alone, in turn. The loop is uvloop. Prints two tables in Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop
from torch import nn

from benchmarks.checkpoints import SMALL, build, write
from benchmarks.memory import touch
from weightstream import Loader, LoaderConfig, LoadReport

TICK_S = 0.001


async def tick(stop: asyncio.Event) -> list[float]:
    """Return how late, in seconds, each tick was."""
    late: list[float] = []
    while not stop.is_set():
        begin = time.perf_counter()
        await asyncio.sleep(TICK_S)
        late.append(time.perf_counter() - begin - TICK_S)
    return late


async def ticking_beside(work: Coroutine[Any, Any, Any]) -> list[float]:
    stop = asyncio.Event()
    ticker = asyncio.create_task(tick(stop))
    await asyncio.sleep(0.05)
    await work
    stop.set()
    return await ticker


def fresh_model() -> nn.Module:
    model = build(SMALL)
    gc.collect()
    touch(2**30)
    return model


async def load_beside(loader: Loader, path: Path, occupy: Callable[[], object]) -> LoadReport:
    """Load while the loop's thread does something else for a second, and runs no task."""
    load = asyncio.create_task(loader.load(fresh_model(), path))
    await asyncio.sleep(0.005)  # the load has begun
    occupy()
    return await load


def compute() -> None:
    """Hash for a second, as native code computes: without the interpreter's lock, but with one of the cores."""
    data, until = bytes(2**26), time.perf_counter() + 1
    while time.perf_counter() < until:
        hashlib.sha256(data)


async def measure(path: Path, runs: int) -> None:
    async with Loader(LoaderConfig()) as loader:
        await loader.load(fresh_model(), path)  # the page cache, imports and threads are warm from here on
        idle = await ticking_beside(asyncio.sleep(2))
        loading: list[float] = []
        for _ in range(runs):
            model = fresh_model()  # it is not freed before the ticks have been counted: that is not the load's time
            loading += await ticking_beside(loader.load(model, path))
        print("| event loop | ticks | median late ms | 99 % late ms | worst late ms | later than 10 ms |")
        print("|---|---|---|---|---|---|")
        for name, late in (("idle", idle), (f"while loading, {runs} loads", loading)):
            slow = sum(one > 0.010 for one in late) / len(late)
            p99 = sorted(late)[int(len(late) * 0.99)]
            print(
                f"| {name} | {len(late)} | {statistics.median(late) * 1e3:.2f} | {p99 * 1e3:.2f}"
                f" | {max(late) * 1e3:.1f} | {slow:.2%} |"
            )
        walls: dict[str, list[float]] = {"alone": [], "blocked for 1 s": [], "computing for 1 s": []}
        for _ in range(runs):
            walls["alone"].append((await loader.load(fresh_model(), path)).wall_s)
            walls["blocked for 1 s"].append((await load_beside(loader, path, lambda: time.sleep(1))).wall_s)
            walls["computing for 1 s"].append((await load_beside(loader, path, compute)).wall_s)
        print("\n| load of 46,000 tensors, the loop's thread | median s | min s | max s |\n|---|---|---|---|")
        for name, found in walls.items():
            print(f"| {name} | {statistics.median(found):.3f} | {min(found):.3f} | {max(found):.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "weightstream-benchmarks")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    path = write(SMALL, options.folder)
    uvloop.run(measure(path, options.runs))


if __name__ == "__main__":
    main()
