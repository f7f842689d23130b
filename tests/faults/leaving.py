"""Programs that end in the middle of a load, each a child of one that has imported everything and done nothing.

    python leaving.py CHECKPOINT COUNT DEVICE

Loads go to DEVICE, as torch writes it. Every way to end is tried so often. What is printed is JSON: for each way, how its processes ended and what they wrote.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import weightstream as ws
from weightstream.cli import main as main_of_command
from weightstream.device.stage import DeviceStage
from weightstream.prefetch.source import ByteRange, FileSource

#: The exit code (negative: the signal), and whether Python prints a traceback.
EXPECTED: dict[str, tuple[int, bool]] = {
    "iterator, end of main": (0, False),
    "iterator, sys.exit": (3, False),
    "iterator, exception": (1, True),
    "iterator in torch, end of main": (0, False),
    "iterator in torch, sys.exit": (3, False),
    "daemon thread, end of main": (0, False),
    "daemon thread, sys.exit": (3, False),
    "loader, sys.exit": (3, False),
    "loader, exception": (1, True),
    "loader, stream begun, sys.exit": (3, False),
    "loader left open": (0, False),
    "stream left open": (0, False),
    "load_sync, SIGINT": (-signal.SIGINT, True),
    "load_sync, SIGTERM": (-signal.SIGTERM, False),
    "load, SIGTERM": (-signal.SIGTERM, False),
    "load, SIGINT": (-signal.SIGINT, True),
    "load_sync, twice SIGINT": (-signal.SIGINT, True),
    "load, twice SIGINT": (-signal.SIGINT, True),
    "iterator begun, twice SIGINT": (-signal.SIGINT, True),
    "stream, twice SIGINT": (-signal.SIGINT, True),
    "command, twice SIGINT": (130, False),
}

#: How long after the first of two signals the second comes, at most: when all has been cleaned up, the process ends.
LONGEST_S = 0.03

CONFIG = ws.LoaderConfig.model_validate(
    {
        "strategy": "stream",
        "prefetch": {"io": "buffered", "chunk": "64KiB", "workers": 4, "host_memory": "2MiB"},
        "device": {"target": sys.argv[-1] if __name__ == "__main__" else "cpu"},
    }
)

#: How long after the first of two signals the second comes: another time for each child.
delay_s = LONGEST_S / 3

reading = threading.Event()
_read = FileSource.read


def read_slowly(self: FileSource, wanted: ByteRange, buffers: list[memoryview]) -> None:
    """Between the kernel and Python all the time: what ends badly while an interpreter goes away."""
    reading.set()
    for _ in range(20):
        _read(self, wanted, buffers)
        time.sleep(0)
    time.sleep(0.002)


in_torch = threading.Event()
_take = DeviceStage.take


def take_slowly(self: DeviceStage, places: Sequence[int]) -> list[torch.Tensor]:
    """Be in torch, and not in Python, nearly all the time: where a thread must not be when the interpreter goes away."""
    matrix = torch.ones(1000, 1000)
    in_torch.set()
    torch.matmul(matrix, matrix)
    return _take(self, places)


def model() -> nn.Module:
    return nn.ParameterDict({f"w{i}": nn.Parameter(torch.empty(2**18, device="meta")) for i in range(64)})


def end(how: str) -> None:
    """Come to the end that is asked for."""
    if how.endswith("sys.exit"):
        sys.exit(3)
    if how.endswith("exception"):
        raise ArithmeticError
    if "twice" in how:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(delay_s)
    if how.endswith(("SIGINT", "SIGTERM")):
        os.kill(os.getpid(), signal.SIGINT if how.endswith("SIGINT") else signal.SIGTERM)


def end_soon(how: str) -> None:
    """Come to it, from another thread, once something is being read."""

    def wait() -> None:
        reading.wait()
        end(how)

    threading.Thread(target=wait, daemon=True).start()


async def with_loader(how: str, path: str) -> None:
    if "stream begun" in how:
        loader = await ws.Loader(CONFIG).__aenter__()
        globals()["kept"] = loader, loader.stream(path)
        end(how)  # before the loop has run anything else
    async with ws.Loader(CONFIG) as loader:
        await loader.start(model(), path)
        reading.wait()
        end(how)


async def awaited(how: str, path: str) -> None:
    if "twice" not in how:
        end_soon(how)
    if how.startswith("stream"):
        async with ws.Loader(CONFIG) as loader, loader.stream(path) as stream:
            async for _ in stream:
                pass
    await ws.load(model(), path, config=CONFIG)


def lead_to_two(how: str, path: str) -> None:
    """Do something that two signals end."""
    end_soon(how)
    if how.startswith("load_sync"):
        ws.load_sync(model(), path, config=CONFIG)
    elif how.startswith("iterator"):
        for _ in ws.iter_tensors(path, CONFIG):
            pass
    elif how.startswith("command"):
        config = Path(path) / "config.yaml"
        config.write_text(f"checkpoint: {path}\n")
        sys.argv[1:] = ["warm", str(config), "--to", "page-cache", "--quiet"]
        main_of_command()
    else:
        asyncio.run(awaited(how, path))


async def left_open(how: str, path: str) -> tuple[object, ...]:
    loader = await ws.Loader(CONFIG).__aenter__()
    if how.startswith("stream"):
        stream = loader.stream(path)
        return loader, stream, await anext(stream)
    handle = await loader.start(model(), path)
    reading.wait()
    return loader, handle


def lead(how: str, path: str) -> None:
    """Begin a load, and end while it is in its middle."""
    FileSource.read = read_slowly  # type: ignore[assignment,method-assign]  # see there
    if "twice" in how:
        lead_to_two(how, path)
    elif how.startswith("iterator"):
        if how.startswith("iterator in torch"):
            DeviceStage.take = take_slowly  # type: ignore[method-assign]  # see there
        globals()["kept"] = tensors = ws.iter_tensors(path, CONFIG)
        next(tensors)
        in_torch.clear()
        if how.startswith("iterator in torch"):
            in_torch.wait()
    elif how.startswith("daemon"):
        threading.Thread(target=ws.load_sync, args=(model(), path), kwargs={"config": CONFIG}, daemon=True).start()
        reading.wait()
    elif how.startswith("load_sync"):
        end_soon(how)
        ws.load_sync(model(), path, config=CONFIG)
    elif how.startswith("load,"):
        asyncio.run(awaited(how, path))
    elif how.startswith("loader,"):
        asyncio.run(with_loader(how, path))
    else:
        loop = asyncio.new_event_loop()
        globals()["kept"] = (loop, loop.run_until_complete(left_open(how, path)))
    end(how)


def main() -> None:
    path, count, _ = sys.argv[1:]
    found: dict[str, list[tuple[int, str]]] = {}
    global delay_s  # noqa: PLW0603 (the children have it from here)
    for number, how in enumerate(list(EXPECTED) * int(count)):
        if int(count) > 1:
            delay_s = LONGEST_S * (number // len(EXPECTED)) / int(count)
        with tempfile.TemporaryFile("w+") as written:
            child = os.fork()
            if not child:
                os.dup2(written.fileno(), 2)
                faulthandler.enable()
                lead(how, path)
                return  # to the end of the program, where the interpreter goes away
            _, status = os.waitpid(child, 0)
            written.seek(0)
            found.setdefault(how, []).append((os.waitstatus_to_exitcode(status), written.read()))
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
