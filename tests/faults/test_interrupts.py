"""Ctrl-C between any two bytecodes of what runs in the main thread: nothing is left, and the next load works."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightstream as ws
from tests.builders import leaves_nothing
from tests.fakes.interrupts import Countdown, interrupted
from tests.prefetch.test_arena import address_of, is_mapped
from tests.real.families import save_small
from weightstream.integrations.transformers import from_pretrained
from weightstream.prefetch.arena import Arena
from weightstream.prefetch.memory import PAGE_BYTES

CONFIG = ws.LoaderConfig.model_validate({"strategy": "stream", "prefetch": {"workers": 2}, "device": {"target": "cpu"}})

#: Those in which a load is started, waited for and ended.
FILES = tuple(
    f"/{name}.py"
    for name in (
        *("weightstream/api", "loader", "handle", "job", "engine", "staging", "stragglers", "clock", "conversion"),
        *("memory", "arena", "_base"),
    )
)


@pytest.fixture(name="path")
def fixture_path(tmp_path: Path) -> Path:
    save_file({"weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    return tmp_path


def model() -> nn.Module:
    return nn.Linear(4, 4, bias=False, device="meta")


def load_sync(path: Path) -> None:
    ws.load_sync(model(), path, config=CONFIG)


def iterate(path: Path) -> None:
    for _ in ws.iter_tensors(path, CONFIG):
        pass


def leave_an_iterator(path: Path) -> None:
    tensors = ws.iter_tensors(path, CONFIG)
    next(tensors)
    tensors.close()  # type: ignore[attr-defined]  # it is a generator


def load(path: Path) -> None:
    asyncio.run(ws.load(model(), path, config=CONFIG))


def start(path: Path) -> None:
    async def work() -> None:
        async with ws.Loader(CONFIG) as loader:
            handle = await loader.start(model(), path)
            await handle.wait()

    asyncio.run(work())


def stream(path: Path) -> None:
    async def work() -> None:
        async with ws.Loader(CONFIG) as loader, loader.stream(path) as tensors:
            async for _ in tensors:
                pass

    asyncio.run(work())


def fail(path: Path) -> None:
    with contextlib.suppress(ws.MissingKeysError):
        ws.load_sync(nn.Linear(4, 4, device="meta"), path, config=CONFIG)


WAYS: list[Callable[[Path], None]] = [load_sync, iterate, leave_an_iterator, load, start, stream, fail]


def interrupt(action: Callable[[], object], number: int, again: int | None = None) -> Countdown:
    """Interrupt an action at one of its moments, and then at one of what follows; see that it leaves nothing."""
    with interrupted(number, FILES, again) as countdown, leaves_nothing():
        try:
            action()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
            if again is not None:
                sys.settrace(None)
    return countdown


def go_through(action: Callable[[], object], *, step: int = 1) -> int:
    """Interrupt an action at each of its moments, or at every so many-th; return how many there are."""
    action()  # imports
    number = 0
    gc.disable()  # or finalizers of others would have moments too
    try:
        while True:
            countdown = interrupt(action, number)
            if not countdown.where:
                return number
            number += step
    finally:
        gc.enable()


def interrupt_twice(action: Callable[[], object], number: int, step: int) -> int | None:
    """Interrupt an action at one of its moments, and then at every so many-th of what follows; return how many these are.

    None: it has no such moment any more.
    """
    again = num_pairs = 0
    while True:
        countdown = interrupt(action, number, again)
        if not countdown.where:
            return None
        if not countdown.again_where:
            return num_pairs
        num_pairs += 1
        again += step


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # some of it happens in finalizers
def test_interrupted_load_leaves_nothing(path: Path, way: Callable[[Path], None]) -> None:
    assert go_through(lambda: way(path)) > 20


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("way", [load_sync, iterate, leave_an_iterator, fail])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
def test_load_that_is_interrupted_twice_leaves_nothing(path: Path, way: Callable[[Path], None], step: int) -> None:
    """The second time wherever the first is cleaned up after. With an event loop that is for asyncio to survive."""
    way(path)  # imports
    number = num_pairs = 0
    gc.disable()
    try:
        while (found := interrupt_twice(lambda: way(path), number, step)) is not None:
            num_pairs += found
            number += step
    finally:
        gc.enable()
    assert num_pairs > 10


@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("family", ["llama", "mixtral"], ids=["plain", "converted"])
def test_interrupted_from_pretrained_leaves_nothing(tmp_path: Path, family: str, step: int) -> None:
    save_small(family, tmp_path, dtype=torch.float32)
    assert go_through(lambda: from_pretrained(tmp_path, config=CONFIG), step=step) > 50


def test_interrupt_does_not_keep_memory_from_being_unmapped() -> None:
    """The last reference may go anywhere, and so may that to the arena."""
    number = 0
    while True:
        arena = Arena()
        piece = arena.allocate(PAGE_BYTES)
        addresses = [address_of(piece), address_of(piece) + PAGE_BYTES]
        assert all(map(is_mapped, addresses))
        with interrupted(number, ("/memory.py", "/arena.py")) as countdown:
            try:
                del piece
                del arena
            except KeyboardInterrupt:
                pass
            finally:
                sys.setprofile(None)
        assert not any(map(is_mapped, addresses)), countdown.where
        if not countdown.where:
            return
        number += 1
