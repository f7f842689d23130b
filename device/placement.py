"""Placement: which tensor of the checkpoint goes into which tensor of the model, and how.

Reads the model and decides; changes nothing. The decisions are carried out by `stage` (bytes) and `binding`
(parameters).
"""

# pyright: reportPrivateUsage=false
# Gradient hooks have no public name in `torch.Tensor`.
from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, Protocol

import msgspec
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from weightstream.device.config import DeviceConfig
from weightstream.device.devicemap import DeviceMap
from weightstream.device.dtypes import CASTABLE, destination_dtype, torch_dtype, torch_shape, unsupported
from weightstream.device.names import NameRules
from weightstream.device.sharded import check_sharded, is_sharded
from weightstream.device.sharing import find_sharing, length_in_memory
from weightstream.device.targets import Subtree, Target, Targets, find_targets
from weightstream.errors import MissingKeysError, PlacementError, ShapeMismatchError, UnexpectedKeysError

__all__ = ["Mode", "Place", "Placement", "Stored", "deliver", "match"]

#: adopt: the loader makes the storage and the parameter takes it. fill: the parameter has contiguous storage, which is
#: written to. stage: the loader makes a tensor that somebody else places at the end (module hooks, strided copies,
#: comparison of ties) or that is delivered as it is.
Mode = Literal["adopt", "fill", "stage"]

_PLAIN = (nn.Parameter, torch.Tensor)

#: Methods of `torch.Tensor` that classes override if their storage is of a kind of its own.
_OWN_STORAGE = ("__torch_dispatch__", "to", "cuda", "cpu")


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
    `Placement.devices`.
    """

    name: str
    num_bytes: int
    stored_dtype: torch.dtype
    dtype: torch.dtype
    shape: tuple[int, ...]
    mode: Mode
    position: int
    target: Target | None = None
    stride: tuple[int, ...] | None = None
    device: int = 0

    @property
    def is_cast(self) -> bool:
        return self.dtype is not self.stored_dtype

    @property
    def final_bytes(self) -> int:
        """How many bytes it has in the model."""
        return self.num_bytes // self.stored_dtype.itemsize * self.dtype.itemsize if self.is_cast else self.num_bytes


class Placement:
    """All decisions for one load.

    Attributes:
        devices: where adopted and staged tensors go. Several, if a device map says so.
        places: one per tensor that is wanted from the checkpoint, in the checkpoint's order.
        subtrees: modules that load themselves, in order of registration.
        doubles: pairs of places that hold the same tied tensor and must be equal; the second is staged.
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
        computed: names of the checkpoint that are left out, because the model computes these buffers itself.
        unloaded: names of the model that a device map leaves on meta.
        split_ties: the first names of tied tensors for whose other names a device map says another device.
    """

    def __init__(self, devices: tuple[torch.device, ...], stored: Mapping[str, Stored], config: DeviceConfig) -> None:
        self.devices = devices
        self.places: list[Place] = []
        self.subtrees: list[Subtree] = []
        self.doubles: list[tuple[Place, Place]] = []
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
        own = [place for tree in self.subtrees for place in tree.places if not _adopts(place)]
        beside = (*own, *self.strided, *self.shared, *self.sharded, *(second for _, second in self.doubles))
        return sum(place.final_bytes for place in beside if place.device in devices)

    def kept_bytes(self, devices: Collection[int]) -> int:
        """Return how many bytes are copied, so that they can be put back, before what may fail is done to them."""
        if not self._is_atomic:
            return 0
        targets = [target for tree in self.subtrees if self.wants(tree) for target in tree.targets]
        own_bytes = sum(
            target.tensor.nbytes for target in targets if not target.on_meta and self._index(target) in devices
        )
        return own_bytes + sum(place.final_bytes for place in self.shared if place.device in devices)

    def _index(self, target: Target) -> int:
        """Return which of the devices a tensor is on. Buffers elsewhere count for the first."""
        device = target.tensor.device
        return self.devices.index(device) if device in self.devices else 0

    @property
    def hooks_may_change_more(self) -> bool:
        """Whether all tensors are to change at once, and modules have hooks of which nobody knows what else they do."""
        return self._is_atomic and any(self.wants(tree) and not tree.keeps_shapes for tree in self.subtrees)

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
            names = ", ".join(self.split_ties[:5])
            said.append(f"device_map: {len(self.split_ties)} tied tensors are where their first name is: {names}")
        return said

    def wants(self, subtree: Subtree) -> bool:
        """Say whether a module that loads itself has anything to load: a part of a model may be all that is wanted."""
        if not self._rules.is_partial or subtree.places:
            return True
        return any(self._rules.selects(name) for target in subtree.targets for name in target.names)

    def _check_keys(self, says: str | None) -> None:
        for keys, kind, side, other, setting in (
            (self.missing_keys, MissingKeysError, "model", "checkpoint", "ignore_missing"),
            (self.unexpected_keys, UnexpectedKeysError, "checkpoint", "model", "ignore_unexpected"),
        ):
            if keys:
                names = ", ".join(map(self._both_names, keys[:5]))
                who = f", says {says}, which loads itself" if says else ""
                raise kind(
                    f"{len(keys)} tensors of the {side} are not in the {other}{who}",
                    actual=names + (f" and {len(keys) - 5} more" if len(keys) > 5 else ""),
                    hint=f"device.{setting} lets single ones pass; device.strict: false lists all of them in the report",
                )

    def _both_names(self, name: str) -> str:
        spec = self._stored.get(name)
        return name if spec is None or spec.name == name else f"{name} (stored as {spec.name})"

    def release(self) -> None:
        """Let go of the places, a few at a time: freeing 46,000 at once holds the interpreter's lock for 27 ms."""
        while self.places:
            del self.places[-1000:]


