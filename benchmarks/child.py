"""One load in a fresh process: `python -m benchmarks.child JOB`, which `run` starts. Prints one line of JSON.

In this order: import what the arm uses; build its model; let the arm prepare; collect garbage; bring the files into the
page cache or out of it, and touch memory; ask mincore; then the clock, the load, the clock. Afterwards: what kind of
memory the parameters are in, the first read of every byte, and the comparison of every parameter with the files.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from benchmarks.arms import Arm, Case, SkippedError
from benchmarks.checkpoints import Recipe, build, shards_of
from benchmarks.memory import (
    cpu_seconds,
    mapped_file_bytes,
    read_every_byte,
    reset_peak,
    status_bytes,
    touch,
)
from benchmarks.registry import all_arms
from benchmarks.residency import evict, fill
from benchmarks.verify import verify
from weightstream import pagecache

__all__ = ["Job", "measure"]

Cache = Literal["cold", "warm"]

#: Touched beside what an arm needs: for buffers, modules and views, whose size does not grow with the tensors'.
_SLACK_BYTES = 256 * 2**20
#: Touched at most for a load to a GPU: more than any loader stages with.
_STAGING_BYTES = 4 * 2**30
#: Warm means that at least so much of the files is in the page cache.
_WARM = 0.99
#: Filled means that so much of the checkpoint's bytes is in anonymous memory.
_FILLED = 0.95


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What one process measures: an arm, by key, a checkpoint, the state of the page cache, and a device."""

    arm: str
    recipe: Recipe
    path: str
    cache: Cache
    device: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**values | {"recipe": Recipe(**values["recipe"])})


def measure(job: Job) -> dict[str, Any]:
    """Do the job, and return what was found; `status` is done, skipped, or invalid (the page cache was not as asked)."""
    arm = all_arms()[job.arm]
    path = Path(job.path)
    case = Case(job.recipe, path, shards_of(path), torch.device(job.device))
    case.files = case.shards
    with case.cleanup:
        try:
            for name in ("torch", *arm.imports):
                import_module(name)
            if arm.begins != "nothing":
                case.start = build(job.recipe, case.device if arm.begins == "allocated" else "meta")
            if arm.prepare is not None:
                arm.prepare(case)
        except ValidationError as error:  # of a configuration that this version of weightstream does not know
            return {"status": "skipped", "reason": f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}"}
        except (ImportError, SkippedError) as error:
            return {"status": "skipped", "reason": str(error).splitlines()[0]}
        share = _make_ready(arm, case, job.cache)
        if share > 0 if job.cache == "cold" else share < _WARM:
            return {"status": "invalid", "reason": f"not {job.cache}: {share:.2%} of the files are in the page cache"}
        found, model = _time(arm, case)
        if model is not None:
            found |= _look_at(model, case, found["anonymous_bytes"])
    return {
        "status": "done",
        "num_bytes": case.num_bytes,
        "version": version(arm.package),
        "report": {**case.report, "checkpoint": case.path.name} if case.report else {},  # no path of this machine
        **found,
    }


def _make_ready(arm: Arm, case: Case, cache: Cache) -> float:
    """Prepare memory and the page cache; return the share of the files that is in it now."""
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.synchronize(case.device)  # the context is there, and what `build` has begun is done
    settle = evict if cache == "cold" else fill
    settle(case.files)
    needed = int(arm.memory * case.num_bytes)
    if case.device.type == "cuda" and arm.group != "ceiling":
        needed = min(needed, _STAGING_BYTES)  # weights go to the device
    touch(needed + _SLACK_BYTES)
    settle(case.files)  # some kernels take pages away that nobody has used for some seconds
    return pagecache.resident_share(case.files)


def _time(arm: Arm, case: Case) -> tuple[dict[str, Any], nn.Module | None]:
    """Load, and return seconds and memory. Memory counts from before the model: its own, if allocated, is part of it."""
    on_host = 0
    if arm.begins == "allocated" and case.device.type == "cpu":
        on_host = sum(parameter.nbytes for parameter in case.model.parameters())
    num_modules = len(sys.modules)
    reset_peak()
    before, anonymous = status_bytes("VmRSS"), status_bytes("RssAnon")
    cpu, begin = cpu_seconds(), time.perf_counter()
    model = arm.load(case)
    if case.device.type == "cuda":
        torch.cuda.synchronize(case.device)
    wall, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    return {
        "wall_s": wall if case.wall_s is None else case.wall_s,
        "cpu_s": cpu,
        "num_imports": len(sys.modules) - num_modules,
        "peak_bytes": status_bytes("VmHWM") - before + on_host,
        "anonymous_bytes": status_bytes("RssAnon") - anonymous + on_host,
    }, model


def _look_at(model: nn.Module, case: Case, anonymous_bytes: int) -> dict[str, Any]:
    """Say whether the parameters are really filled, read every byte of them, and compare them with the files."""
    parameters = list(model.parameters())
    found: dict[str, Any] = {"filled": True, "first_read_s": 0.0}
    if case.device.type == "cpu":
        mapped = mapped_file_bytes(parameters)
        found |= {"filled": anonymous_bytes >= _FILLED * case.num_bytes and mapped == 0, "mapped_bytes": mapped}
        begin = time.perf_counter()
        read_every_byte(parameters)
        found["first_read_s"] = time.perf_counter() - begin
    found["num_checked"] = verify(model, case.shards, case.device)
    return found


def main() -> None:
    results = os.dup(1)
    os.dup2(2, 1)  # what libraries print is not the result
    found = measure(Job.from_json(sys.argv[1]))
    with os.fdopen(results, "w") as stream:
        stream.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
