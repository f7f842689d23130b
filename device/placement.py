"""Placement: which tensor of the checkpoint goes into which tensor of the model, and how.

What was decided, as data: `matching` reads the model and decides; `stage` (bytes) and `binding` (parameters) carry it
out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, Protocol

import msgspec
import torch

from weightstream.device.config import DeviceConfig
from weightstream.device.names import NameRules
from weightstream.device.targets import Subtree, Target
from weightstream.errors import MissingKeysError, UnexpectedKeysError, some

__all__ = [
    "ALIGNMENT_BYTES",
    "Mode",
    "Place",
    "Placement",
    "Stored",
    "beside_bytes",
    "is_adopted",
    "padded",
    "tensor_of",
]

#: Every tensor begins on such a boundary: kernels with vector loads and TMA fault otherwise. It is also a multiple of
#: every element's size, so a tensor cut at such a boundary is never cut inside an element.
ALIGNMENT_BYTES = 256

#: adopt: the loader makes the storage and the parameter takes it. fill: the parameter has contiguous storage, which is
#: written to. stage: the loader makes a tensor that somebody else places at the end (module hooks, strided copies,
#: comparison of ties) or that is delivered as it is.
Mode = Literal["adopt", "fill", "stage"]


def padded(num_bytes: int) -> int:
    """Round up to the alignment, which is a power of two."""
    return (num_bytes + ALIGNMENT_BYTES - 1) & -ALIGNMENT_BYTES


class Stored(Protocol):
    """A tensor of a checkpoint, as this stage sees it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def stride(self) -> tuple[int, ...] | None: ...


class Place(msgspec.Struct, frozen=True, gc=False):
    """What becomes of one tensor of the checkpoint. Hidden from the garbage collector, as `targets` are.

    `num_bytes` and `stored_dtype` are the file's; `dtype` is what it will have in the model, and `name` is the model's
    too: `device.rename` may have made it out of the file's. `stride` is not None where the file's elements do not lie
    in order: the stage hands out a view of them, and nothing is read into storage of the model's. `device` counts in
    `Placement.devices`. `tensor` is the model's, if there is one, and `target` says more of it, if there is more to say.
    """

    name: str
    num_bytes: int
    stored_dtype: torch.dtype
    dtype: torch.dtype
    shape: tuple[int, ...]
    mode: Mode
    position: int
    tensor: torch.Tensor | None = None
    stride: tuple[int, ...] | None = None
    device: int = 0
    target: Target | None = None

    @property
    def names(self) -> list[str]:
        """All names that its tensor has in the model."""
        return [self.name] if self.target is None else self.target.names

    @property
    def is_cast(self) -> bool:
        return self.dtype is not self.stored_dtype

    @property
    def held_bytes(self) -> int:
        """How many bytes it takes of a block that the loader makes, with what lies between it and the next tensor."""
        return padded(
            self.num_bytes // self.stored_dtype.itemsize * self.dtype.itemsize if self.is_cast else self.num_bytes
        )


