"""Tensors for a consumer that takes them one by one: a sink that keeps readers within reach of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import torch

from weightstream.device.accelerator import used_here
from weightstream.device.layout import IN_SLOT
from weightstream.device.stage import DeviceStage
from weightstream.errors import MemoryBudgetError, PlacementError
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.source import Source
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.files import Files
from weightstream.scheduler.plan import Chunk
from weightstream.scheduler.report import LoadReport
from weightstream.scheduler.sinks import Delivery, Prepared
from weightstream.scheduler.survey import choose

__all__ = ["ConsumerSink", "drain"]


class ConsumerSink:
    """Hands tensors to a consumer, one by one, and lets readers get only so far ahead of it.

    Blocks that have been asked for and not yet been delivered are kept below a window. In host memory the window is
    what the budget has left, and is taken from it; on a device it is as many bytes of device memory. What the consumer
    needs next is always admitted, or it would wait for ever. When the load has ended, blocks in host memory count until
    they are delivered, or forgotten.
    """

    delivers = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.RLock()  # the collector may call `forget` on a thread that holds it
        self._ready: deque[tuple[str, torch.Tensor, int]] = deque()
        self._waiter: Future[None] | None = None
        self._ended = False
        self._window_bytes = 0
        self._taken_bytes = 0
        #: Finished ahead of one that lies before them, by place: reads overtake each other.
        self._finished: dict[int, tuple[str, torch.Tensor, int]] = {}
        self._num_ordered = 0
        self._num_delivered = 0
        self._outstanding: dict[int, int] = {}
        self._admitted: set[int] = set()
        self._held_bytes = 0
        self._is_host = False
        self._is_forgotten = False
        self._prepared: Prepared | None = None
        self._stage: DeviceStage | None = None

    @property
    def prefetch_config(self) -> PrefetchConfig:
        return self._engine.config.prefetch

    def prepare(self, checkpoint: Checkpoint, source: Source, files: Files) -> Prepared:
        engine = self._engine
        if engine.config.device.device_map is not None:
            raise PlacementError(
                "device.device_map is for models: tensors that are delivered one by one all go to one device",
                hint="Set device.target instead",
            )
        ours = Delivery(engine, checkpoint, engine.default_device())
        placement, backends = ours.placement, (ours.backend,)
        decision, plan = choose(
            engine, files, checkpoint, source, ours.specs, placement.places, backends, ours.plan, delivers=True
        )
        return Prepared(placement, backends, plan, decision)

    def open(self, prepared: Prepared, stage: DeviceStage) -> None:
        """Take the window: with `preload` room for everything, with `direct` for the largest block alone.

        Raises:
            MemoryBudgetError: a block, or with `preload` all of them, is larger than what the budget has left.
        """
        budget = self._engine.staging.budget
        layout = prepared.plan.layout
        blocks = layout.blocks[layout.num_given :]
        largest, total = max(blocks, default=0), sum(blocks)
        strategy = prepared.decision.strategy
        least = total if strategy == "preload" else largest
        self._prepared, self._stage = prepared, stage
        self._window_bytes = total if strategy == "preload" else budget.limit_bytes
        self._is_host = prepared.backends[0].lands
        if self._is_host:
            # Half of what is left, so that another stream finds something too, but all that this one cannot do without.
            self._engine.staging.make_room(min(total, max(least, budget.limit_bytes // 4)))
            wished = 0 if strategy == "direct" else budget.left_bytes // 2
            self._window_bytes = min(total, max(least, wished))
            if not budget.take(self._window_bytes):
                needed = budget.limit_bytes - budget.left_bytes + least
                raise MemoryBudgetError(
                    f"{'the checkpoint' if strategy == 'preload' else 'the largest tensor'} does not fit into what other"
                    " loads leave of prefetch.host_memory",
                    tensor=None if strategy == "preload" else self._largest_tensor(),
                    expected=f"{least} bytes",
                    actual=f"{budget.left_bytes} bytes",
                    hint=f"Set prefetch.host_memory to {needed} bytes or more",
                )
            self._taken_bytes = self._window_bytes

    def _largest_tensor(self) -> str:
        assert self._prepared is not None
        return max(self._prepared.placement.places, key=lambda place: place.num_bytes).name

    def admit(self, chunk: Chunk) -> bool:
        assert self._prepared is not None
        layout = self._prepared.plan.layout
        transfer = chunk.transfer
        blocks = {layout.block_of[place] for place in range(transfer.first, transfer.stop)} - {IN_SLOT}
        with self._lock:
            new = blocks - self._admitted
            needed = sum(layout.blocks[block] for block in new)
            is_next = transfer.first <= self._num_delivered  # the consumer has everything that comes before
            if new and not is_next and self._held_bytes + needed > self._window_bytes:
                return False
            self._admitted |= new
            self._hold(needed)
            for block in new:
                self._outstanding[block] = layout.members[block]
            return True

    def take(self, places: list[int]) -> list[str]:
        assert self._prepared is not None
        assert self._stage is not None
        described = self._prepared.placement.places
        block_of = self._prepared.plan.layout.block_of
        tensors = self._stage.take(places)
        for place, tensor in zip(places, tensors, strict=True):
            self._finished[place] = described[place].name, tensor, block_of[place]
        with self._lock:
            while (item := self._finished.pop(self._num_ordered, None)) is not None:
                self._num_ordered += 1
                self._ready.append(item)
        self._notify()
        return []

    def finish(self, check: Callable[[], None]) -> list[str]:
        return []

    def rollback(self) -> tuple[str, ...]:
        self._finished.clear()
        with self._lock:
            self._ready.clear()
        return ()

    def end(self, error: BaseException | None) -> None:
        self._stage = None
        with self._lock:
            self._ended = True
            if error is not None or self._is_forgotten:
                self._drop()
            self._hold(0)
        self._notify()

    def forget(self) -> None:
        """Let go of what has not been delivered, now or when the load ends: nobody will take it."""
        with self._lock:
            self._is_forgotten = True
            if self._ended:
                self._drop()

    def next_nowait(self) -> tuple[str, torch.Tensor] | None:
        """Return the next tensor; or None where there is none yet, or, once `ended`, none any more.

        A tensor counts as delivered from then on: its memory is the consumer's. The calling thread's current stream may
        use it, also after it was let go. To be called by one consumer.

        Raises:
            RuntimeError: the process was forked from the engine's.
        """
        self._engine.check_process()
        with self._lock:
            if not self._ready:
                return None
            name, tensor, block = self._ready.popleft()
            self._num_delivered += 1
            has_room = self._let_go(block) or not self._ready
        if has_room:
            self._engine.readers.wake()
        used_here(tensor)
        return name, tensor

    @property
    def is_foreign(self) -> bool:
        """See `Engine.is_foreign`."""
        return self._engine.is_foreign

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._ended and not self._ready

    def wait(self) -> Future[None]:
        """Return a future that resolves as soon as `next_nowait` or `ended` has something to say."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if not self._ready and not self._ended:
                self._waiter = future
                return future
        future.set_result(None)
        return future

    def _notify(self) -> None:
        with self._lock:
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.set_result(None)

    def _let_go(self, block: int) -> bool:
        """Count a tensor as delivered; return whether it was the last of its block. The lock is held."""
        if block not in self._outstanding:  # without bytes, or in a mapped file
            return False
        assert self._prepared is not None
        self._outstanding[block] -= 1
        if self._outstanding[block]:
            return False
        del self._outstanding[block]
        self._hold(-self._prepared.plan.layout.blocks[block])
        return True

    def _drop(self) -> None:
        """Let go of everything that is left. The lock is held."""
        self._ready.clear()
        self._finished.clear()
        self._outstanding.clear()
        self._hold(-self._held_bytes)

    def _hold(self, num_bytes: int) -> None:
        """Count bytes of blocks that are not delivered; after the load, keep no more of the budget. The lock is held."""
        self._held_bytes += num_bytes
        if self._is_host:
            self._engine.staging.account.hold(num_bytes)
        if self._ended:
            kept_bytes = min(self._taken_bytes, self._held_bytes)
            self._engine.staging.budget.give(self._taken_bytes - kept_bytes)
            self._taken_bytes = kept_bytes


def drain(sink: ConsumerSink, finished: Future[LoadReport]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield from a sink on the calling thread, blocking it, until its load ends, of which `finished` says how.

    Raises:
        WeightstreamError: whatever ended the load.
        RuntimeError: the process was forked meanwhile, and this is the child.
    """
    while True:
        item = sink.next_nowait()
        if item is not None:
            yield item
        elif sink.ended:
            finished.result()
            return
        else:
            sink.wait().result()
