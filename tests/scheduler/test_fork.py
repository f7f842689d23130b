"""What a forked child finds of its parent's loads: it can use nothing of them, and has nothing to wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightstream as ws
from tests.fakes.rig import Rig
from weightstream.scheduler.handle import LoadHandle, TensorStream

CONFIG = ws.LoaderConfig.model_validate(
    {
        "strategy": "stream",
        "prefetch": {"io": "buffered", "chunk": "64KiB", "workers": 2, "host_memory": "1MiB"},
        "device": {"target": "cpu"},
    }
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """More than readers may be ahead."""
    save_file({f"w{i}": torch.zeros(2**16) for i in range(40)}, tmp_path / "model.safetensors")
    return tmp_path


def model() -> nn.Module:
    return nn.ParameterDict({f"w{i}": nn.Parameter(torch.empty(2**16, device="meta")) for i in range(40)})


def in_child(action: Callable[[], object]) -> str:
    """Return what an action returns or raises in a forked child; nothing if it hangs there."""
    told, tell = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: what is tested here
        child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        try:
            found = f"returned {action()}"
        except BaseException as error:  # noqa: BLE001 (it is told)
            found = f"{type(error).__name__}: {error}"
        os.write(tell, found.encode())
        os._exit(0)
    os.close(tell)
    with os.fdopen(told) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return found


def at_once(coroutine: Coroutine[Any, Any, object]) -> object:
    """Run a coroutine that must not wait. In a child no event loop runs."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    return "waits"


async def first_event(handle: LoadHandle) -> ws.Progress:
    return await anext(handle.events())


def is_refusal(found: str) -> bool:
    return found.startswith("RuntimeError: this Loader, load or iterator was made in process") and "forked" in found


def test_iterator_is_used_and_closed_in_a_child(path: Path) -> None:
    tensors = ws.iter_tensors(path, CONFIG)
    next(tensors)
    assert is_refusal(in_child(lambda: next(tensors)))
    assert in_child(tensors.close) == "returned None"  # type: ignore[attr-defined]  # it is a generator
    assert sum(1 for _ in tensors) == 39


def test_blocking_load_goes_on_in_the_parent_alone(path: Path) -> None:
    """`on_progress` is the one place where the thread that waits for it can fork."""
    found: list[str] = []

    def fork(_: ws.Progress) -> None:
        if not found:
            found.append(in_child(lambda: ws.load_sync(model(), path, config=CONFIG).num_tensors))

    assert ws.load_sync(model(), path, config=CONFIG, on_progress=fork).num_tensors == 40
    assert found == ["returned 40"]  # a load of the child's own


async def test_handle_in_a_child(rig: Rig, path: Path) -> None:
    gate = rig.disk.stop_at(1)
    async with rig.loader(workers=1) as loader:
        handle = await loader.start(model(), path)
        gate.wait_reached()
        uses: list[Callable[[LoadHandle], Coroutine[Any, Any, object]]] = [
            LoadHandle.wait,
            LoadHandle.ready,
            LoadHandle.cancel,
            first_event,
        ]
        for use in uses:
            assert is_refusal(in_child(lambda use=use: at_once(use(handle)))), use  # type: ignore[misc]  # bound now
        assert is_refusal(in_child(lambda: handle.progress))
        assert is_refusal(in_child(lambda: at_once(loader.load(model(), path))))
        assert in_child(lambda: at_once(loader.__aexit__(None, None, None))) == "returned None"
        gate.open()
        assert (await handle.wait()).num_tensors == 40


async def test_stream_in_a_child(rig: Rig, path: Path) -> None:
    gate = rig.disk.stop_at(1)
    async with rig.loader(workers=1) as loader:
        stream = loader.stream(path)
        gate.wait_reached()
        for use in (TensorStream.__anext__, TensorStream.report):
            assert is_refusal(in_child(lambda use=use: at_once(use(stream)))), use  # type: ignore[misc]  # bound now
        assert is_refusal(in_child(lambda: stream.progress))
        with stream._sink._lock:  # a thread that the child does not have may hold it
            assert in_child(lambda: at_once(stream.aclose())) == "returned None"
        gate.open()
        assert len([name async for name, _ in stream]) == 40


PROGRAM = """
import asyncio, os, signal, sys
import weightstream as ws
from tests.scheduler.test_fork import CONFIG, model

def fork():
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        os._exit(0)
    signal.alarm(20)

async def leave(opens):
    async with ws.Loader(CONFIG) as loader:
        if opens:
            kept = loader.stream(sys.argv[2]), await loader.start(model(), sys.argv[2])
            await anext(kept[0])
        fork()

if sys.argv[1] == "iterator":
    tensors = ws.iter_tensors(sys.argv[2], CONFIG)
    next(tensors)
    fork()
else:
    asyncio.run(leave(sys.argv[1] == "busy"))
sys.exit(3)
"""


@pytest.mark.parametrize("what", ["iterator", "idle", "busy"])
def test_child_ends_by_itself(path: Path, what: str) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM, what, str(path)]
    done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("3\n", "")
