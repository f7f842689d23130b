"""What an arm of the comparison is: a loader, how its model begins, and what it needs. They are in `ours` and `peers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.checkpoints import Recipe, build

__all__ = ["Arm", "Case", "SkippedError"]

Group = Literal["weightstream", "peer", "ceiling"]


class SkippedError(Exception):
    """This arm cannot run here; the message says why."""


@dataclass(slots=True)
class Case:
    """One load, in the process that was started for it.

    Attributes:
        recipe, path, shards: the checkpoint.
        files: what will be read, and so must be in the page cache or out of it: the shards, unless `prepare` changes it.
        device: where the parameters go.
        start: the model that is loaded into; None where the arm builds its own.
        state: what `prepare` leaves for `load`.
        cleanup: what is closed at the end.
        report: what the loader itself says about the load.
        wall_s: the time of the load where the loader takes it, None: the clock around the call.
    """

    recipe: Recipe
    path: Path
    shards: Sequence[Path]
    device: torch.device
    files: Sequence[Path] = ()
    start: nn.Module | None = None
    state: Any = None
    cleanup: ExitStack = field(default_factory=ExitStack)
    report: dict[str, Any] = field(default_factory=dict)
    wall_s: float | None = None

    @property
    def model(self) -> nn.Module:
        assert self.start is not None, "this arm has asked for no model"
        return self.start

    @property
    def num_bytes(self) -> int:
        """The size of the shards."""
        return sum(shard.stat().st_size for shard in self.shards)

    def build(self) -> nn.Module:
        """Return one more model on meta."""
        return build(self.recipe)


@dataclass(frozen=True, slots=True)
class Arm:
    """A way of loading a checkpoint.

    Attributes:
        key: its name on the command line and in the JSON.
        title: its name in tables and charts.
        group: whose it is.
        load: what the clock is around; returns the loaded model, or None where bytes are read and nothing is kept.
        begins: whether parameters are on meta, or are allocated (and written to, so that their memory is there), when the
            clock starts; `nothing`: building the model is part of the load.
        package: the distribution that must be installed, for its version too.
        imports: modules that are imported before the clock starts.
        prepare: work before the clock starts: converting, opening, a first load.
        families: which recipes it can load.
        devices: which devices it can load to.
        caches: in which states of the page cache it is of interest.
        default: whether it runs without being asked for.
        memory: what it needs beside the model as built, as a multiple of the checkpoint; so much is touched beforehand.
    """

    key: str
    title: str
    group: Group
    load: Callable[[Case], nn.Module | None]
    begins: Literal["meta", "allocated", "nothing"] = "meta"
    package: str = "weightstream"
    imports: tuple[str, ...] = ()
    prepare: Callable[[Case], None] | None = None
    families: tuple[str, ...] = ("experts",)
    devices: tuple[str, ...] = ("cpu", "cuda")
    caches: tuple[str, ...] = ("cold", "warm")
    default: bool = True
    memory: float = 1.25

    def why_not(self) -> str | None:
        """Return why this arm cannot run in this environment, or None."""
        try:
            version(self.package)
        except PackageNotFoundError:
            return f"{self.package} is not installed"
        return None
