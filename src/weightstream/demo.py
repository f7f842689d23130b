"""`weightstream demo`: write a checkpoint, load it, compare every byte, and say what happened.

Owns one folder, `demo` in the user's cache folder for weightstream. It is written under another name and renamed, so
that it is complete if it is there. `demo.lock` beside it is held by whoever writes it (alone) or reads it (with others).
Importing this does not import torch.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import platformdirs
import psutil

from weightstream.config import LoaderConfig
from weightstream.display import Display, MeterUpdate, Output, format_bytes
from weightstream.errors import IntegrityError, WeightstreamError
from weightstream.shutdown import Shutdown
from weightstream.summary import print_facts, print_report, shell_path
from weightstream.warm import follow, in_thread, reading

if TYPE_CHECKING:
    from torch import nn

    from weightstream.scheduler.report import LoadReport

__all__ = ["DemoError", "show"]


class DemoError(WeightstreamError):
    """Raised when the demo's checkpoint cannot be written."""


async def show(display: Display, shutdown: Shutdown, *, fresh: bool) -> None:
    """Run the demo.

    Args:
        display: shows progress.
        shutdown: is told what must not stay behind.
        fresh: write the checkpoint even if it is there.

    Raises:
        DemoError: it cannot be written.
        WeightstreamError: the load failed, or the loaded bytes are wrong.
    """
    given = LoaderConfig(device={"dtype": "model", "strict": True})  # type: ignore[arg-type]  # a mapping leaves the rest
    config = reading(given)
    with display.step("importing torch"):
        await in_thread(importlib.import_module, "weightstream.api")
        await in_thread(importlib.import_module, "weightstream.toy")
    from weightstream import toy  # noqa: PLC0415 - this thread runs the event loop, which answers Ctrl-C
    from weightstream.api import Loader  # noqa: PLC0415

    folder = Path(platformdirs.user_cache_dir("weightstream")) / "demo"
    model = await in_thread(toy.build_on_meta)
    with await in_thread(_open_lock, folder) as lock:
        origin = "there from an earlier run (--fresh writes them anew)"
        await _take(lock, fcntl.LOCK_SH, display)
        while fresh or not await in_thread(toy.is_complete, model, folder):
            await _take(lock, fcntl.LOCK_EX, display)
            if fresh or not await in_thread(toy.is_complete, model, folder):  # another run may just have written it
                fresh = False
                origin = "written now, and kept for the next run"
                with display.meters(["write"]) as update:
                    await in_thread(_write, model, folder, update, shutdown)
            await _take(lock, fcntl.LOCK_SH, display)  # another run may come in between, and be killed: hence the loop
        with display.step("starting the device"):
            device = await in_thread(toy.start_device, config.device.target)
        async with Loader(config) as loader:
            with display.step("checking the checkpoint"):
                handle = await loader.start(model, folder)
            before = await in_thread(_bytes_from_disk)
            report = await follow(handle, display, ("disk", device))
            from_disk = await in_thread(_bytes_from_disk) - before
        with display.meters(["check"]) as update:
            wrong = await in_thread(toy.differences, model, folder, update)
    if wrong:
        raise IntegrityError(
            f"{len(wrong)} tensors differ from what safetensors' own reader finds",
            tensor=wrong[0],
            file=folder,
            hint="This is a bug of weightstream, or the machine's memory or disk is broken: please report it",
        )
    await in_thread(_print, report, folder, origin, from_disk)


async def _take(lock: IO[bytes], kind: int, display: Display) -> None:
    """Take a lock, or exchange the one that is held for another kind; wait for other runs if need be."""
    if not await in_thread(_flock, lock, kind | fcntl.LOCK_NB):
        with display.step("waiting for another demo"):
            await in_thread(_flock, lock, kind)


def _open_lock(folder: Path) -> IO[bytes]:
    with _telling(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder.with_name(f"{folder.name}.lock").open("ab")  # never removed: others may be waiting for it


def _flock(lock: IO[bytes], operation: int) -> bool:
    with _telling(Path(lock.name)):
        try:
            fcntl.flock(lock, operation)
        except BlockingIOError:
            return False
        return True


def _write(model: nn.Module, folder: Path, update: MeterUpdate, shutdown: Shutdown) -> None:
    """Write the checkpoint to `folder`, all of it or nothing."""
    from weightstream import toy  # noqa: PLC0415

    needed = toy.checkpoint_bytes(model)
    with _telling(folder):
        _remove_left_over(folder)
        _check_space(folder.parent, needed)
        with _partial(folder, shutdown) as partial:
            toy.write_checkpoint(model, partial, update)


@contextmanager
def _telling(folder: Path) -> Generator[None, None, None]:
    """Make what the operating system refuses a DemoError."""
    try:
        yield
    except OSError as error:
        raise DemoError(
            f"cannot write the demo's checkpoint: {error.strerror}",
            file=error.filename or folder,
            hint=_HINT,
        ) from error


_HINT = "Set XDG_CACHE_HOME to a folder on a disk with room"


def _check_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise DemoError(
            "the disk has no room for the demo's checkpoint",
            file=parent,
            expected=f"{format_bytes(needed)} free",
            actual=format_bytes(free),
            hint=_HINT,
        )


@contextmanager
def _partial(folder: Path, shutdown: Shutdown) -> Generator[Path, None, None]:
    """Yield a new folder beside `folder`, which becomes `folder` at the end, or else is removed."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")

    def remove() -> None:
        # The writing thread may make one more file between the listing of the folder and its removal.
        for _ in range(3):
            shutil.rmtree(partial, ignore_errors=True)

    shutdown.cleanups.append(remove)
    try:
        partial.mkdir()
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        remove()
        shutdown.cleanups.remove(remove)


def _remove_left_over(folder: Path) -> None:
    """Remove what runs that were killed have left: partial folders of processes that no longer exist."""
    for found in folder.parent.glob(f"{folder.name}.partial-*"):
        number = found.name.rpartition("-")[2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(found, ignore_errors=True)


def _bytes_from_disk() -> int:
    """Return how many bytes this process has had fetched from storage, which reads from the page cache do not count."""
    try:
        return int(psutil.Process().io_counters().read_bytes)
    except (OSError, psutil.Error):
        return 0


def _print(report: LoadReport, folder: Path, origin: str, from_disk: int) -> None:
    console = Output()
    console.print()
    cached = max(0, report.num_bytes - from_disk)
    sources = [("the page cache", cached), ("the disk", from_disk)]
    came = " and ".join(f"{format_bytes(size)} from {place}" for place, size in sources if size)
    print_report(console, report, extra=[("read", came)])
    console.print()
    print_facts(
        console,
        [
            ("checked", f"every byte of all {report.num_tensors:,} tensors, against safetensors' own reader: equal"),
            ("files", origin),
            ("delete", f"rm -r {shell_path(folder)}"),
            ("try next", f"weightstream inspect {shell_path(folder)}"),
            ("", "WEIGHTSTREAM_PREFETCH__IO=direct weightstream demo"),
        ],
    )
