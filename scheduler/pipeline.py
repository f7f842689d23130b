"""The pipeline of one load: everything that its bytes go through, put together from a plan, and taken apart again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from weightstream.device.backend import Backend
from weightstream.device.stage import Destination, DeviceStage
from weightstream.errors import ReadError
from weightstream.prefetch.attempts import Attempts
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.mapping import Prefault, map_shard, refuse_network
from weightstream.prefetch.ring import Ring
from weightstream.prefetch.source import Source
from weightstream.prefetch.tuner import Tuner
from weightstream.ranks import ranked_logger
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.files import GRACE_S, Files
from weightstream.scheduler.flow import Flow
from weightstream.scheduler.ledger import Ledger
from weightstream.scheduler.plan import LoadPlan
from weightstream.scheduler.reading import (
    Reading,
    Residency,
    look_at_cache,
    look_for_passing,
    make_eviction,
    make_tuner,
)
from weightstream.scheduler.sinks import Prepared, Sink
from weightstream.scheduler.strategy import ChosenStrategy
from weightstream.scheduler.verification import Verification

__all__ = ["BlockAccount", "Pipeline"]

logger = ranked_logger(__name__)

_RESIDENCY_UNKNOWN = (
    "what is in the page cache is unknown, because the files belong to somebody else: found out by measuring"
)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """See the module. Made by `open`, and closed after `drain` or `end`.

    Attributes:
        plan: what goes through it.
        found: what of that was in the page cache.
        tuner: has found out how to read the rest.
        blocks: how much memory its blocks take on each device.
        stage: carries bytes to them.
        flow: says who may go on.
        prefault: brings mapped files in, if there are some; goes on after the load, unless that fails.
        verification: compares digests, if that was asked for.
    """

    plan: LoadPlan
    found: Residency
    tuner: Tuner
    blocks: tuple[BlockAccount, ...]
    stage: DeviceStage
    flow: Flow
    prefault: Prefault | None
    verification: Verification[Any] | None
    _strategy: ChosenStrategy
    _ring: Ring | None
    _engine: Engine
    _files: Files
    _resources: ExitStack
    _fall_back: Callable[[str], None]

    @classmethod
    def open(
        cls,
        engine: Engine,
        files: Files,
        opened: tuple[Checkpoint, Source, Attempts],
        sink: Sink,
        prepared: Prepared,
        *,
        streams: Mapping[torch.device, object],
        ledger: Ledger,
        fall_back: Callable[[str], None],
    ) -> Pipeline:
        """Put it together. Nothing is read before `start`.

        Args:
            engine: whose threads and memory it uses.
            files: whatever may hang in a file system is done through these.
            opened: what is loaded, where its bytes come from, and how often its files are tried.
            sink: where they go in the end.
            prepared: what is read, to where, and how.
            streams: the user's current stream on each device.
            ledger: where its time is booked.
            fall_back: told of every downgrade.

        Raises:
            MemoryBudgetError: there is not enough memory.
            ReadError: files cannot be mapped.
            CheckpointError: files are to be mapped that are on a network file system.
            IntegrityError: nobody says what the digest of a file should be that is to be verified.
            LoadTimeoutError: the file system does not answer.
        """
        config = sink.prefetch_config
        backends, plan, strategy = prepared.backends, prepared.plan, prepared.decision.strategy
        if strategy == "direct" and config.io == "auto":  # a slot of the size of a tensor has no room for whole pages
            config = config.model_copy(update={"io": "buffered"})
        checkpoint, source, attempts = opened
        with ExitStack() as stack:
            verification: Verification[Any] | None = None
            if checkpoint.hashes:
                outside = config.allow_outside_links
                verification = files.call(
                    lambda: Verification(checkpoint, plan, allow_outside_links=outside, attempts=attempts)
                )
            found = files.call(lambda: look_at_cache(plan, checkpoint, source, config))
            if found.unknown:
                fall_back(_RESIDENCY_UNKNOWN)
            passes = files.call(lambda: look_for_passing(checkpoint, plan, found))
            ring = engine.staging.prepare(
                plan,
                backends,
                strategy,
                io=config.io,
                num_cold=found.num_cold,
                num_passing=sum(passes),
                kept_bytes=[prepared.placement.kept_bytes({device}) for device in range(len(backends))],
                delivers=sink.delivers,
                on_fallback=fall_back,
            )
            if ring is not None:
                stack.callback(engine.staging.leave_ring, ring)
            tuner = make_tuner(
                plan,
                source,
                found,
                config,
                workers=engine.workers_for(backends),
                adaptive=engine.config.scheduler.adaptive,
                has_slots=ring is not None,
                known=engine.known_settings.get(checkpoint.file_system),
            )
            engine.readers.widen(tuner.setting.workers)
            blocks = tuple(BlockAccount(engine, backend, delivered=sink.delivers) for backend in backends)
            for account in blocks:
                stack.callback(account.close)
            prefault: Prefault | None = None
            given: list[memoryview] = []
            if plan.layout.num_given:
                anywhere = config.allow_network_map
                prefault, given = files.call(lambda: _map(checkpoint, plan, anywhere=anywhere))
            destinations = [
                Destination(backend, streams.get(backend.device), account.change, account.free)
                for backend, account in zip(backends, blocks, strict=True)
            ]
            stage = DeviceStage(destinations, plan.layout, given=given)
            stack.callback(stage.close)
            eviction = make_eviction(checkpoint, plan, found, config)
            if eviction is not None:
                files.opened.callback(eviction.finish)  # before they are closed, once nothing is read any more
            paths = [shard.path for shard in checkpoint.shards]
            widen = engine.readers.widen
            reading = Reading(source, tuner, found.resident, passes, widen, eviction, paths, config.stall_s)
            if sink.delivers:
                ledger.delivers()
            flow = Flow(
                plan, reading, stage, ring or engine.staging.ring, engine.clock, ledger, sink.admit, verification
            )
            return cls(
                *(plan, found, tuner, blocks, stage, flow, prefault, verification),
                *(strategy, ring, engine, files, stack.pop_all(), fall_back),
            )

    def start(self) -> None:
        """Let readers begin."""
        self._engine.readers.attach(self.flow.filling)

    def start_prefault(self) -> None:
        """Have mapped files brought in, if there are some."""
        if self.prefault is not None:
            self._engine.prefault(self.prefault)

    def drain(self) -> None:
        """Wait until no reader and no copy is at work. The flow must have ended, or have been stopped."""
        self._engine.readers.detach(self.flow.filling)
        readers, files = self._engine.readers, self._files

        def come_back() -> None:
            """Give back what a read that was given up has kept beside its slot."""
            readers.come_back()
            files.keep_open(-1)
            logger.info("a read that was given up has returned: its memory, its thread and its files are free again")

        stuck = self.flow.drain(GRACE_S, on_return=come_back)
        if stuck:
            files.keep_open(stuck)
            readers.replace_stuck(stuck)
            self._fall_back(f"{stuck} reads did not return and were given up; until they do, their slots are lost")
        if (num_writing := self.flow.filling.num_writing) > 0:
            self._fall_back(f"{num_writing} of them may still write to parameters that have storage, when they return")

    def end(self, error: BaseException) -> None:
        """Let nothing go on, and wait until nothing does; also if it has ended by itself."""
        if self.prefault is not None:
            self.prefault.stop()
        self.flow.stop(error)
        self.drain()

    def tell_lost(self) -> None:
        """Say so if slots are lost to other loads by now. For a load all of whose own reads have returned."""
        if self._ring is not None:
            self._engine.staging.tell_lost(self._fall_back)

    def remember(self, checkpoint: Checkpoint) -> None:
        """Let later loads from the same file system begin with what this one has found out."""
        if self.tuner.has_settled:
            self._engine.known_settings[checkpoint.file_system] = self.tuner.setting

    @property
    def pinned_bytes(self) -> int:
        """How much of its ring is page-locked."""
        return 0 if self._ring is None else self._ring.statistics().pinned_bytes

    def free_staged(self) -> str | None:
        """Give back what `preload` has staged, now that nothing needs it, and say what became of it; None: nothing was."""
        ring = self._ring
        if self._strategy != "preload" or ring is None:
            return None
        held_bytes = ring.statistics().num_bytes
        process = psutil.Process()
        before_bytes = process.memory_info().rss
        self._engine.staging.leave_ring(ring)  # and nothing once more, when it is closed
        after_bytes = process.memory_info().rss
        return (
            f"preload: {held_bytes} bytes of slots were freed at the end; the process had {before_bytes} bytes resident"
            f" before, and {after_bytes} after that"
        )

    def close(self) -> None:
        """Give back what it holds."""
        self._resources.close()

    def decisions(self) -> list[str]:
        """Say how it was read, and why so."""
        said: list[str] = []
        if self.plan.chunks:
            said.append(self.found.describe())
            if self.found.num_cold:
                said += [*self.tuner.decisions, f"read in the end: {self.tuner.setting}", *self._narrow()]
        if self.flow.lock_wait_s:
            said.append(f"page-locking: copies waited {self.flow.lock_wait_s:.2f} s until it was done")
        if self.plan.layout.num_given:
            count = f"{self.plan.num_mapped} of {len(self.plan.layout.places)} tensors"
            others = "" if self.plan.num_mapped == len(self.plan.layout.places) else "; the others were read"
            said.append(f"map: {count} are views of the files{others}")
        if self.verification is not None:
            said += self.verification.decisions()
        return said

    def _narrow(self) -> list[str]:
        """Say so if the ring, and not the storage, decided how many reads went on at a time."""
        if self._ring is None or self._strategy != "stream":
            return []
        num_slots, setting = self._ring.statistics().num_slots, self.tuner.setting
        parts = -(-self._engine.config.prefetch.chunk // setting.read_bytes)
        if num_slots >= len(self.plan.chunks) or num_slots * parts >= setting.workers:
            return []
        return [f"ring: it has {num_slots} slots, which is too few for {setting.workers} reads at a time"]


class BlockAccount:
    """Enters a load's blocks on one device into the host's account, or adds them up for the device.

    Blocks in host memory that parameters take stay entered until the load ends. Those for a consumer are none of it: the
    sink enters them, until they are delivered. `free` is for those that nobody has taken in the end. It and `change` are
    called by readers and by the load's thread, one at a time: the stage holds its lock meanwhile. `close` comes after all
    of them.
    """

    def __init__(self, engine: Engine, backend: Backend, *, delivered: bool) -> None:
        self.device_peak_bytes = 0
        self._account = engine.staging.account if backend.lands and not delivered else None
        self._is_device = not backend.lands and backend.device.type != "meta"
        self._delivered = delivered
        self._held = 0

    def change(self, num_bytes: int) -> None:
        if num_bytes < 0 and not self._delivered:
            return
        self._held += num_bytes
        if self._is_device:
            self.device_peak_bytes = max(self.device_peak_bytes, self._held)
        if self._account is not None:
            self._account.hold(num_bytes)

    def free(self, num_bytes: int) -> None:
        self._held -= num_bytes
        if self._account is not None:
            self._account.release(num_bytes)

    def close(self) -> None:
        if self._account is not None:
            self._account.release(self._held)


def _map(checkpoint: Checkpoint, plan: LoadPlan, *, anywhere: bool) -> tuple[Prefault, list[memoryview]]:
    """Map the shards; return what brings them in, and their bytes."""
    try:
        if not anywhere:
            refuse_network(checkpoint.shards)
        mappings = [map_shard(shard) for shard in checkpoint.shards]
    except OSError as exc:
        raise ReadError(
            f"the file system cannot map files: {exc.strerror}", file=checkpoint.path, hint="Set strategy to stream"
        ) from exc
    return Prefault(mappings, plan.given_ranges), mappings