def _adopts(place: Place) -> bool:
    return place.target is not None and place.target.on_meta


def deliver(stored: Mapping[str, Stored], config: DeviceConfig, device: torch.device) -> Placement:
    """Decide for a load without a model: every tensor is staged, for a consumer, who gets it by the name given here.

    Raises:
        UnsupportedFormatError: torch lacks a dtype.
    """
    placement = Placement((device,), stored, config)
    for position, (name, spec) in enumerate(stored.items()):
        dtype = _stored_dtype(spec, name)
        wanted = dtype
        if config.dtype not in ("model", "checkpoint") and dtype in CASTABLE:
            wanted = getattr(torch, config.dtype)
        shape = torch_shape(spec.dtype, spec.shape)
        placement.places.append(Place(name, spec.num_bytes, dtype, wanted, shape, "stage", position, None, spec.stride))
    return placement


def match(  # noqa: C901, PLR0912 (one loop over all tensors)
    model: nn.Module, stored: Mapping[str, Stored], config: DeviceConfig, default: torch.device | DeviceMap
) -> Placement:
    """Decide for every tensor of a checkpoint, or fail before anything has changed.

    Names, shapes, dtypes and devices are compared; all names that shared one tensor go on sharing one.

    Args:
        model: on meta, materialised, or partly so.
        stored: the checkpoint's tensors that are wanted, by their names in the model (see `NameRules.apply`).
        config: used except for `rename`, which has been, and `device_map`, which is `default` then.
        default: the device for a model that has no storage yet, where materialised parameters decide for themselves; or
            a map, which materialised parameters have to agree with. Of tied tensors the first name decides.

    Raises:
        MissingKeysError, UnexpectedKeysError: with `strict`, for names on one side alone.
        ShapeMismatchError, DtypeMismatchError: for the first tensor that does not fit.
        PlacementError: a tensor of a kind that cannot be loaded, a buffer on meta that is in no checkpoint, or
            parameters on several devices or on another than the target, or a map that does not fit the model.
        UnsupportedFormatError: torch lacks a dtype.
    """
    devices = default if isinstance(default, DeviceMap) else None
    placement = Placement((), stored, config)
    found = find_targets(model)
    _check_own_buffers(found, NameRules(config), devices)
    _check_subtrees(found)
    placement.subtrees, placement.prefixes = found.subtrees, found.prefixes
    if isinstance(default, DeviceMap):
        default.check(found)
        _leave_on_meta(placement, found, default)
        placement.devices = default.devices or (torch.device("cpu"),)
    else:
        placement.devices = (_common_device(found, config, default),)
    index, device = 0, placement.devices[0]
    places, names, find = placement.places, placement.names, found.by_name.get
    add_place, add_name = places.append, names.append
    unexpected: list[str] = []
    in_place: list[int] = []
    for name, spec in stored.items():
        target = find(name)
        if devices is not None and (target is not None or _enclosing(found.subtrees, name) is not None):
            chosen = devices.index_of(name if target is None else target.name)
            if chosen is None:
                continue
            index, device = chosen, placement.devices[chosen]
        if target is None or target.subtree is not None:
            if not _place_specially(placement, found, name, spec, target, config, index):
                # Checkpoints of older versions hold what is computed by now: position numbers, rotary tables.
                (placement.computed if name in found.own_buffers else unexpected).append(name)
                continue
        else:
            place = _place(name, spec, target, config, device, index)
            add_place(place)
            if place.mode != "adopt":
                _note_in_place(placement, place, target, in_place)
        if target is not None and target.filled_by < 0:
            target.filled_by = len(places) - 1
            add_name(target.name)
            if target.ties:
                names.extend(tie.name for tie in target.ties)
    if in_place:
        _find_shared(placement, in_place)
    missing: list[str] = []
    if len(names) < len(found.by_name) or placement.subtrees:
        unloaded = set(placement.unloaded)
        missing = [
            name
            for name, target in found.by_name.items()
            if target.filled_by < 0 and target.subtree is None and name not in unloaded
        ]
    placement.note_keys(missing, unexpected)
    return placement


