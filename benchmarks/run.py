"""Runs the arms: each load in a fresh process, all of them in turn, so that a ratio compares neighbours in time.

The machine must be quiet. What cannot run is listed with its reason; what fails once is not tried again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arms import Arm
from benchmarks.checkpoints import Recipe
from benchmarks.child import Cache, Job
from benchmarks.machine import ROOT
from benchmarks.memory import compact

__all__ = ["Series", "Setting", "measure_all", "run_job"]

_ATTEMPTS = 3
_LAST_WORDS = 300


@dataclass(frozen=True, slots=True)
class Setting:
    """A checkpoint, in one state of the page cache, on one device."""

    recipe: Recipe
    path: Path
    cache: Cache
    device: str

    @property
    def title(self) -> str:
        return f"{self.recipe.name}, {self.cache}"


@dataclass(slots=True)
class Series:
    """One arm in one setting: its measurements so far, or the reason why there are none."""

    arm: Arm
    setting: Setting
    results: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "arm": self.arm.key,
            "title": self.arm.title,
            "group": self.arm.group,
            "begins": self.arm.begins,
            "checkpoint": dataclasses.asdict(self.setting.recipe),
            "cache": self.setting.cache,
            "device": self.setting.device,
            "reason": self.reason,
            "results": self.results,
        }


def run_job(job: Job, *, timeout_s: float, python: str = sys.executable) -> dict[str, Any]:
    """Run one job in a fresh process; return its result, or `status` failed and the reason."""
    command = [python, "-m", "benchmarks.child", job.to_json()]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout_s, cwd=ROOT, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"it took more than {timeout_s:.0f} s"}
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"status": "failed", "reason": words[-1].replace(job.path, "")[-_LAST_WORDS:], "stderr": done.stderr}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure_all(
    series: Sequence[Series],
    *,
    num_runs: int,
    deadline_s: float,
    timeout_s: float,
    pythons: Mapping[str, str],
    save: Callable[[], None],
) -> None:
    """Run every series once, in turn, and that `num_runs` times, each time in another order.

    Before each process free memory is put together, where that is allowed.

    Args:
        series: what to measure; results and reasons are put into it.
        num_runs: how often.
        deadline_s: no turn begins that would end later than this, as `time.monotonic` tells the time, judging by the
            longest so far, and no process begins later than this.
        timeout_s: for one process.
        pythons: the interpreters of arms that need another environment than this one.
        save: called after each turn.
    """
    longest = 0.0
    for one in series:
        one.reason = one.arm.why_not()
    for number in range(num_runs):
        turn = time.monotonic()
        if turn + longest > deadline_s:
            _say(f"stopped after {number} of {num_runs} turns: the next would end too late")
            break
        for one in _shuffled(series, number):
            if one.reason is None and time.monotonic() > deadline_s:
                one.reason = "not reached within the time that was given"
            if one.reason is None:
                python = pythons.get(one.arm.key, sys.executable)
                _measure(one, timeout_s=timeout_s, python=python, turn=f"{number + 1}/{num_runs}")
        longest = max(longest, time.monotonic() - turn)
        save()


def _shuffled(series: Sequence[Series], number: int) -> Iterable[Series]:
    """Yield the series setting by setting, each setting's arms in another order every time.

    In a fixed order each arm would always run in what the same neighbour leaves of memory and page cache.
    """
    for setting in dict.fromkeys(one.setting for one in series):
        arms = [one for one in series if one.setting == setting]
        random.Random(number).shuffle(arms)
        yield from arms


def _measure(one: Series, *, timeout_s: float, python: str, turn: str) -> None:
    compact()
    setting = one.setting
    job = Job(one.arm.key, setting.recipe, str(setting.path), setting.cache, setting.device)
    found: dict[str, Any] = {"status": "invalid"}
    for _ in range(_ATTEMPTS):
        if found["status"] == "invalid":
            found = run_job(job, timeout_s=timeout_s, python=python)
    if found["status"] == "done":
        one.results.append(found)
        _say(f"{turn} {setting.title}: {one.arm.key} {found['wall_s']:.3f} s")
        return
    one.reason = f"{found['status']}: {found['reason']}"
    _say(found.get("stderr", ""))
    _say(f"{turn} {setting.title}: {one.arm.key} {one.reason}")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
