"""Sinks: what becomes of a load's tensors. They go into a model, or nowhere; or to a consumer (`consumer`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from weightstream.device.backend import Backend
from weightstream.device.binding import Binder
from weightstream.device.config import UserMap
from weightstream.device.matching import deliver, match
from weightstream.device.placement import Placement
from weightstream.device.sharded import local_part
from weightstream.device.stage import DeviceStage
from weightstream.device.turns import Turn, find_turns
from weightstream.errors import PlacementError
from weightstream.interpreter import no_garbage_collection
from weightstream.prefetch import overdue
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.source import Source
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.files import Files
from weightstream.scheduler.plan import Chunk, LoadPlan, make_plan
from weightstream.scheduler.slots import chunk_bytes
from weightstream.scheduler.strategy import ChosenStrategy, Decision
from weightstream.scheduler.survey import choose
from weightstream.scheduler.turns import TurnByTurn
from weightstream.scheduler.verification import whole_shards
from weightstream.scheduler.wanted import Wanted

__all__ = ["Delivery", "ModelSink", "NowhereSink", "Prepared", "Sink"]

#: Tensors of this size or more have storage of their own, smaller ones share blocks of the second size. Not measured:
#: one copy of 1 MiB takes some 20 us on a 53 GB/s bus, several times what submitting it costs.
_OWN_BYTES = 2**20
_BLOCK_BYTES = 64 * 2**20


class Prepared(NamedTuple):
    """A load that has been decided on. `backends`: of `placement.devices`."""

    placement: Placement
    backends: tuple[Backend, ...]
    plan: LoadPlan
    decision: Decision

    def beside_bytes(self, devices: Collection[int]) -> int:
        """Return how many bytes are held at a time, on these devices, beside tensors that have storage."""
        placement, turns = self.placement, self.plan.turns
        spared_bytes = 0 if turns is None else turns.spared_bytes(placement.places, devices)
        return placement.staged_bytes(devices) + placement.kept_bytes(devices) - spared_bytes


class Sink(Protocol):
    """Where a job's tensors go. Called on the job's thread, in this order, except for `admit`.

    `delivers`: whether blocks belong to somebody else as soon as their tensors have been taken. `prefetch_config`: how
    the bytes are to be read.
    """

    delivers: bool

    @property
    def prefetch_config(self) -> PrefetchConfig: ...

    def prepare(self, checkpoint: Checkpoint, source: Source, files: Files) -> Prepared:
        """Decide where every tensor goes, and how, or fail; change nothing, read nothing. Files are asked through `files`."""
        ...

    def open(self, prepared: Prepared, stage: DeviceStage) -> None:
        """Get ready for `take`."""
        ...

    def admit(self, chunk: Chunk) -> bool:
        """Say whether a chunk may be read now. Called on reader threads, under a lock: must not block."""
        ...

    def take(self, places: list[int]) -> list[str]:
        """Take finished tensors; return the names that may be used from now on."""
        ...

    def finish(self, check: Callable[[], None]) -> list[str]:
        """Take what could not be taken tensor by tensor; return the names that may be used from now on.

        `check` raises if the load is to end; it is called between modules that load themselves, which may take long.
        """
        ...

    def rollback(self) -> tuple[str, ...]:
        """Undo everything; return the names of tensors for which that is not possible."""
        ...

    def end(self, error: BaseException | None) -> None:
        """Let everything go. The load is over, with or without an error."""
        ...


class ModelSink:
    """Places tensors in a model, on the devices that the configuration says, or else `device_map`."""

    delivers = False

    def __init__(self, engine: Engine, model: nn.Module, device_map: UserMap | None = None) -> None:
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # not everybody is checked
            raise TypeError(f"expected a torch.nn.Module, found {type(model).__qualname__}")
        self._engine = engine
        config = engine.config.device
        self._config = config if device_map is None else config.with_device_map(device_map)
        self._model: nn.Module | None = model
        self._binder: Binder | None = None
        self._wanted: Wanted | None = None
        self._turns: TurnByTurn | None = None

    @property
    def prefetch_config(self) -> PrefetchConfig:
        return self._engine.config.prefetch

    def prepare(self, checkpoint: Checkpoint, source: Source, files: Files) -> Prepared:
        assert self._model is not None
        engine, config = self._engine, self._engine.config
        if overdue.is_expected():
            _refuse_overdue(self._model)
        self._wanted = wanted = Wanted(checkpoint, self._config)
        entries = self._config.device_map
        with wanted.locating():
            default = engine.default_device() if entries is None else engine.device_map(entries)
            with no_garbage_collection():
                extras = {name: functools.partial(wanted.extra_state, name) for name in wanted.extras}
                placement = match(self._model, wanted.tensors, self._config, default, extras=extras)
        backends = tuple(map(engine.backend, placement.devices))
        specs = [wanted.tensors[place.name] for place in placement.places]

        whole = whole_shards(checkpoint, side_by_side=config.scheduler.order == "model")
        # What is hashed comes in the order of its bytes, and an atomic load places everything at its end.
        has_turns = config.strategy in ("direct", "auto") and whole is None and config.device.commit != "atomic"
        turns = find_turns(placement) if has_turns else None

        def make(decision: Decision) -> LoadPlan:
            with no_garbage_collection():
                return make_plan(
                    specs,
                    placement.places,
                    lands=[backend.lands for backend in backends],
                    chunk_bytes=chunk_bytes(config.prefetch.chunk, specs, decision.strategy),
                    own_bytes=_OWN_BYTES,
                    block_bytes=_BLOCK_BYTES,
                    order=config.scheduler.order,
                    # `preload` changes nothing before all is there, and `direct` has the one slot.
                    fills_land=decision.strategy in ("stream", "map"),
                    mapped=_mapped(checkpoint, backends, decision),
                    whole=whole,
                    turns=turns if decision.strategy == "direct" else None,
                )

        landing = {device for device, backend in enumerate(backends) if backend.lands}
        decision, plan = choose(
            *(engine, files, checkpoint, source, specs, placement.places, backends, make),
            beside_bytes=placement.staged_bytes(landing),
            spared_bytes=0 if turns is None else turns.spared_bytes(placement.places, landing),
        )
        return Prepared(placement, backends, plan, decision)

    def open(self, prepared: Prepared, stage: DeviceStage) -> None:
        atomic = self._engine.config.device.commit == "atomic"
        assert self._wanted is not None
        self._binder = Binder(prepared.placement, stage, versions=self._wanted.versions, atomic=atomic)
        if prepared.plan.turns is not None:
            self._turns = TurnByTurn(prepared.plan.turns, len(prepared.placement.places))

    def admit(self, chunk: Chunk) -> bool:
        return self._turns is None or self._turns.admit(chunk.transfer.first)

    def take(self, places: list[int]) -> list[str]:
        assert self._binder is not None
        ready = self._binder.bind(places)
        if self._turns is not None:
            for turn in self._turns.completed(places):
                ready += self._end_turn(turn, self._turns)
            self._engine.readers.wake()  # they may have waited for the last of what is in no turn
        return ready

    def finish(self, check: Callable[[], None]) -> list[str]:
        assert self._binder is not None
        assert self._wanted is not None
        with self._wanted.locating():
            return self._binder.finish(check)

    def _end_turn(self, turn: Turn, turns: TurnByTurn) -> list[str]:
        assert self._binder is not None
        assert self._wanted is not None
        with self._wanted.locating():
            ready = self._binder.place(turn)
        turns.end()
        return ready

    def rollback(self) -> tuple[str, ...]:
        assert self._binder is not None
        self._binder.rollback()
        return tuple(self._binder.written)

    def end(self, error: BaseException | None) -> None:
        if self._binder is not None:
            self._binder.release()
        self._binder = None
        self._wanted = None
        self._turns = None
        self._model = None


class NowhereSink:
    """Takes nothing: the bytes are read, and what is left is a warm page cache."""

    delivers = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def prefetch_config(self) -> PrefetchConfig:
        """Buffered, and kept, whatever was asked for: the page cache is all that is filled."""
        return self._engine.config.prefetch.model_copy(update={"io": "buffered", "page_cache": "keep"})

    def prepare(self, checkpoint: Checkpoint, source: Source, files: Files) -> Prepared:
        delivery = Delivery(self._engine, checkpoint, torch.device("meta"))
        strategy: ChosenStrategy = "direct" if self._engine.config.strategy == "direct" else "stream"
        decision = Decision(strategy, "what is only read needs no more than a bounded ring")
        return Prepared(delivery.placement, (delivery.backend,), delivery.plan(decision), decision)

    def open(self, prepared: Prepared, stage: DeviceStage) -> None:
        """Nothing to get ready."""

    def admit(self, chunk: Chunk) -> bool:
        return True

    def take(self, places: list[int]) -> list[str]:
        return []

    def finish(self, check: Callable[[], None]) -> list[str]:
        return []

    def rollback(self) -> tuple[str, ...]:
        return ()

    def end(self, error: BaseException | None) -> None:
        """Nothing is held."""


def _refuse_overdue(model: nn.Module) -> None:
    """Refuse a model with memory that a read of another load may still write to: what is loaded now would be overwritten.

    Raises:
        PlacementError: a parameter or buffer has such memory.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        local = local_part(tensor)
        if local.device.type != "cpu" or local.layout is not torch.strided:
            continue
        storage = local.untyped_storage()
        if overdue.is_expected(storage.data_ptr(), storage.nbytes()):
            raise PlacementError(
                "a read of an earlier load hangs in the kernel, and may still write to this parameter's memory",
                tensor=name,
                hint="Wait until it returns (the log says so), or load into other memory: a model on meta, for one",
            )


