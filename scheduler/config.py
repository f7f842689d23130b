"""Settings of the scheduler: the section `scheduler` of the YAML file, and what a `Loader` needs to know in all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from weightstream.device.config import DeviceConfig
from weightstream.prefetch.config import NO_BOOL, PrefetchConfig

__all__ = ["SchedulerConfig", "Settings", "Strategy"]

#: How a checkpoint gets into the model. `auto` decides and says why in the report.
Strategy = Literal["auto", "stream", "preload", "direct", "map"]


class SchedulerConfig(BaseModel):
    """What is read when, and how long a load may take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: Literal["model", "file"] = Field(
        default="model",
        description="`model`: chunks in the order in which the model's modules are registered, so that early layers "
        "are ready first. `file`: shard by shard, from the first byte to the last.",
    )
    adaptive: bool = Field(
        default=True,
        description="Follow what is measured while loading: how many reads go on at a time (where prefetch.workers is "
        "`auto`) and how many bytes one read fetches. false: both stay as they are in the beginning.",
    )
    timeout_s: Annotated[float, Field(gt=0, le=366 * 24 * 3600, allow_inf_nan=False), NO_BOOL] | None = Field(
        default=None,
        description="Seconds (a year at most) after which a load fails with LoadTimeoutError, counted from its start. "
        "They cover the preflight, reading and copying: modules that load themselves are not interrupted. null: never.",
    )


class Settings(Protocol):
    """The part of the front door's `LoaderConfig` that loading needs (this package may not import the front door)."""

    @property
    def checkpoint(self) -> Path | None: ...
    @property
    def strategy(self) -> Strategy: ...
    @property
    def prefetch(self) -> PrefetchConfig: ...
    @property
    def scheduler(self) -> SchedulerConfig: ...
    @property
    def device(self) -> DeviceConfig: ...
