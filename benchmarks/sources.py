"""Does `io: auto` with `workers: auto` find the best way to read, on sources of very different kinds?

Run: python -m benchmarks.sources [--folder FOLDER] [--out FOLDER] [--repetitions N] [--only NAME ...]

Five situations: a warm page cache and a cold one on the disk of FOLDER; and three that are simulated, by a file system
over FUSE (see tests/fakes/filesystem.py), all cold: one where O_DIRECT is faster, one where every read takes long, so
that more workers pay, and one that gets slower with more workers. In each, a checkpoint is loaded onto the CPU, into a
model on meta, once with every fixed setting (buffered or direct, 1 to 32 workers) and with auto; then the fastest fixed
settings and auto are repeated in turn, in an order that changes. Each time every byte is compared. Prints a table for
each situation, and writes all of it to sources.md and sources.json. Takes some ten minutes, 2 GB on the disk and 6 GB
of memory. The simulated ones need root and /dev/fuse.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.machine import kernel_release
from tests.fakes.filesystem import Behaviour, Speed, mounted
from tests.fakes.fuse import why_not
from weightstream import LoaderConfig, LoadReport, load_sync, pagecache
from weightstream.building import model_for
from weightstream.ceilings import read_ceiling
from weightstream.prefetch.checkpoint import open_checkpoint
from weightstream.prefetch.header import TensorSpec
from weightstream.prefetch.memory import usable_cores
from weightstream.samples import touch

FIXED_IO: tuple[Literal["buffered", "direct"], ...] = ("buffered", "direct")
WORKERS = (1, 2, 4, 8, 16, 32)
TENSOR_BYTES = 4 * 2**20
#: How near to the best fixed setting auto has to come, if it is not within that setting's own spread.
TOLERANCE = 0.1

#: How many fixed settings are measured more than once: those that were fastest in the first round.
NUM_FINALISTS = 3
#: A load takes a few seconds with the best setting, as loads from such storage do: there is time to find out.
NUM_BYTES = 2 * 2**30
DIRECT_WINS = Behaviour(buffered=Speed(bytes_per_s=250e6), direct=Speed(bytes_per_s=700e6))
LATE = Speed(latency_s=0.008, bytes_per_s=700e6)
CROWDED = Speed(bytes_per_s=600e6, crowd_s=0.00015)


class Skipped(Exception):  # noqa: N818 - nothing is wrong
    """Raised when something cannot be measured here, and says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of many equal tensors."""

    folder: Path
    specs: tuple[TensorSpec, ...]
    paths: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)


#: Makes a source what it should be before a load, and says where to load from.
Prepare = Callable[[Checkpoint], AbstractContextManager[Path]]


@dataclass(frozen=True)
class Situation:
    """A kind of source. `is_simulated`: over FUSE, which cannot be had everywhere."""

    name: str
    text: str
    prepare: Prepare
    is_simulated: bool = True


@dataclass(frozen=True)
class Arm:
    """A setting, and how its loads went."""

    io: Literal["auto", "buffered", "direct"]
    workers: int | Literal["auto"]
    walls_s: list[float] = field(default_factory=list[float])
    decisions: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])

    @property
    def name(self) -> str:
        return "auto" if self.io == "auto" else f"{self.io}, {self.workers}"

    @property
    def median_s(self) -> float:
        return statistics.median(self.walls_s)

    def config(self) -> LoaderConfig:
        values: dict[str, Any] = {
            "strategy": "stream",  # what is in the page cache would be mapped
            "prefetch": {"io": self.io, "workers": self.workers},
            "device": {"target": "cpu"},
        }
        return LoaderConfig(**values)


@dataclass(frozen=True)
class Result:
    """`skipped`: why there are no figures."""

    situation: Situation
    arms: list[Arm]
    skipped: str | None = None

    @property
    def best(self) -> Arm:
        most = max(len(arm.walls_s) for arm in self.arms)
        finalists = [arm for arm in self.arms if arm.io != "auto" and len(arm.walls_s) == most]
        return min(finalists, key=lambda arm: arm.median_s)

    @property
    def verdict(self) -> str:
        if self.skipped is not None:
            return f"skipped: {self.skipped}"
        best, found_s = self.best, self.arms[-1].median_s
        ratio = f"{found_s / best.median_s:.2f} times the median of `{best.name}`"
        if found_s <= best.median_s * (1 + TOLERANCE):
            return f"yes: auto took {ratio}, within {TOLERANCE:.0%}"
        if found_s <= max(best.walls_s):
            return f"yes: auto took {ratio}, inside its spread ({min(best.walls_s):.2f} to {max(best.walls_s):.2f} s)"
        return f"no: auto took {ratio}"


# Sources


@contextmanager
def warm(checkpoint: Checkpoint) -> Generator[Path, None, None]:
    if pagecache.resident_share(checkpoint.paths) < 1.0:
        read_ceiling(checkpoint.paths, num_threads=2, direct=False)
    yield checkpoint.folder


@contextmanager
def cold(checkpoint: Checkpoint) -> Generator[Path, None, None]:
    pagecache.drop(checkpoint.paths)
    share = pagecache.resident_share(checkpoint.paths)
    if share > 0.01:
        raise Skipped(f"{share:.0%} of the files stayed in the page cache")
    yield checkpoint.folder


def simulated(behaviour: Behaviour) -> Prepare:
    @contextmanager
    def prepare(checkpoint: Checkpoint) -> Generator[Path, None, None]:
        with warm(checkpoint) as folder, mounted(folder, behaviour) as mount:  # the disk below takes no part
            yield mount.path

    return prepare


SITUATIONS = (
    Situation("warm", "warm page cache, on the disk", warm, is_simulated=False),
    Situation("cold", "cold page cache, on the disk", cold, is_simulated=False),
    Situation("direct", "simulated: O_DIRECT reads are faster than buffered ones", simulated(DIRECT_WINS)),
    Situation("late", "simulated: every read takes long, more workers pay", simulated(Behaviour(LATE, LATE))),
    Situation("crowded", "simulated: slower with more workers", simulated(Behaviour(CROWDED, CROWDED))),
)


# Measuring


def write_checkpoint(folder: Path, num_bytes: int, *, num_shards: int = 4) -> Checkpoint:
    """Write a checkpoint of about so many random bytes, unless it is there."""
    target = folder / f"sources-{num_bytes // 2**20}"
    names = [f"layers.{number}.weight" for number in range(num_bytes // TENSOR_BYTES)]
    files = [f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors" for shard in range(num_shards)]
    index = target / "model.safetensors.index.json"
    if not index.exists():
        target.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        for shard, file in enumerate(files):
            part = names[shard::num_shards]
            save_file(
                {name: torch.rand(TENSOR_BYTES // 4096, 1024, generator=generator) for name in part}, target / file
            )
        weight_map = {name: files[number % num_shards] for number, name in enumerate(names)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with open_checkpoint(target) as opened:
        return Checkpoint(target, tuple(opened.tensors.values()), tuple(shard.path for shard in opened.shards))


def load(checkpoint: Checkpoint, path: Path, config: LoaderConfig) -> LoadReport:
    """Load into a new model on meta, and check every byte."""
    model = model_for(checkpoint.specs)
    touch(checkpoint.num_bytes)
    report = load_sync(model, path, config=config)
    parameters = dict(model.named_parameters())
    for shard, file in enumerate(checkpoint.paths):
        stored = np.memmap(file, dtype=np.uint8, mode="r")
        for spec in checkpoint.specs:
            if spec.shard == shard:
                loaded = parameters[spec.name].detach().view(-1).view(torch.uint8).numpy()
                if not np.array_equal(loaded, stored[spec.begin : spec.end]):
                    sys.exit(f"{config.prefetch}: {spec.name} differs from what is in {file}")
    return report


def measure(situation: Situation, checkpoint: Checkpoint, repetitions: int) -> Result:
    """Measure all arms of a situation once, then the fastest and auto in turn, each time in another order."""
    fixed = [Arm(io, workers) for io in FIXED_IO for workers in WORKERS]
    auto = Arm("auto", "auto")
    reason = why_not() if situation.is_simulated else None
    if reason is not None:
        return Result(situation, [], reason)
    order = random.Random(0)
    contenders = [*fixed, auto]
    try:
        for repetition in range(repetitions):
            for arm in order.sample(contenders, len(contenders)):
                with situation.prepare(checkpoint) as path:
                    report = load(checkpoint, path, arm.config())
                arm.walls_s.append(report.wall_s)
                arm.decisions.append(report.decisions)
                done = f"{situation.name} {repetition + 1} of {repetitions}"
                print(f"{done}: {arm.name}: {report.wall_s:.3f} s", file=sys.stderr)
            contenders = [*sorted(fixed, key=lambda arm: arm.walls_s[0])[:NUM_FINALISTS], auto]
    except Skipped as reason_:
        return Result(situation, [], str(reason_))
    return Result(situation, [*fixed, auto])


# Telling


def machine() -> str:
    """Say what this was measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return (
        f"{usable_cores()} cores, {platform.system()} {kernel_release()}, Python {platform.python_version()},"
        f" torch {torch.__version__}, {dt.datetime.now(tz=dt.UTC):%Y-%m-%d},"
        f" commit {commit.stdout.strip() or 'unknown'}"
    )


