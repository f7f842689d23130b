"""`weightstream warm`: load a checkpoint from the command line."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import anyio
import anyio.to_thread

from weightstream.config import LoaderConfig
from weightstream.display import Display
from weightstream.drawing import save_timeline

if TYPE_CHECKING:
    from torch import nn

    from weightstream.scheduler.handle import LoadHandle
    from weightstream.scheduler.report import LoadReport

__all__ = ["Destination", "follow", "in_thread", "reading", "warm"]

T = TypeVar("T")

#: How far a checkpoint is taken.
Destination = Literal["page-cache", "host", "device"]


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """Call a function on another thread, which is left behind if the waiting task is cancelled."""
    return await anyio.to_thread.run_sync(functools.partial(function, *args), abandon_on_cancel=True)


def reading(config: LoaderConfig) -> LoaderConfig:
    """Return the settings of a load that shows or measures how bytes are read: `stream`, where `auto` might map them."""
    return config.model_copy(update={"strategy": "stream"}) if config.strategy == "auto" else config


async def follow(handle: LoadHandle, display: Display, names: tuple[str, ...]) -> LoadReport:
    """Show a load until it ends: bytes read under the first name, bytes placed under the second, if there is one."""
    with display.meters(names) as update:
        async for progress in handle.events():
            counts = progress.bytes_read, progress.bytes_placed
            update(
                progress.total_bytes,
                *counts[: len(names)],
                current=progress.current_module,
                mapped_bytes=progress.mapped_bytes,
            )
    return await handle.wait()


async def warm(
    config: LoaderConfig,
    to: Destination,
    display: Display,
    *,
    timeline: Path | None,
    on_report: Callable[[LoadReport], None],
    on_hold: Callable[[], None] | None,
) -> None:
    """Load what the configuration names.

    Args:
        config: names the checkpoint, and the model unless `to` is the page cache.
        to: where to.
        display: shows progress.
        timeline: a file for what happened when, written before `on_report`. None: it is not recorded.
        on_report: told the result.
        on_hold: called when the weights are there, which are then held until this is cancelled. None: they are not.

    Raises:
        WeightstreamError, ConfigurationError, BuildError: see `Loader.load` and `building.build_model`.
        OSError: the timeline cannot be written.
    """
    with display.step("importing torch"):
        await in_thread(importlib.import_module, "weightstream.api")
        await in_thread(importlib.import_module, "weightstream.building")
    from weightstream.api import Loader  # noqa: PLC0415 - this thread runs the event loop, which answers Ctrl-C
    from weightstream.scheduler.timeline import Recorder  # noqa: PLC0415

    recorder = None if timeline is None else Recorder()
    async with Loader(config) as loader:
        names: tuple[str, ...] = ("disk",)
        if to == "page-cache":
            with display.step("checking the checkpoint"):
                handle = await loader.start_warm(recorder=recorder)
        else:
            with display.step(f"building the model: {config.model}"):
                model, device = await in_thread(_build, config)
            names = ("disk", device)
            with display.step("checking the checkpoint"):
                handle = await loader.start(model, recorder=recorder)
        report = await follow(handle, display, names)
        if recorder is not None and timeline is not None:
            with display.step(f"writing {timeline}"):
                await in_thread(save_timeline, recorder.timeline(), timeline)
        await in_thread(on_report, report)
        if on_hold is not None:
            on_hold()
            await anyio.sleep_forever()


def _build(config: LoaderConfig) -> tuple[nn.Module, str]:
    from weightstream.building import build_model, target_device  # noqa: PLC0415 - they import torch

    assert config.model is not None
    assert config.checkpoint is not None
    device = target_device(config.device.target)
    return build_model(config.model, config.checkpoint, device, variant=config.prefetch.variant), str(device)
