"""The engine: what loads share. Reader threads, the ring, its page-locking, and one backend per device.

Synchronous and without an event loop; `Loader` is its awaitable face.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Self

import torch

from weightstream.device.accelerator import free_bytes
from weightstream.device.backend import Backend
from weightstream.device.devicemap import DeviceMap
from weightstream.errors import MemoryBudgetError
from weightstream.prefetch.mapping import Prefault
from weightstream.prefetch.memory import Budget, MemoryAccount, available_bytes, usable_cores
from weightstream.prefetch.readers import ReaderPool
from weightstream.prefetch.ring import Ring, slot_bytes_for
from weightstream.prefetch.tuner import Setting
from weightstream.ranks import find_ranks, ranked_logger
from weightstream.scheduler.config import Settings
from weightstream.scheduler.machine import Machine
from weightstream.scheduler.pinning import LIMITED, Pinning
from weightstream.scheduler.plan import LoadPlan
from weightstream.scheduler.slots import DIRECT_SLOTS, OwnSlots, slots_of_own
from weightstream.scheduler.stragglers import Stragglers
from weightstream.scheduler.strategy import ChosenStrategy

__all__ = ["Engine"]


#: Reads from the page cache at a time, where their number is left to us. On the host of an H100 with 16 cores 8 of them
#: brought 31 GB/s and 16 of them 50, of the 54 that its bus takes (2026-11-27); more than 16 were not tried.
_MOST_READERS = 8
_MOST_READERS_FOR_COPIES = 16
#: Eighths of the memory that is to be had which staging may take: the rest is for everybody else. Not measured.
_SHARE_OF_AVAILABLE = 7

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
        self.account = MemoryAccount()
        self.budget = Budget(config.prefetch.host_memory)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        #: Held by who closes the engine; whoever else wants to, because he was interrupted, waits for him.
        self._closing = threading.RLock()
        self._is_closed = False
        self._backends: dict[torch.device, Backend] = {}
        self._pinning = Pinning()
        self._num_ring_users = 0
        self._prefaults: list[Prefault] = []
        #: How loads from each file system, by its number, were read in the end.
        self.known_settings: dict[int, Setting] = {}
        workers = config.prefetch.workers
        #: How many reads of a load go on at a time in the beginning.
        self.num_workers = min(_MOST_READERS, max(2, usable_cores())) if workers == "auto" else workers
        self.stragglers = Stragglers(self.clock)
        self.readers = ReaderPool(self.num_workers, self.clock.condition(), self.clock.spawn)
        slot_bytes = slot_bytes_for(config.prefetch.chunk)
        self.ring = self.machine.ring(slot_bytes, self.budget, self.account, self.readers.wake)

    def limit_budget(self, on_fallback: Callable[[str], None]) -> None:
        """Keep the budget below this process's share of what can be had of the machine or of its cgroup, as that is now."""
        num_ranks = find_ranks().local_size
        asked_bytes = self.config.prefetch.host_memory
        taken_bytes = self.budget.limit_bytes - self.budget.left_bytes
        room_bytes = taken_bytes + available_bytes() // num_ranks * _SHARE_OF_AVAILABLE // 8
        self.budget.limit_bytes = min(asked_bytes, room_bytes)
        if room_bytes < asked_bytes:
            on_fallback(
                f"prefetch.host_memory is {asked_bytes} bytes, but no more than {room_bytes} are to be had"
                + (f" for each of {num_ranks} ranks" if num_ranks > 1 else "")
                + ": that is the limit now"
            )

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

    def prepare_memory(  # noqa: PLR0913 (what memory depends on)
        self,
        plan: LoadPlan,
        backends: Sequence[Backend],
        strategy: ChosenStrategy,
        *,
        io: Literal["auto", "buffered", "direct"],
        num_cold: int,
        num_passing: int,
        kept_bytes: Sequence[int],
        delivers: bool,
        on_fallback: Callable[[str], None],
    ) -> Ring | None:
        """Make sure that a plan fits into memory, and that there is a ring with slots for it.

        Page-locking goes on in the background, segment by segment, while reading starts. `preload` and `direct` get
        a ring of their own, of just the size they need, which goes when they end.

        Args:
            plan: what is loaded.
            backends: where to. The ring is page-locked by the first that can, for all of them, and lies close to it.
            strategy: how.
            io: how it is read; direct reads need slots.
            num_cold: how many chunks are not in the page cache.
            num_passing: how many pass through a slot on their way to parameters that have storage.
            kept_bytes: of each device, how much memory it needs beside the plan's blocks.
            delivers: whether a consumer takes the blocks one by one.
            on_fallback: told if page-locking is refused, or the ranks of a host may take more memory than there is.

        Returns:
            The ring with the load's slots, which has to be given to `leave_ring` when the load ends. None: it needs none.

        Raises:
            MemoryBudgetError: the host, its budget or the device has too little.
        """
        for device, one in enumerate(backends):
            needed_bytes = plan.bytes_on(device) + kept_bytes[device]
            self._check_room(needed_bytes, one, delivers=delivers, on_fallback=on_fallback)
        backend = next((one for one in backends if one.pinnable), backends[0])
        if strategy in ("preload", "direct"):
            landing_bytes = sum(plan.bytes_on(device) for device, one in enumerate(backends) if one.lands)
            slots = slots_of_own(plan, strategy, io, num_cold=num_cold)
            return self._own_ring(landing_bytes, backend, slots, on_fallback)
        needed = sum(
            1 for chunk in plan.chunks if chunk.transfer.slot_bytes or (io == "direct" and not chunk.is_mapped)
        )
        needed = max(needed, min(num_passing, DIRECT_SLOTS))
        wished = max(needed, min(num_cold, DIRECT_SLOTS)) if io == "auto" else needed
        if not wished:
            return None
        num_slots = self._num_slots(wished, plan, backend, delivers=delivers)
        with self._lock:
            limited = self._pinning.is_limit_reached(self.ring, backend)
            segments = [] if limited else self.ring.grow(num_slots, numa_node=backend.numa_node)
            found = self.ring.statistics()
            if found.num_slots == found.num_written_off:
                if not needed:
                    return None
                raise MemoryBudgetError(
                    "no slot of the ring fits into what is left of prefetch.host_memory",
                    expected=f"{self.ring.slot_bytes} bytes or more",
                    actual=f"{self.budget.left_bytes} bytes",
                    hint="Raise prefetch.host_memory, or lower prefetch.chunk",
                )
            self._num_ring_users += 1
        if found.num_written_off and found.num_slots - found.num_written_off < num_slots:
            on_fallback(
                f"{found.num_written_off} of {found.num_slots} slots are lost to reads that have not returned yet, so fewer"
                " reads go on at a time"
            )
        if limited:
            if found.num_slots < num_slots:
                on_fallback(LIMITED)
            return self.ring
        self._pinning.begin(self.ring, segments, backend, may_shrink=True, on_fallback=on_fallback)
        return self.ring

    def _own_ring(
        self, landing_bytes: int, backend: Backend, slots: OwnSlots, on_fallback: Callable[[str], None]
    ) -> Ring | None:
        """Make a ring for one load alone; None if it needs no slot, or can do without those that there is no room for."""
        if not slots.most:
            return None
        self.make_room(slots.most * slots.slot_bytes)
        if landing_bytes:
            needed = slots.needed_bytes + landing_bytes
            self._check_fits("host memory, with what is staged there", needed, available_bytes())
        else:
            self._check_fits("host memory, where they are staged", slots.needed_bytes, available_bytes())
        left_bytes = self.budget.left_bytes
        ring = self.machine.ring(slots.slot_bytes, self.budget, self.account, self.readers.wake)
        segments = ring.grow(slots.most, numa_node=backend.numa_node)
        if ring.statistics().num_slots < slots.least:
            ring.close()
            if slots.optional:
                return None
            raise MemoryBudgetError(
                "what this strategy stages at once does not fit into what is left of prefetch.host_memory",
                expected=f"{slots.needed_bytes} bytes",
                actual=f"{left_bytes} bytes",
                hint=f"Set prefetch.host_memory to {self.budget.limit_bytes - left_bytes + slots.needed_bytes} bytes or"
                " more, or strategy to stream",
            )
        # It has no slot too many.
        self._pinning.begin(ring, segments, backend, may_shrink=False, on_fallback=on_fallback)
        return ring

    def _check_room(
        self, blocks_bytes: int, backend: Backend, *, delivers: bool, on_fallback: Callable[[str], None]
    ) -> None:
        """Compare what a load makes on a device with what is free there.

        Ranks share host memory, but what is free is not divided by them: ranks that have loaded already have taken
        their part of it, and the last of four would be refused although what is left is just enough. So a rank that may
        be one too many is told, and not refused.
        """
        if delivers:  # a consumer takes them; only so many are there at once
            blocks_bytes = min(blocks_bytes, self.budget.limit_bytes)
        if backend.lands:
            available, num_ranks = available_bytes(), find_ranks().local_size
            self._check_fits("host memory", blocks_bytes, available)
            if blocks_bytes * num_ranks > available:
                on_fallback(
                    f"the weights take {blocks_bytes} bytes of host memory, of which {available} are free for"
                    f" {num_ranks} ranks: if all of them load at the same time, that is not enough"
                )
        else:
            self._check_fits(f"memory of {backend.device}", blocks_bytes, self.free_device_bytes(backend))

    def workers_for(self, backends: Sequence[Backend]) -> int:
        """Return how many reads from the page cache go on at a time, for a load onto these devices.

        Each copies what the kernel has. Where the bytes stay in host memory, that is bound by the memory; on the way to
        an accelerator it is bound by the threads, of which two are needed beside them, to submit and to wait.
        """
        if self.config.prefetch.workers != "auto" or all(one.lands or one.device.type == "meta" for one in backends):
            return self.num_workers
        return max(self.num_workers, min(_MOST_READERS_FOR_COPIES, usable_cores() - 2))

    def free_device_bytes(self, backend: Backend) -> int | None:
        """Return how much memory an accelerator has left; None for other devices, and where that is unknown."""
        return None if backend.device.type in ("meta", "cpu") else free_bytes(backend.device)

    def _num_slots(self, num_slots: int, plan: LoadPlan, backend: Backend, *, delivers: bool) -> int:
        if delivers and backend.lands:  # blocks that wait for a consumer need their part of the budget
            left_bytes = self.budget.left_bytes
            room_bytes = left_bytes - max(left_bytes // 2, *plan.layout.blocks)
            num_slots = min(num_slots, max(1, room_bytes // self.ring.slot_bytes))
        return num_slots

    def make_room(self, num_bytes: int) -> None:
        """Let go of the ring, if no load uses it, until so much of the budget is left, as far as that is possible."""
        with self._lock:
            gone = [] if self._num_ring_users else self.ring.shrink(num_bytes)
        for segment in gone:
            self._pinning.unpin(segment)

    def leave_ring(self, ring: Ring) -> None:
        """Give back what `prepare_memory` returned: the load has ended. A ring of its own is freed."""
        if ring is self.ring:
            with self._lock:
                self._num_ring_users -= 1
            return
        for segment in ring.close():
            segment.settled.wait()  # page-locking one segment may be under way; the others are left alone by now
            self._pinning.unpin(segment)

    @contextmanager
    def borrow(self, num_bytes: int) -> Generator[None, None, None]:
        """Take a part of the budget, for tensors that are loaded beside those that they are copied to.

        Raises:
            MemoryBudgetError: so much is not left.
        """
        self.make_room(num_bytes)
        left_bytes = self.budget.left_bytes
        if not self.budget.take(num_bytes):
            raise MemoryBudgetError(
                "tensors that are loaded beside where they belong (of modules that load themselves, tied twice, strided,"
                " in the memory of others, split over several devices, or, with device.commit: atomic, all that have"
                " storage) do not fit into what is left of prefetch.host_memory",
                expected=f"{num_bytes} bytes",
                actual=f"{left_bytes} bytes",
                hint=f"Set prefetch.host_memory to {self.budget.limit_bytes - left_bytes + num_bytes} bytes or more, or"
                " load into a model on meta; strategy: direct holds modules that load themselves one by one",
            )
        try:
            yield
        finally:
            self.budget.give(num_bytes)

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
        the program is interrupted: what ends it with KeyboardInterrupt, a cancellation or the like is in haste. Those
        that have not returned then keep their thread, their files and their memory until they do.

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
        """Wait for no stragglers in `close` if this ends the program, as KeyboardInterrupt and cancellations do."""
        if ended_by is not None and not issubclass(ended_by, Exception):
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
        self._pinning.join()
        for segment in self.ring.close():  # page-locked memory must be unlocked while it is still mapped
            self._pinning.unpin(segment)
        self._backends.clear()

    @staticmethod
    def _check_fits(what: str, needed: int, available: int | None) -> None:
        if available is not None and needed > available:
            raise MemoryBudgetError(
                f"the tensors do not fit into {what}",
                expected=f"{needed} bytes free",
                actual=f"{available} bytes",
                hint="Free some, or load onto another device",
            )