class Placement:
    """All decisions for one load.

    Attributes:
        devices: where adopted and staged tensors go. Several, if a device map says so.
        dtype: `device.dtype`.
        places: one per tensor that is wanted from the checkpoint, in the checkpoint's order.
        subtrees: modules that load themselves, in order of registration.
        doubles: pairs of places that hold the same tied tensor and must be equal; the second is staged, and dropped then.
        twins: such pairs, of which the second is given to a module that loads itself, and not the first.
        strided: staged places that are copied into a target with storage: without contiguous one, or any, where all
            parameters are to change at once.
        shared: staged places whose targets are views of one memory, in order of registration: they are copied in this
            order, as `load_state_dict` does it, and must then all be what was loaded.
        sharded: staged places of which each process keeps its own part, as soon as they are there.
        names: in the model, of all tensors that the places fill.
        prefixes: of every module of the model, what the names of its tensors begin with.
        loaded_themselves: filled in by `binding`: which subtrees loaded themselves.
        missing_keys, unexpected_keys: names on one side alone, as torch names them; `binding` adds those of subtrees.
        ignored: such names that the configuration says to ignore; they are in neither list.
        computed: names of the checkpoint that are left out, because the model computes these buffers itself. torch takes
            them for unexpected, and so do reports, but they are no error.
        unloaded: names of the model that a device map leaves on meta.
        split_ties: the first names of tied tensors for whose other names a device map says another device.
    """

    def __init__(self, devices: tuple[torch.device, ...], stored: Mapping[str, Stored], config: DeviceConfig) -> None:
        self.devices = devices
        self.dtype = config.dtype
        self.places: list[Place] = []
        self.subtrees: list[Subtree] = []
        self.doubles: list[tuple[Place, Place]] = []
        self.twins: list[tuple[Place, Place]] = []
        self.strided: list[Place] = []
        self.shared: list[Place] = []
        self.sharded: list[Place] = []
        self.names: list[str] = []
        self.prefixes: list[str] = []
        self.loaded_themselves: list[str] = []
        self.missing_keys: list[str] = []
        self.unexpected_keys: list[str] = []
        self.ignored: list[str] = []
        self.computed: list[str] = []
        self.unloaded: list[str] = []
        self.split_ties: list[str] = []
        self._stored = stored
        self._rules = NameRules(config)
        self._is_strict = config.strict
        self._is_atomic = config.commit == "atomic"

    def staged_bytes(self, devices: Collection[int]) -> int:
        """Return how many bytes are loaded beside tensors that have storage, and dropped when the load ends."""
        own_bytes = sum(
            beside_bytes(place) for tree in self.subtrees for place in tree.places if place.device in devices
        )
        own_bytes += max((self._saved_bytes(tree, devices) for tree in self.subtrees), default=0)
        beside = (*self.strided, *self.shared, *self.sharded, *(second for _, second in self.doubles))
        return own_bytes + sum(place.held_bytes for place in beside if place.device in devices)

    def kept_bytes(self, devices: Collection[int]) -> int:
        """Return how many bytes are copied, so that they can be put back, before what may fail is done to them."""
        if not self._is_atomic:
            return 0
        targets = {id(target): target for tree in self.subtrees if self.wants(tree) for target in tree.all_targets}
        own_bytes = sum(
            padded(target.tensor.nbytes)
            for target in targets.values()
            if not target.on_meta and self._index(target) in devices
        )
        shared = [tensor_of(place) for place in self.shared if place.device in devices]
        return own_bytes + sum(padded(tensor.nbytes) for tensor in shared)

    def _saved_bytes(self, tree: Subtree, devices: Collection[int]) -> int:
        """Return how much is copied while a module loads itself, because what it does to it does not count."""
        found = [self.places[target.filled_by] for target in tree.overruled]
        return sum(place.held_bytes for place in found if place.device in devices)

    def _index(self, target: Target) -> int:
        """Return which of the devices a tensor is on. Buffers elsewhere count for the first."""
        device = target.tensor.device
        return self.devices.index(device) if device in self.devices else 0

    @property
    def hooks_may_change_more(self) -> bool:
        """Whether all tensors are to change at once, and modules have hooks of which nobody knows what else they do."""
        return self._is_atomic and any(self.wants(tree) and tree.runs_foreign_code for tree in self.subtrees)

    def note_keys(self, missing: Iterable[str], unexpected: Iterable[str], *, says: str | None = None) -> None:
        """Note names on one side alone, except for those that nobody asked for or that are to be ignored.

        Args:
            missing: names of the model.
            unexpected: names of the checkpoint.
            says: the module that found this out by itself, if one did.

        Raises:
            MissingKeysError, UnexpectedKeysError: the configuration is strict, and there are such names.
        """
        rules = self._rules
        if rules.is_partial:
            missing = filter(rules.selects, missing)
        for name in missing:
            (self.ignored if rules.ignores_missing(name) else self.missing_keys).append(name)
        for name in unexpected:
            (self.ignored if rules.ignores_unexpected(name) else self.unexpected_keys).append(name)
        if self._is_strict:
            self._check_keys(says)

    def note_computed(self, name: str) -> None:
        """Note a name of the checkpoint that is that of a buffer which is not persistent."""
        (self.ignored if self._rules.ignores_unexpected(name) else self.computed).append(name)

    def decisions(self, num_stored: int) -> list[str]:
        """Say what the rules have done to the names of the checkpoint's `num_stored` tensors."""
        stored, said = self._stored, list[str]()
        changed = [name for name, spec in stored.items() if name != spec.name] if self._rules.renames else []
        if changed:
            first = f"{stored[changed[0]].name} to {changed[0]}"
            said.append(f"rename: {len(changed)} of {num_stored} names were changed, the first from {first}")
        if len(stored) < num_stored:
            said.append(f"include and exclude: {num_stored - len(stored)} of {num_stored} tensors were left out")
        if self.split_ties:
            said.append(
                f"device_map: {len(self.split_ties)} tied tensors are where their first name is: {some(self.split_ties)}"
            )
        return said

    def wants(self, subtree: Subtree) -> bool:
        """Say whether a module that loads itself has anything to load: a part of a model may be all that is wanted."""
        if not self._rules.is_partial or subtree.places or subtree.extras:
            return True
        own = (site for target in subtree.all_targets for site in target.sites if site.subtree == subtree.rank)
        return any(self._rules.selects(site.name) for site in own)

    def _check_keys(self, says: str | None) -> None:
        for keys, kind, side, other, setting in (
            (self.missing_keys, MissingKeysError, "model", "checkpoint", "ignore_missing"),
            (self.unexpected_keys, UnexpectedKeysError, "checkpoint", "model", "ignore_unexpected"),
        ):
            if keys:
                who = f", says {says}, which loads itself" if says else ""
                raise kind(
                    f"{len(keys)} tensors of the {side} are not in the {other}{who}",
                    actual=some(map(self._both_names, keys[:5]), total=len(keys)),
                    hint=f"device.{setting} lets single ones pass; device.strict: false lists all of them in the report",
                )

    def _both_names(self, name: str) -> str:
        spec = self._stored.get(name)
        return name if spec is None or spec.name == name else f"{name} (stored as {spec.name})"

    def release(self) -> None:
        """Let go of the places, a few at a time: freeing 46,000 at once holds the interpreter's lock for 27 ms."""
        while self.places:
            del self.places[-1000:]


def is_adopted(place: Place) -> bool:
    """Tell whether a tensor for a module that loads itself is what the model keeps, because there was none but on meta."""
    target = place.target
    return target is not None and target.on_meta and (target.decider is None or target.decider.name == place.name)


def beside_bytes(place: Place) -> int:
    """Return how much of what a module that loads itself is given is more than what the model keeps: all, mostly.

    A parameter on meta takes its tensor, or a part of it, where a hook slices it. What is there under other names than the
    model's, which hooks rename or join, counts whole.
    """
    if not is_adopted(place):
        return place.held_bytes
    assert place.target is not None
    return max(0, place.held_bytes - padded(place.target.tensor.nbytes))


def tensor_of(place: Place) -> torch.Tensor:
    """Return the model's tensor of a place that has one."""
    assert place.tensor is not None
    return place.tensor