def _mapped(checkpoint: Checkpoint, backends: Sequence[Backend], decision: Decision) -> list[int] | None:
    """Return the sizes of the shards if the strategy is to map them.

    Raises:
        PlacementError: tensors in a mapped file can be in host memory alone.
    """
    if decision.strategy != "map":
        return None
    elsewhere = [str(backend.device) for backend in backends if not backend.lands]
    if elsewhere:
        raise PlacementError(
            "strategy: map leaves tensors in the mapped file, so they can only be on the CPU",
            expected="device.target: cpu, and parameters on meta",
            actual=", ".join(elsewhere),
            hint="Set strategy to stream",
        )
    return [shard.num_bytes for shard in checkpoint.shards]


class Delivery:
    """A load without a model: blocks no larger than a chunk, large tensors in chunks of their own."""

    def __init__(self, engine: Engine, checkpoint: Checkpoint, device: torch.device) -> None:
        wanted = Wanted(checkpoint, engine.config.device)
        self.specs = list(wanted.tensors.values())
        self.backend = engine.backend(device)
        with wanted.locating(), no_garbage_collection():
            self.placement = deliver(wanted.tensors, engine.config.device, device)
        self._checkpoint = checkpoint
        self._chunk = engine.config.prefetch.chunk

    def plan(self, decision: Decision) -> LoadPlan:
        """Make the plan for a strategy."""
        size = chunk_bytes(self._chunk, self.specs, decision.strategy)
        with no_garbage_collection():
            return make_plan(
                self.specs,
                self.placement.places,
                lands=[self.backend.lands],
                chunk_bytes=size,
                own_bytes=size,
                block_bytes=size,
                order="file",
                isolate_large=True,
                mapped=_mapped(self._checkpoint, (self.backend,), decision),
                whole=whole_shards(self._checkpoint, side_by_side=self.backend.device.type == "meta"),
            )
