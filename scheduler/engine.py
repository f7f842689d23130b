"""The engine: what loads share. Reader threads, the memory that they stage with, and one backend per device.

Synchronous and without an event loop; `Loader` is its awaitable face.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import torch

from weightstream.device.backend import Backend
from weightstream.device.devicemap import DeviceMap
from weightstream.errors import LoadTimeoutError
from weightstream.prefetch.mapping import Prefault
from weightstream.prefetch.memory import usable_cores
from weightstream.prefetch.readers import ReaderPool
from weightstream.prefetch.tuner import Setting
from weightstream.ranks import ranked_logger
from weightstream.scheduler.config import Settings
from weightstream.scheduler.machine import Machine
from weightstream.scheduler.staging import Staging
from weightstream.scheduler.stragglers import Stragglers

__all__ = ["Engine"]


#: Reads from the page cache at a time, where their number is left to us. On the host of an H100 with 16 cores 8 of them
#: brought 31 GB/s and 16 of them 50, of the 54 that its bus takes (2026-11-27); more than 16 were not tried.
_MOST_READERS = 8
_MOST_READERS_FOR_COPIES = 16

#: How long a Loader that is closed waits for reads that were given up, and for threads that have nothing to do any more.
#: So short because a server that is told to end waits for it: with what else takes time then, it has gone after two
#: seconds though a read hangs. What comes back later gives back all that it keeps, whether somebody waits or not.
_CLOSE_GRACE_S = 0.5
_END_GRACE_S = 0.5

logger = ranked_logger(__name__)


class Engine:
    """Owns threads and memory for as long as it is open; many loads, one budget.

    Args:
        config: what the user asked for.
        machine: see `Machine`.

    Raises:
        RuntimeError: this is not Linux.
    """

    def __init__(self, config: Settings, machine: Machine | None = None) -> None:
        if sys.platform != "linux":
            raise RuntimeError(
                f"weightstream runs on Linux alone, and this is {sys.platform}: it needs preadv, O_DIRECT, huge pages"
            )
        self.config = config
        self.machine = machine or Machine()
        self.clock = self.machine.clock
        self._pid = os.getpid()
        self._lock = threading.Lock()
        #: Held by who closes the engine; whoever else wants to, because he was interrupted, waits for him.
        self._closing = threading.RLock()
        self._is_closed = False
        self._backends: dict[torch.device, Backend] = {}
        self._prefaults: list[Prefault] = []
        #: How loads from each file system, by its number, were read in the end.
        self.known_settings: dict[int, Setting] = {}
        workers = config.prefetch.workers
        #: How many reads of a load go on at a time in the beginning.
        self.num_workers = min(_MOST_READERS, max(2, usable_cores())) if workers == "auto" else workers
        self.stragglers = Stragglers(self.clock)
        self.readers = ReaderPool(self.num_workers, self.clock.condition(), self.clock.spawn)
        self.staging = Staging(config.prefetch, self.machine.ring, self.readers.wake)

    @property
    def is_foreign(self) -> bool:
        """Whether this process was forked from the engine's.

        The engine's threads do not exist here, nor does its device context, and its locks may be held for ever. So
        nothing of it can be used or waited for, and there is nothing to close: that is left to the parent.
        """
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Refuse to work in a forked child; see `is_foreign`.

        Raises:
            RuntimeError: this process is not the one that made the engine.
        """
        if self.is_foreign:
            raise RuntimeError(
                f"this Loader, load or iterator was made in process {self._pid} and cannot be used in process"
                f" {os.getpid()}, which was forked from it: make a new one there"
            )

    def default_device(self) -> torch.device:
        """Return the device that `device.target` stands for; see `find_device`."""
        return self.machine.find_device(self.config.device.target)

    def device_map(self, entries: Mapping[str, int | str]) -> DeviceMap:
        """Return a map with the devices that its values stand for; see `find_device`."""
        values = dict.fromkeys(entries.values())
        devices = {
            value: torch.device("meta") if value == "meta" else self.machine.find_device(value, "device.device_map")
            for value in values
        }
        return DeviceMap({name: devices[value] for name, value in entries.items()})

    def backend(self, device: torch.device) -> Backend:
        """Return the one backend for a device."""
        with self._lock:
            if device not in self._backends:
                self._backends[device] = self.machine.open_backend(device)
            return self._backends[device]

    def workers_for(self, backends: Sequence[Backend]) -> int:
        """Return how many reads from the page cache go on at a time, for a load onto these devices.

        Each copies what the kernel has. Where the bytes stay in host memory, that is bound by the memory; on the way to
        an accelerator it is bound by the threads, of which two are needed beside them, to submit and to wait.
        """
        if self.config.prefetch.workers != "auto" or all(one.lands or one.device.type == "meta" for one in backends):
            return self.num_workers
        return max(self.num_workers, min(_MOST_READERS_FOR_COPIES, usable_cores() - 2))

    def prefault(self, work: Prefault) -> None:
        """Have mapped memory brought in by reader threads, for as long as the engine is open."""
        with self._lock:
            for done in [one for one in self._prefaults if one.is_done]:
                self._prefaults.remove(done)
                self.readers.detach(done)
            self._prefaults.append(work)
        self.readers.attach(work)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(ended_by=kind)

    def close(self, *, ended_by: type[BaseException] | None = None) -> None:
        """End the threads and give the memory back. Every load must have ended. In a forked child, do nothing.

        Reads that were given up are waited for a while, because most of them are slow and not stuck, except where
        the program is interrupted: what ends it with KeyboardInterrupt, a cancellation or the like is in haste; and except
        where a LoadTimeoutError leaves the context: they have been waited for. Those that have not returned then keep
        their thread, their files and their memory until they do.

        Args:
            ended_by: the exception that leaves the context; None: there is none.
        """
        if self.is_foreign:
            return
        self.hurry(ended_by)
        with self._closing:
            if not self._is_closed:
                self._close()
                self._is_closed = True

    @property
    def is_closed(self) -> bool:
        """Whether `close` has come to its end, or has nothing to do here."""
        return self._is_closed or self.is_foreign

    def hurry(self, ended_by: type[BaseException] | None) -> None:
        """Wait for no stragglers in `close` if this ends the program, as KeyboardInterrupt does, or says that time is up."""
        if ended_by is not None and (not issubclass(ended_by, Exception) or issubclass(ended_by, LoadTimeoutError)):
            self.stragglers.hurry()

    def _close(self) -> None:
        num_stuck = self.stragglers.wait(_CLOSE_GRACE_S)
        if num_stuck:
            logger.warning(
                "closed, but reads or files of %d loads have not come back from the file system: until they do, they keep"
                " their threads, descriptors and memory",
                num_stuck,
            )
        for prefault in self._prefaults:  # or files would stay mapped for as long as somebody holds on to the Loader
            prefault.stop()
        self.readers.close(timeout_s=_END_GRACE_S)
        self.staging.close()
        self._backends.clear()