def _leave_on_meta(placement: Placement, found: Targets, devices: DeviceMap) -> None:
    """Note what a map leaves on meta, and which ties it would split; forget modules of which nothing is loaded.

    Raises:
        PlacementError: a module that loads itself would get a part of its tensors alone.
    """
    unloaded: set[str] = set()
    for name, target in found.by_name.items():
        if name != target.name:  # a tie: dealt with under its first name
            continue
        index = devices.index_of(name)
        if index is None:
            unloaded.update(target.names)
        if any(devices.index_of(tie.name) != index for tie in target.ties):
            placement.split_ties.append(name)
    placement.unloaded = [name for name in found.by_name if name in unloaded]
    for subtree in list(found.subtrees):
        left = [target.name for target in subtree.targets if target.name in unloaded]
        if left and len(left) == len(subtree.targets):
            found.subtrees.remove(subtree)
        elif left:
            raise PlacementError(
                f"the device map leaves this on meta, but {subtree.name or 'the model'} loads all its tensors itself",
                tensor=left[0],
                hint="Leave all of that module on meta, or nothing",
            )


def _note_in_place(placement: Placement, place: Place, target: Target, in_place: list[int]) -> None:
    """Note what has to be done at the end for the last of the places, whose target has storage or is filled already."""
    if target.filled_by >= 0:
        placement.doubles.append((placement.places[target.filled_by], place))
    elif place.mode == "stage" and is_sharded(target.tensor):
        placement.sharded.append(place)
    else:
        in_place.append(len(placement.places) - 1)
        if place.mode == "stage":
            placement.strided.append(place)


def _find_shared(placement: Placement, in_place: list[int]) -> None:
    """Stage what would be written to memory that is also another tensor's, by readers that know no order."""
    places = placement.places
    lengths = [
        place.num_bytes
        if place.mode == "fill" and place.dtype is place.stored_dtype
        else length_in_memory(_tensor(place))
        for place in (places[index] for index in in_place)
    ]
    found = find_sharing([_tensor(places[index]) for index in in_place], lengths)
    if not found:
        return
    shared = [in_place[rank] for rank in found]
    for index in shared:
        places[index] = msgspec.structs.replace(places[index], mode="stage")
    placement.shared = sorted((places[index] for index in shared), key=lambda place: place.position)
    names = {place.name for place in placement.shared}
    placement.strided = [place for place in placement.strided if place.name not in names]


def _tensor(place: Place) -> torch.Tensor:
    assert place.target is not None
    return place.target.tensor


def _place_specially(
    placement: Placement,
    found: Targets,
    name: str,
    spec: Stored,
    target: Target | None,
    config: DeviceConfig,
    device: int,
) -> bool:
    """Place a tensor that a module loads itself; return false for one that has no place at all."""
    subtree = target.subtree if target is not None else _enclosing(found.subtrees, name)
    if subtree is None:
        return False
    place = _subtree_place(name, spec, target, subtree, config, device)
    subtree.places.append(place)
    placement.places.append(place)
    placement.names.append(name)
    return True


def _check_own_buffers(found: Targets, rules: NameRules, devices: DeviceMap | None) -> None:
    for name in found.own_on_meta:
        if rules.selects(name) and (devices is None or devices.index_of(name) is not None):
            raise PlacementError(
                "this buffer is on meta, but it is not persistent, so no checkpoint holds it",
                tensor=name,
                hint="Compute it on a real device before loading: only what the checkpoint holds may be on meta",
            )


def _check_subtrees(found: Targets) -> None:
    """Refuse tensors that modules which load themselves would replace by tensors of another kind."""
    for subtree in found.subtrees:
        for target in subtree.targets:
            if type(target.tensor) not in _PLAIN and target.on_meta:
                _check_kind(target.tensor, target.name)


def _common_device(found: Targets, config: DeviceConfig, default: torch.device) -> torch.device:
    """Return the device of the parameters that have storage, else the default. Buffers are copied to where they are."""
    device: torch.device | None = None
    for name, target in found.by_name.items():
        if target.on_meta or not target.is_parameter:
            continue
        place = target.tensor.device
        if device is None and (config.target == "auto" or place == default):
            device = place
        elif place != device:
            raise PlacementError(
                "the parameter already has storage, on another device than the rest of the load",
                tensor=name,
                expected=str(device or default),
                actual=str(place),
                hint="Move the model to one device, or set device.target to auto",
            )
    return device or default