def table(result: Result, num_bytes: int) -> str:
    """Write a situation as Markdown: a row for each way to read, a column for each number of workers."""
    lines = [f"## {result.situation.name}: {result.situation.text}", ""]
    if result.arms:
        columns: Sequence[int | str] = WORKERS
        lines += [
            f"Seconds for {num_bytes / 2**20:.0f} MiB; median (min to max) of those that were measured again.",
            "",
            f"| workers | {' | '.join(map(str, columns))} |",
            f"|---|{'---|' * len(columns)}",
        ]
        for io in FIXED_IO:
            row = [arm for arm in result.arms if arm.io == io]
            lines.append(f"| {io} | {' | '.join(_cell(arm, is_best=arm is result.best) for arm in row)} |")
        lines.append("")
        for arm in result.arms:
            if arm.io == "auto":
                lines += [f"auto: {_cell(arm, is_best=False)}. What it decided in the middle one of its loads:", ""]
                lines += [f"- {sentence}" for sentence in arm.decisions[_middle(arm.walls_s)]]
                lines.append("")
    lines += [f"Auto as good as the best fixed setting: {result.verdict}.", ""]
    return "\n".join(lines)


def _middle(walls_s: list[float]) -> int:
    """Return the number of the load with the median time, or the one below."""
    return sorted(range(len(walls_s)), key=walls_s.__getitem__)[(len(walls_s) - 1) // 2]


def _cell(arm: Arm, *, is_best: bool) -> str:
    mark = "**" if is_best else ""
    spread = f" ({min(arm.walls_s):.2f} to {max(arm.walls_s):.2f})" if len(arm.walls_s) > 1 else ""
    return f"{mark}{arm.median_s:.2f}{mark}{spread}"


def as_data(result: Result) -> dict[str, Any]:
    arms = [{**dataclasses.asdict(arm), "name": arm.name, "median_s": arm.median_s} for arm in result.arms]
    return {
        "situation": result.situation.name,
        "text": result.situation.text,
        "verdict": result.verdict,
        "best": result.best.name if result.arms else None,
        "arms": arms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scratch = Path(tempfile.gettempdir()) / "weightstream-benchmarks"
    names = [situation.name for situation in SITUATIONS]
    parser.add_argument("--folder", type=Path, default=scratch, help="where the checkpoints are, or are written to")
    parser.add_argument("--out", type=Path, default=scratch, help="where sources.md and sources.json are written to")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="situations; all if left out")
    options = parser.parse_args()
    results: list[Result] = []
    head = f"# Sources\n\n{machine()}, {options.repetitions} rounds. `python -m benchmarks.sources`.\n"
    print(head)
    texts = [head]
    for situation in SITUATIONS:
        if situation.name in options.only:
            checkpoint = write_checkpoint(options.folder, NUM_BYTES)
            results.append(measure(situation, checkpoint, options.repetitions))
            texts.append(table(results[-1], checkpoint.num_bytes))
            print(texts[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sources.md").write_text("\n".join(texts))
    data = {"machine": machine(), "repetitions": options.repetitions, "results": list(map(as_data, results))}
    (options.out / "sources.json").write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
