"""A real folder seen through a file system that is slow, refuses, breaks or hangs where a test or a benchmark says so.

It is mounted by a process of its own (see `filesystem_server`), so the kernel is between it and whoever reads: errors,
short reads and hangs are those of the system calls, and not of something put in their place.

    with mounted(folder, Behaviour(buffered=Speed(bytes_per_s=2e8))) as mount:
        report = load_sync(model, mount.path)
        assert mount.statistics().max_in_flight <= 8
"""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from tests.fakes.fuse import unmount

__all__ = ["Behaviour", "Fault", "Mount", "ReadRequest", "Speed", "Statistics", "mounted"]

_ROOT = Path(__file__).parents[2]
_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Speed:
    """How long reads take. All of them share one line, on which a request is `num_bytes / bytes_per_s` long.

    Attributes:
        latency_s: how much later each answer comes; requests do not wait for each other's latency.
        bytes_per_s: how fast the line is; None: infinitely.
        crowd_s: by how much a request's time on the line grows with every other request in flight: with it a source
            gets slower the more readers there are.
    """

    latency_s: float = 0.0
    bytes_per_s: float | None = None
    crowd_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to some read requests.

    With a page cache (`Behaviour.is_cached`) the kernel stands between: it reads ahead for a buffered reader, and tries
    again on its own where that failed; it takes a short answer to it for the end of the file; and it completes a short
    O_DIRECT read through the page cache. Tests that count requests or look for an exact errno use O_DIRECT or no page
    cache; short reads arrive as such without one.

    Attributes:
        file: whose requests, as a path below the folder; None: those of every file.
        effect: `error` answers with `number`; `short` answers with `num_bytes` bytes; `stall` answers when the mount is
            told to `release`; `truncate` shortens the file to `num_bytes` bytes, and then answers.
        offset: requests that cover this byte; None: wherever they are.
        request: the request of its file with this number, from 0; None: whichever it is.
        times: how often at most; None: for ever.
        number: an errno.
        num_bytes: see `effect`.
    """

    file: str | None
    effect: Literal["error", "short", "stall", "truncate"]
    offset: int | None = None
    request: int | None = None
    times: int | None = 1
    number: int = errno.EIO
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the file system behaves.

    Attributes:
        buffered, direct: how fast it is for ordinary opens, and for those with O_DIRECT.
        faults: looked through in this order; the first that fits a request is what happens to it.
        is_cached: whether the kernel keeps pages, as it does for a disk. Each mount begins with none.
        takes_direct: whether opens with O_DIRECT are accepted, or refused with EINVAL.
        request_bytes: the largest read request, at most 1 MiB. Fixed once it is mounted.
    """

    buffered: Speed = Speed()
    direct: Speed = Speed()
    faults: tuple[Fault, ...] = ()
    is_cached: bool = True
    takes_direct: bool = True
    request_bytes: int = 2**20


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A read that the kernel asked for, as far as the file goes."""

    file: str
    offset: int
    num_bytes: int
    is_direct: bool


@dataclass(frozen=True, slots=True)
class Statistics:
    """All reads since the file system was mounted, in the order in which they came.

    Attributes:
        requests: which.
        max_in_flight: how many were unanswered at once, at most.
        num_stalled: how many wait for `release` now.
        num_faults: how often each fault of the behaviour has happened.
    """

    requests: tuple[ReadRequest, ...]
    max_in_flight: int
    num_stalled: int
    num_faults: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return sum(request.num_bytes for request in self.requests)


class Mount:
    """A mounted file system. Its methods block until its process has answered.

    Attributes:
        path: where the folder is seen.
        behaviour: how it behaves now.
    """

    def __init__(self, path: Path, behaviour: Behaviour, control: Connection) -> None:
        self.path = path
        self.behaviour = behaviour
        self._control = control

    def statistics(self) -> Statistics:
        found = self._ask("statistics")
        assert isinstance(found, Statistics)
        return found

    def change(self, **changes: Any) -> None:
        """Replace fields of the behaviour, for requests that come from now on. Faults begin to count anew."""
        self.behaviour = dataclasses.replace(self.behaviour, **changes)
        self._ask("change", self.behaviour)

    def wait_stalled(self, num_requests: int = 1) -> None:
        """Block until so many requests are held back by a fault.

        Raises:
            TimeoutError: they did not come.
        """
        if not self._ask("wait_stalled", num_requests, _PATIENCE_S):
            raise TimeoutError(f"fewer than {num_requests} requests stalled")

    def release(self) -> None:
        """Answer what is stalled. Later requests stall again, if the fault is not used up."""
        self._ask("release")

    def _ask(self, command: str, *arguments: object) -> object:
        self._control.send((command, *arguments))
        if not self._control.poll(2 * _PATIENCE_S):
            raise TimeoutError(f"the file system's process does not answer to {command}")
        return self._control.recv()


@contextmanager
def mounted(folder: Path, behaviour: Behaviour | None = None) -> Generator[Mount, None, None]:
    """Show a folder through a file system that behaves so. It is read-only, and the folder must not change meanwhile.

    Whatever happens, it is unmounted at the end and its process is gone: reads that still hang fail with ECONNABORTED.

    Raises:
        RuntimeError: it cannot be mounted; see `fuse.why_not`.
    """
    behaviour = behaviour or Behaviour()
    path = Path(tempfile.mkdtemp(prefix=f"weightstream-mount-{os.getpid()}-"))
    ours, theirs = Pipe()
    with ours, theirs:
        program = "from tests.fakes.filesystem_server import main; main()"
        command = [sys.executable, "-c", program, str(folder.resolve()), str(path), str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=_ROOT)
        theirs.close()
        try:
            try:
                mount = Mount(path, behaviour, ours)
                mount.change()
            except (EOFError, OSError) as error:
                raise RuntimeError(f"cannot mount {folder}: see what its process printed") from error
            _read_ahead(path, behaviour.request_bytes)
            yield mount
        finally:
            ours.close()  # which is the sign for its process to end; the kernel then gives up what hangs
            _end(process)
            unmount(path)
            with suppress(FileNotFoundError):  # its process does the same, in case this one was killed
                path.rmdir()


def _read_ahead(path: Path, num_bytes: int) -> None:
    """Let the kernel read ahead by whole requests: its own choice is 128 KiB. Where it does not, requests are smaller."""
    device = path.stat().st_dev
    with suppress(OSError):
        place = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        place.write_text(str(num_bytes // 1024))


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