def _enclosing(subtrees: list[Subtree], name: str) -> Subtree | None:
    return next((subtree for subtree in subtrees if name.startswith(subtree.prefix)), None) if subtrees else None


def _place(name: str, spec: Stored, target: Target, config: DeviceConfig, device: torch.device, index: int) -> Place:
    tensor, shape = target.tensor, spec.shape
    kind, declared, on_meta = type(tensor), target.declared, target.on_meta
    dtype = torch_dtype(spec.dtype)
    if dtype is None:
        raise unsupported(spec.dtype, name)
    if spec.dtype == "F4":
        shape = torch_shape(spec.dtype, shape)
    if kind not in _PLAIN:
        _check_kind(tensor, name)
    if tensor.shape != shape:
        _check_shape(tensor, shape, name)
    wanted = declared
    if dtype is not declared or (on_meta and config.dtype != "model"):
        wanted = destination_dtype(dtype, declared, config, on_meta=on_meta, tensor=name)
    mode: Mode = "adopt"
    if target.filled_by >= 0:
        mode = "stage"
    elif not on_meta:
        mode = _mode_in_place(tensor, device, config, name)
        if mode == "fill" and spec.stride is not None:
            mode = "stage"
    elif tensor._backward_hooks is not None:
        raise PlacementError(
            "the parameter is on meta and has a gradient hook, which would be lost",
            tensor=name,
            hint="Register hooks on parameters after loading",
        )
    return Place(name, spec.num_bytes, dtype, wanted, shape, mode, target.position, target, spec.stride, index)


def _mode_in_place(tensor: torch.Tensor, device: torch.device, config: DeviceConfig, name: str) -> Mode:
    if tensor.layout is not torch.strided or _overlaps(tensor):
        raise PlacementError(
            "the tensor has no memory of its own for every element (sparse, or expanded)",
            tensor=name,
            hint="Make it dense and contiguous before loading",
        )
    if config.commit == "atomic":
        return "stage"
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    if type(tensor) not in _PLAIN and is_sharded(tensor):
        return "stage"
    return "fill" if plain and tensor.device == device else "stage"


def _overlaps(tensor: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _subtree_place(
    name: str, spec: Stored, target: Target | None, subtree: Subtree, config: DeviceConfig, device: int
) -> Place:
    dtype = _stored_dtype(spec, name)
    shape = torch_shape(spec.dtype, spec.shape)
    wanted = dtype
    if target is not None:
        if is_sharded(target.tensor):
            check_sharded(target.tensor, name)
        if is_lazy(target.tensor):  # its hook would give it a shape, which nothing could take away again
            _check_kind(target.tensor, name)
        if subtree.keeps_shapes:
            _check_shape(target.tensor, shape, name)
        if subtree.keeps_shapes or (target.tensor.dtype in CASTABLE and dtype in CASTABLE):
            on_meta = target.tensor.device.type == "meta"
            wanted = destination_dtype(dtype, target.tensor.dtype, config, on_meta=on_meta, tensor=name)
    position = subtree.targets[0].position if subtree.targets else 0
    return Place(name, spec.num_bytes, dtype, wanted, shape, "stage", position, target, spec.stride, device)


def _check_kind(tensor: torch.Tensor, name: str) -> None:
    """Refuse tensors whose storage is not plain memory; subclasses that only add attributes or methods are fine.

    A class that says itself how it is dispatched (torchao) or moved to a device (bitsandbytes quantises then) stores
    something else than what it looks like, or will.
    """
    kind = type(tensor)
    if is_sharded(tensor):
        check_sharded(tensor, name)
        return
    if is_lazy(tensor):
        raise PlacementError(
            "the parameter has no shape yet (a lazy module)", tensor=name, hint="Run the module once before loading"
        )
    if any(getattr(kind, method) is not getattr(torch.Tensor, method) for method in _OWN_STORAGE):
        raise PlacementError(
            f"the parameter is a tensor subclass with a storage of its own kind ({kind.__module__}.{kind.__qualname__})",
            tensor=name,
            hint="Load the plain tensor first and wrap or quantise it afterwards",
        )


def _check_shape(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    if tensor.shape != shape:
        raise ShapeMismatchError(
            "the shapes differ",
            tensor=name,
            expected=f"{tuple(tensor.shape)} (model)",
            actual=f"{shape} (checkpoint)",
        )


def _stored_dtype(spec: Stored, name: str) -> torch.dtype:
    dtype = torch_dtype(spec.dtype)
    if dtype is None:
        raise unsupported(spec.dtype, name)
    return dtype
