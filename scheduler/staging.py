"""Staging: the host memory that loads put their bytes into on the way to where they belong.

One budget for all loads of an engine; one ring, which they share and which stays from load to load; rings of single loads,
for strategies that need one; and their page-locking. What a load needs is compared with what there is before it moves a byte.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Literal

from weightstream.device.accelerator import free_bytes
from weightstream.device.backend import Backend
from weightstream.errors import MemoryBudgetError
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.memory import Budget, MemoryAccount, available_bytes
from weightstream.prefetch.ring import Ring, slot_bytes_for
from weightstream.ranks import find_ranks
from weightstream.scheduler.pinning import LIMITED, Pinning
from weightstream.scheduler.plan import LoadPlan
from weightstream.scheduler.slots import DIRECT_SLOTS, OwnSlots, slots_of_own
from weightstream.scheduler.strategy import ChosenStrategy

__all__ = ["Staging"]

#: Eighths of the memory that is to be had which staging may take: the rest is for everybody else. Not measured.
_SHARE_OF_AVAILABLE = 7


class Staging:
    """See the module. Thread-safe.

    Args:
        config: `host_memory` and `chunk` are used.
        make_ring: makes rings.
        wake: told how many slots have come back.

    Attributes:
        budget: what may be taken in all.
        account: what is held.
        ring: the one that loads share.
    """

    def __init__(self, config: PrefetchConfig, make_ring: type[Ring], wake: Callable[[int], None]) -> None:
        self.account = MemoryAccount()
        self.budget = Budget(config.host_memory)
        self._asked_bytes = config.host_memory
        self._make_ring = make_ring
        self._wake = wake
        self._lock = threading.Lock()
        self._pinning = Pinning()
        self._num_ring_users = 0
        #: Rings of loads that have ended, some of whose slots are lost.
        self._left_behind: list[Ring] = []
        self.ring = make_ring(slot_bytes_for(config.chunk), self.budget, self.account, wake)

    def limit_budget(self, on_fallback: Callable[[str], None]) -> None:
        """Keep the budget below this process's share of what can be had of the machine or of its cgroup, as that is now."""
        num_ranks = find_ranks().local_size
        taken_bytes = self.budget.limit_bytes - self.budget.left_bytes
        room_bytes = taken_bytes + available_bytes() // num_ranks * _SHARE_OF_AVAILABLE // 8
        self.budget.limit_bytes = min(self._asked_bytes, room_bytes)
        if room_bytes < self._asked_bytes:
            on_fallback(
                f"prefetch.host_memory is {self._asked_bytes} bytes, but no more than {room_bytes} are to be had"
                + (f" for each of {num_ranks} ranks" if num_ranks > 1 else "")
                + ": that is the limit now"
            )

    def prepare(  # noqa: PLR0913 (what memory depends on)
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
            on_fallback: told if page-locking is refused, if slots are lost, or if the ranks of a host may take more memory
                than there is.

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
            if slots.most:
                self.tell_lost(on_fallback)
            window_bytes = _window_bytes(plan, strategy) if delivers and backend.lands else 0
            return self._own_ring(landing_bytes, window_bytes, backend, slots, on_fallback)
        needed = sum(
            1 for chunk in plan.chunks if chunk.transfer.slot_bytes or (io == "direct" and not chunk.is_mapped)
        )
        needed = max(needed, min(num_passing, DIRECT_SLOTS))
        wished = max(needed, min(num_cold, DIRECT_SLOTS)) if io == "auto" else needed
        if not wished:
            return None
        self.tell_lost(on_fallback)
        num_slots = self._num_slots(wished, plan, backends, delivers=delivers) or min(needed, 1)
        if not num_slots:
            return None
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
                    hint=f"Set prefetch.host_memory to {self._with(self.ring.slot_bytes)} bytes or more, or lower"
                    " prefetch.chunk",
                )
            self._num_ring_users += 1
        if limited:
            if found.num_slots < num_slots:
                on_fallback(LIMITED)
            return self.ring
        self._pinning.begin(self.ring, segments, backend, may_shrink=True, on_fallback=on_fallback)
        return self.ring

    def _own_ring(
        self,
        landing_bytes: int,
        window_bytes: int,
        backend: Backend,
        slots: OwnSlots,
        on_fallback: Callable[[str], None],
    ) -> Ring | None:
        """Make a ring for one load alone; None if it needs no slot, or can do without those that there is no room for.

        Slots that it can do without leave `window_bytes` of the budget for what waits for a consumer.
        """
        if not slots.most:
            return None
        self.make_room(slots.most * slots.slot_bytes)
        if landing_bytes:
            needed = slots.needed_bytes + landing_bytes
            self._check_fits("host memory, with what is staged there", needed, available_bytes())
        else:
            self._check_fits("host memory, where they are staged", slots.needed_bytes, available_bytes())
        left_bytes = self.budget.left_bytes
        ring = self._make_ring(slots.slot_bytes, self.budget, self.account, self._wake)
        most = min(slots.most, max(slots.least, (left_bytes - window_bytes) // slots.slot_bytes))
        segments = ring.grow(most, numa_node=backend.numa_node)
        if ring.statistics().num_slots < slots.least:
            ring.close()
            if slots.optional:
                return None
            raise MemoryBudgetError(
                "what this strategy stages at once does not fit into what is left of prefetch.host_memory",
                expected=f"{slots.needed_bytes} bytes",
                actual=f"{left_bytes} bytes",
                hint=f"Set prefetch.host_memory to {self._with(slots.needed_bytes + window_bytes)} bytes or more, or strategy to"
                " stream",
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

    def free_device_bytes(self, backend: Backend) -> int | None:
        """Return how much memory an accelerator has left; None for other devices, and where that is unknown."""
        return None if backend.device.type in ("meta", "cpu") else free_bytes(backend.device)

    def _num_slots(self, wished: int, plan: LoadPlan, backends: Sequence[Backend], *, delivers: bool) -> int:
        """Return how many slots there may be, beside what else comes into host memory."""
        if delivers:
            if not backends[0].lands:
                return wished
            left_bytes = self.budget.left_bytes  # blocks that wait for a consumer need their part of the budget
            room_bytes = left_bytes - max(left_bytes // 2, *plan.layout.blocks)
            return min(wished, max(1, room_bytes // self.ring.slot_bytes))
        landing_bytes = sum(plan.bytes_on(device) for device, one in enumerate(backends) if one.lands)
        room_bytes = available_bytes() // find_ranks().local_size * _SHARE_OF_AVAILABLE // 8 - landing_bytes
        found = self.ring.statistics()  # those that there are take no more
        return min(wished, found.num_slots - found.num_written_off + max(room_bytes, 0) // self.ring.slot_bytes)

    def make_room(self, num_bytes: int) -> None:
        """Let go of the ring, if no load uses it, until so much of the budget is left, as far as that is possible."""
        with self._lock:
            gone = [] if self._num_ring_users else self.ring.shrink(num_bytes)
        for segment in gone:
            self._pinning.unpin(segment)

    def leave_ring(self, ring: Ring) -> None:
        """Give back what `prepare` returned: the load has ended. A ring of its own is freed."""
        if ring is self.ring:
            with self._lock:
                self._num_ring_users -= 1
            return
        for segment in ring.close():
            segment.settled.wait()  # page-locking one segment may be under way; the others are left alone by now
            self._pinning.unpin(segment)
        with self._lock:
            if ring.statistics().num_written_off and ring not in self._left_behind:
                self._left_behind.append(ring)

    def num_lost(self) -> int:
        """Return how many slots are lost to reads that were given up and have not returned yet."""
        with self._lock:
            self._left_behind = [ring for ring in self._left_behind if ring.statistics().num_written_off]
            return sum(ring.statistics().num_written_off for ring in (self.ring, *self._left_behind))

    def tell_lost(self, on_fallback: Callable[[str], None]) -> None:
        """Say so if slots are lost: whoever needs slots now has fewer, or less of the budget."""
        if num_lost := self.num_lost():
            on_fallback(f"{num_lost} slots are lost to reads of other loads that have not returned yet")

    def _with(self, num_bytes: int) -> int:
        """Return which `host_memory` has room for so much more than is taken of it."""
        return self.budget.limit_bytes - self.budget.left_bytes + num_bytes

    def least_ring_bytes(
        self, plan: LoadPlan, strategy: ChosenStrategy, io: Literal["auto", "buffered", "direct"]
    ) -> int:
        """Return what a plan's slots take at least, if nothing that it reads should be in the page cache."""
        if strategy in ("preload", "direct"):
            slots = slots_of_own(plan, strategy, "buffered" if strategy == "direct" and io == "auto" else io)
            return 0 if slots.optional else slots.needed_bytes
        passes = (chunk.transfer.slot_bytes or chunk.transfer.in_place for chunk in plan.chunks)
        return self.ring.slot_bytes if io == "direct" or any(passes) else 0

    @contextmanager
    def borrow(
        self, num_bytes: int, strategy: ChosenStrategy = "stream", *, ring_bytes: int = 0
    ) -> Generator[None, None, None]:
        """Take a part of the budget, for tensors that are loaded beside those that they are copied to.

        Args:
            num_bytes: how much.
            strategy: how the load goes, for the message.
            ring_bytes: what the load takes for slots afterwards, at least: the error counts this, too.

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
                hint=f"Set prefetch.host_memory to {self._with(num_bytes + ring_bytes)} bytes or more"
                + ("" if strategy == "direct" else ", or strategy to direct, which holds most of them one by one"),
            )
        try:
            yield
        finally:
            self.budget.give(num_bytes)

    def close(self) -> None:
        """Give the ring back. Every load must have ended. Page-locked memory is unlocked while it is still mapped."""
        self._pinning.join()
        for segment in self.ring.close():
            self._pinning.unpin(segment)

    @staticmethod
    def _check_fits(what: str, needed: int, available: int | None) -> None:
        if available is not None and needed > available:
            raise MemoryBudgetError(
                f"the tensors do not fit into {what}",
                expected=f"{needed} bytes free",
                actual=f"{available} bytes",
                hint="Free some, or load onto another device",
            )


def _window_bytes(plan: LoadPlan, strategy: ChosenStrategy) -> int:
    """Return what waits for a consumer at a time, at least, where each block is there until it is taken."""
    blocks = plan.layout.blocks[plan.layout.num_given :]
    return sum(blocks) if strategy == "preload" else max(blocks, default=0)
