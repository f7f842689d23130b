"""The process behind `filesystem.mounted`: answers the kernel, later, shorter or wrongly as it is told to.

Some threads take requests and decide what becomes of them, others give the answers when they are due; one listens to the
process that made the mount, and ends this one when that is gone. No thread waits for a single request, so any number
can be under way. File contents go from mapped files to the kernel without being copied in between.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import mmap
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fakes.filesystem import Behaviour, Fault, ReadRequest, Speed, Statistics
from tests.fakes.fuse import (
    Device,
    Opcode,
    Request,
    attributes,
    directory,
    empty_statistics,
    entry,
    opened,
    unmount,
)

__all__ = ["Line", "main"]

_NUM_THREADS = 3
_ROOT_NODE = 1


@dataclass
class _File:
    """A file or folder. `num_bytes`: what it was truncated to; None: nothing."""

    path: Path
    name: str
    num_bytes: int | None = None
    truncated_ns: int = 0
    num_requests: int = 0
    content: memoryview = field(default_factory=lambda: memoryview(b""))

    def attributes(self) -> tuple[os.stat_result, int, int]:
        found = self.path.stat()
        if self.num_bytes is None:
            return found, found.st_size, found.st_mtime_ns
        return found, self.num_bytes, self.truncated_ns

    def read(self, offset: int, num_bytes: int) -> memoryview:
        end = len(self.content) if self.num_bytes is None else self.num_bytes
        return self.content[offset : min(offset + num_bytes, end)]


class Line:
    """What all requests of one kind share; see `Speed`."""

    def __init__(self) -> None:
        self._free_at_s = 0.0

    def due_s(self, speed: Speed, now_s: float, num_bytes: int, num_others: int) -> float:
        """Queue a request up; return when its answer is due."""
        busy_s = num_bytes / speed.bytes_per_s if speed.bytes_per_s else 0.0
        self._free_at_s = max(now_s, self._free_at_s) + busy_s + speed.crowd_s * num_others
        return self._free_at_s + speed.latency_s


class _Server:
    """See the module. Everything is guarded by `_changed`, but for what is done with the kernel."""

    def __init__(self, folder: Path, device: Device) -> None:
        self._device = device
        self._changed = threading.Condition()
        self._behaviour = Behaviour()
        self._nodes: dict[int, _File] = {_ROOT_NODE: _File(folder, "")}
        self._numbers: dict[str, int] = {"": _ROOT_NODE}
        self._handles: dict[int, tuple[_File, bool]] = {}
        self._new_handle = itertools.count(1)
        self._lines = {False: Line(), True: Line()}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._stalled: dict[int, Callable[[], None]] = {}
        self._requests: list[ReadRequest] = []
        self._num_in_flight = 0
        self._max_in_flight = 0
        self._fault_counts: Counter[int] = Counter()

    def start(self) -> None:
        for target in [self._take_requests, self._give_answers] * _NUM_THREADS:
            threading.Thread(target=target, daemon=True).start()

    # What the mount asks for.

    def change(self, behaviour: Behaviour) -> None:
        with self._changed:
            if behaviour.faults != self._behaviour.faults:
                self._fault_counts.clear()
            self._behaviour = behaviour

    def statistics(self) -> Statistics:
        with self._changed:
            counts = tuple(self._fault_counts[number] for number in range(len(self._behaviour.faults)))
            return Statistics(tuple(self._requests), self._max_in_flight, len(self._stalled), counts)

    def wait_stalled(self, num_requests: int, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: len(self._stalled) >= num_requests, timeout_s)

    def release(self) -> None:
        with self._changed:
            for answer in self._stalled.values():
                self._answer_at(0.0, answer)
            self._stalled.clear()

    # What the kernel asks for.

    def _take_requests(self) -> None:
        while (request := self._device.receive()) is not None:
            try:
                self._handle(request)
            except OSError as error:
                self._device.refuse(request.unique, error.errno or errno.EIO)

    def _handle(self, request: Request) -> None:  # noqa: C901 - one line or two for each kind of request
        answer = self._device.answer
        match request.opcode:
            case Opcode.READ:
                self._read(request)
            case Opcode.LOOKUP:
                node, file = self._look_up(self._nodes[request.node], request.name)
                answer(request.unique, entry(node, *file.attributes()))
            case Opcode.GETATTR:
                answer(request.unique, attributes(*self._nodes[request.node].attributes()))
            case Opcode.OPEN:
                self._open(request)
            case Opcode.OPENDIR:
                answer(request.unique, opened(0, is_cached=False))
            case Opcode.READDIR:
                names = sorted(os.listdir(self._nodes[request.node].path))
                answer(request.unique, directory(names, request.read))
            case Opcode.STATFS:
                answer(request.unique, empty_statistics())
            case Opcode.RELEASE | Opcode.RELEASEDIR | Opcode.DESTROY:
                answer(request.unique)
            case Opcode.INTERRUPT:
                self._interrupt(request.interrupted)
            case Opcode.FORGET | Opcode.BATCH_FORGET:
                pass  # the kernel wants no answer, and this remembers what little there is
            case _:
                self._device.refuse(request.unique, errno.ENOSYS)

    def _look_up(self, parent: _File, base: str) -> tuple[int, _File]:
        path = parent.path / base
        path.stat()
        name = f"{parent.name}/{base}" if parent.name else base
        with self._changed:
            node = self._numbers.setdefault(name, len(self._numbers) + _ROOT_NODE)
            return node, self._nodes.setdefault(node, _File(path, name))

    def _open(self, request: Request) -> None:
        file = self._nodes[request.node]
        is_direct = bool(request.flags & os.O_DIRECT)
        with self._changed:
            behaviour = self._behaviour
            if not file.content:
                file.content = _map(file.path)
            handle = next(self._new_handle)
            self._handles[handle] = file, is_direct
        if is_direct and not behaviour.takes_direct:
            self._device.refuse(request.unique, errno.EINVAL)
        else:
            self._device.answer(request.unique, opened(handle, is_cached=behaviour.is_cached))

    def _read(self, request: Request) -> None:
        """Decide what becomes of a read."""
        read = request.read
        file, is_direct = self._handles[read.handle]
        with self._changed:
            behaviour = self._behaviour
            fault = self._take_fault(file, read.offset, read.num_bytes)
            if fault is not None and fault.effect == "truncate":
                file.num_bytes, file.truncated_ns = fault.num_bytes, time.time_ns()
            num_bytes = len(file.read(read.offset, read.num_bytes))
            self._requests.append(ReadRequest(file.name, read.offset, num_bytes, is_direct))
            file.num_requests += 1
            num_others = self._num_in_flight
            self._num_in_flight += 1
            self._max_in_flight = max(self._max_in_flight, self._num_in_flight)

            def answer() -> None:
                if fault is not None and fault.effect == "error":
                    self._device.refuse(request.unique, fault.number)
                    return
                content = file.read(read.offset, read.num_bytes)
                if fault is not None and fault.effect == "short":
                    content = content[: fault.num_bytes]
                self._device.answer(request.unique, content)

            if fault is not None and fault.effect == "stall":
                self._stalled[request.unique] = answer
                self._changed.notify_all()
                return
            speed = behaviour.direct if is_direct else behaviour.buffered
            due_s = self._lines[is_direct].due_s(speed, time.monotonic(), num_bytes, num_others)
            self._answer_at(due_s, answer)

    def _take_fault(self, file: _File, offset: int, num_bytes: int) -> Fault | None:
        for number, fault in enumerate(self._behaviour.faults):
            if (
                fault.file in (None, file.name)
                and (fault.offset is None or offset <= fault.offset < offset + num_bytes)
                and fault.request in (None, file.num_requests)
                and (fault.times is None or self._fault_counts[number] < fault.times)
            ):
                self._fault_counts[number] += 1
                return fault
        return None

    def _interrupt(self, unique: int) -> None:
        """Let go of a stalled read whose process wants to end: it could not otherwise, not even when it is killed."""
        with self._changed:
            if self._stalled.pop(unique, None) is not None:
                self._answer_at(0.0, lambda: self._device.refuse(unique, errno.EINTR))

    # Answers.

    def _answer_at(self, due_s: float, answer: Callable[[], None]) -> None:
        heapq.heappush(self._due, (due_s, next(self._order), answer))
        self._changed.notify_all()

    def _give_answers(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > time.monotonic():
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                _, _, answer = heapq.heappop(self._due)
                self._num_in_flight -= 1  # before the answer, after which the next request may come at once
            answer()


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def main() -> None:
    """Serve until the connection to the process that made the mount closes."""
    folder, path, number = sys.argv[1:]
    control = Connection(int(number))
    server: _Server | None = None
    try:
        while True:
            command, *arguments = control.recv()
            if server is None:
                (behaviour,) = arguments
                server = _Server(Path(folder), Device(Path(path), request_bytes=behaviour.request_bytes))
                server.start()
            control.send(getattr(server, command)(*arguments))
    except EOFError:
        pass
    except BaseException:  # noqa: BLE001 - this process ends without Python's own way of telling
        traceback.print_exc()
    finally:
        unmount(Path(path))
        with suppress(OSError):  # who made the mount may be quicker, or dead
            Path(path).rmdir()
        sys.stderr.flush()
        os._exit(0)  # threads of ours are blocked in the kernel; what hangs there fails when this process is gone
