"""The other event loop: a load, one that is cancelled, one whose time is up, and a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from tests.builders import assert_same, leaves_nothing, write_checkpoint
from tests.fakes.rig import Rig
from tests.models import SmallNet, tensors_of
from weightstream.errors import LoadTimeoutError

uvloop = pytest.importorskip("uvloop")

TENSORS = tensors_of(SmallNet())


def on_meta() -> SmallNet:
    with torch.device("meta"):
        return SmallNet()


async def load(rig: Rig, path: Path) -> None:
    model = on_meta()
    async with rig.loader() as loader:
        await loader.load(model, path)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, TENSORS[name])


async def cancel(rig: Rig, path: Path) -> None:
    gate = rig.disk.stop_at(0, is_stuck=True)
    model = on_meta()
    async with rig.loader() as loader:
        task = asyncio.create_task(loader.load(model, path))
        while not rig.disk.num_begun:  # noqa: ASYNC110 (a reader's thread counts them)
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(parameter.is_meta for parameter in model.parameters())
        gate.open()


async def time_out(rig: Rig, path: Path) -> None:
    gate = rig.disk.stop_at(0, is_stuck=True)
    async with rig.loader(scheduler={"timeout_s": 7.0}) as loader:
        with pytest.raises(LoadTimeoutError):
            await loader.load(on_meta(), path)
        gate.open()


async def stream(rig: Rig, path: Path) -> None:
    async with rig.loader() as loader, loader.stream(path) as tensors:
        found = {name: tensor async for name, tensor in tensors}
    assert found.keys() == TENSORS.keys()
    for name, tensor in found.items():
        assert_same(tensor, TENSORS[name])


@pytest.mark.parametrize("work", [load, cancel, time_out, stream])
def test_loads_do_on_uvloop_what_they_do_on_asyncio(
    make_rig: Callable[[str], Rig], tmp_path: Path, work: Callable[[Rig, Path], Awaitable[None]]
) -> None:
    rig = make_rig("fake")
    path = write_checkpoint(tmp_path / "c", TENSORS)

    async def main() -> None:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        await work(rig, path)

    uvloop.run(asyncio.sleep(0))  # the first loop opens what stays open for all that come
    with leaves_nothing():
        uvloop.run(main())
