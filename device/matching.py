"""Matching: how a placement is decided, tensor by tensor, for a model or for a consumer."""

# pyright: reportPrivateUsage=false
# Gradient hooks have no public name in `torch.Tensor`.
from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import repeat

import msgspec
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from weightstream.device.config import DeviceConfig
from weightstream.device.devicemap import DeviceMap
from weightstream.device.dtypes import CASTABLE, destination_dtype, torch_dtype, torch_shape, unsupported
from weightstream.device.kinds import PLAIN, check_kind, refuse_hooks
from weightstream.device.names import NameRules
from weightstream.device.placement import Mode, Place, Placement, Stored, tensor_of
from weightstream.device.sharded import check_sharded, is_sharded
from weightstream.device.sharing import find_sharing, length_in_memory
from weightstream.device.targets import Subtree, Target, Targets, find_targets
from weightstream.errors import PlacementError, ShapeMismatchError

__all__ = ["deliver", "match"]


def deliver(stored: Mapping[str, Stored], config: DeviceConfig, device: torch.device) -> Placement:
    """Decide for a load without a model: every tensor is staged, for a consumer, who gets it by the name given here.

    Raises:
        UnsupportedFormatError: torch lacks a dtype, or cannot have it in this shape.
    """
    placement = Placement((device,), stored, config)
    for position, (name, spec) in enumerate(stored.items()):
        dtype = _stored_dtype(spec, name)
        wanted = dtype
        if config.dtype not in ("model", "checkpoint") and dtype in CASTABLE:
            wanted = getattr(torch, config.dtype)
        shape = torch_shape(spec.dtype, spec.shape, tensor=name)
        placement.places.append(Place(name, spec.num_bytes, dtype, wanted, shape, "stage", position, None, spec.stride))
    return placement


def match(  # noqa: C901 (one loop over all tensors)
    model: nn.Module,
    stored: Mapping[str, Stored],
    config: DeviceConfig,
    default: torch.device | DeviceMap,
    *,
    extras: Mapping[str, Callable[[], object]] | None = None,
) -> Placement:
    """Decide for every tensor of a checkpoint, or fail before anything has changed.

    Names, shapes, dtypes and devices are compared; all names that shared one tensor go on sharing one.

    Args:
        model: on meta, materialised, or partly so.
        stored: the checkpoint's tensors that are wanted, by their names in the model (see `NameRules.apply`).
        config: used except for `rename`, which has been, and `device_map`, which is `default` then.
        default: the device for a model that has no storage yet, where materialised parameters decide for themselves; or
            a map, which materialised parameters have to agree with. Of tied tensors the first name decides.
        extras: what the checkpoint holds for modules besides tensors, by name; called for those that are there.

    Raises:
        MissingKeysError, UnexpectedKeysError: with `strict`, for names on one side alone.
        ShapeMismatchError, DtypeMismatchError: for the first tensor that does not fit.
        PlacementError: a tensor of a kind that cannot be loaded, a buffer on meta that is in no checkpoint, or
            parameters on several devices or on another than the target, or a map that does not fit the model.
        UnsupportedFormatError: torch lacks a dtype, or cannot have it in this shape.
    """
    devices = default if isinstance(default, DeviceMap) else None
    placement = Placement((), stored, config)
    found = find_targets(model)
    _check_own_buffers(found, NameRules(config), devices)
    _check_subtrees(found)
    placement.subtrees, placement.prefixes = found.subtrees, found.prefixes
    left = _choose_devices(placement, found, config, default)
    found.decide(stored)
    index, device = 0, placement.devices[0]
    places, names, find, special = placement.places, placement.names, found.index_of.get, found.special
    add_place, add_name, tensors = places.append, names.append, found.tensors
    as_declared = config.dtype == "model"
    unexpected: list[str] = []
    in_place: list[int] = []
    last_names = found.last_names({**stored, **(extras or {})}) if found.again else {}
    stands_for = {last: first for first, last in last_names.items()}
    all_at = list(map(find, stored, repeat(-1)))  # in one go: most of it is waiting for memory
    for (name, spec), at in zip(stored.items(), all_at, strict=True):
        target = special.get(at) if special else None
        if devices is not None and (at >= 0 or _enclosing(placement.subtrees, name) is not None):
            chosen = devices.index_of(name if target is None else target.name)
            if chosen is None:
                continue
            index, device = chosen, placement.devices[chosen]
        if at < 0 or (target is not None and target.subtree_of(name) >= 0):
            if (
                name in last_names or _enclosing(left, name) is not None
            ):  # another one counts, or it would be the hook's
                continue
            own_name = stands_for.get(name, name)
            if not _place_specially(placement, found, name, own_name, spec, target, config, index):
                # Checkpoints of older versions hold what is computed by now: position numbers, rotary tables.
                (placement.note_computed if name in found.own_buffers else unexpected.append)(name)
                continue
        else:
            place = _place(name, spec, tensors[at], at, target, config, device, index, as_declared=as_declared)
            add_place(place)
            if place.mode != "adopt" and (target is None or target.is_filled_by(name)):
                _note_in_place(placement, place, in_place)
        if target is None:
            add_name(name)
        elif target.is_filled_by(name):
            target.filled_by = len(places) - 1
            names.extend(target.names)
    if special:
        _note_again(placement)
    if in_place:
        _find_shared(placement, in_place)
    counting = {name: make for name, make in (extras or {}).items() if name not in last_names}
    unexpected += _give_extras(placement.subtrees, counting, stands_for, devices)
    placement.note_keys(_missing(placement, found), _without_doubles(unexpected, found, stored, extras or {}))
    return placement


def _missing(placement: Placement, found: Targets) -> list[str]:
    """Return the names of the model that nothing fills, but for those that modules which load themselves ask for."""
    special = found.special
    if len(placement.names) == len(found.index_of) and not placement.subtrees:
        return []
    known = {*placement.names, *placement.unloaded}
    return [
        name
        for name, at in found.index_of.items()
        if name not in known and not (at in special and _is_asked_for(placement, found, special[at]))
    ]


def _is_asked_for(placement: Placement, found: Targets, target: Target) -> bool:
    """Tell whether a module that loads itself has this tensor, and will say whether it has got it."""
    return any(site.subtree >= 0 and placement.wants(found.subtrees[site.subtree]) for site in target.sites)


def _choose_devices(
    placement: Placement, found: Targets, config: DeviceConfig, default: torch.device | DeviceMap
) -> list[Subtree]:
    """Note the devices; return the modules that load themselves and are left on meta."""
    if not isinstance(default, DeviceMap):
        placement.devices = (_common_device(found, config, default),)
        return []
    default.check(found)
    left = default.leave_on_meta(placement, found)
    placement.devices = default.devices or (torch.device("cpu"),)
    return left


def _give_extras(
    subtrees: list[Subtree],
    extras: Mapping[str, Callable[[], object]],
    stands_for: Mapping[str, str],
    devices: DeviceMap | None,
) -> list[str]:
    """Give extra state to the modules that load themselves; return the names of what is left."""
    left: list[str] = []
    for name, make in extras.items():
        if devices is not None and devices.index_of(name) is None:
            continue
        own_name = stands_for.get(name, name)
        subtree = _enclosing(subtrees, own_name)
        if subtree is None:
            left.append(name)
        else:
            subtree.extras[own_name] = make()
    return left


def _without_doubles(
    unexpected: list[str], found: Targets, stored: Mapping[str, object], extras: Mapping[str, object]
) -> list[str]:
    """Leave out what is there twice: state dicts have the extra state of a module under every name that it has."""
    if not found.again:
        return unexpected
    given = {*stored, *extras}
    return [name for name in unexpected if not found.is_double(name, given)]


def _note_in_place(placement: Placement, place: Place, in_place: list[int]) -> None:
    """Note what has to be done at the end for the last of the places, whose target has storage."""
    if place.mode == "stage" and is_sharded(tensor_of(place)):
        placement.sharded.append(place)
    else:
        in_place.append(len(placement.places) - 1)
        if place.mode == "stage":
            placement.strided.append(place)


def _note_again(placement: Placement) -> None:
    """Note what is to be compared of tied tensors that the checkpoint has under several names.

    A module that loads itself compares itself what it has under several.
    """
    for place in placement.places:
        if place.target is None:
            continue
        first = placement.places[place.target.filled_by]
        if first is place:
            continue
        subtree = place.target.subtree_of(place.name)
        if subtree < 0:
            placement.doubles.append((first, place))
        elif subtree != place.target.subtree_of(first.name):
            placement.twins.append((first, place))


def _find_shared(placement: Placement, in_place: list[int]) -> None:
    """Stage what would be written to memory that is also another tensor's, by readers that know no order."""
    places = placement.places
    lengths = [
        place.num_bytes
        if place.mode == "fill" and place.dtype is place.stored_dtype
        else length_in_memory(tensor_of(place))
        for place in (places[index] for index in in_place)
    ]
    found = find_sharing([tensor_of(places[index]) for index in in_place], lengths)
    if not found:
        return
    shared = [in_place[rank] for rank in found]
    for index in shared:
        places[index] = msgspec.structs.replace(places[index], mode="stage")
    placement.shared = sorted((places[index] for index in shared), key=lambda place: place.position)
    names = {place.name for place in placement.shared}
    placement.strided = [place for place in placement.strided if place.name not in names]


def _place_specially(
    placement: Placement,
    found: Targets,
    name: str,
    own_name: str,
    spec: Stored,
    target: Target | None,
    config: DeviceConfig,
    device: int,
) -> bool:
    """Place a tensor that a module loads itself; return false for one that has no place at all."""
    subtree = _enclosing(placement.subtrees, own_name) if target is None else found.subtrees[target.subtree_of(name)]
    if subtree is None:
        return False
    if own_name != name:
        subtree.stand_ins[name] = own_name
    place = _subtree_place(name, spec, target, subtree, config, device)
    subtree.places.append(place)
    placement.places.append(place)
    if target is None:
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
        for target in subtree.all_targets:
            tensor = target.tensor
            if type(tensor) not in PLAIN and target.on_meta:
                check_kind(tensor, target.name)
            if target.on_meta and (tensor._backward_hooks is not None or tensor._post_accumulate_grad_hooks):
                refuse_hooks(target.name)


def _common_device(found: Targets, config: DeviceConfig, default: torch.device) -> torch.device:
    """Return the device of the parameters that have storage, else the default. Buffers are copied to where they are."""
    device: torch.device | None = None
    for name in found.materialised:
        place = found.get(name).device
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


def _place(  # noqa: PLR0913 (called for each tensor: objects that hold some of these would cost as much again)
    name: str,
    spec: Stored,
    tensor: torch.Tensor,
    at: int,
    target: Target | None,
    config: DeviceConfig,
    device: torch.device,
    index: int,
    *,
    as_declared: bool,
) -> Place:
    shape, declared, on_meta = spec.shape, tensor.dtype, tensor.is_meta
    dtype = torch_dtype(spec.dtype)
    if dtype is None:
        raise unsupported(spec.dtype, name)
    if spec.dtype == "F4":
        shape = torch_shape(spec.dtype, shape, tensor=name)
    if type(tensor) not in PLAIN:
        check_kind(tensor, name)
    if tensor.shape != shape:
        shape = _shape_in_model(tensor, shape, name)
    wanted = declared
    if dtype is not declared or (on_meta and not as_declared):
        wanted = destination_dtype(dtype, tensor, config, tensor_name=name)
    mode: Mode = "adopt"
    if target is not None and not target.is_filled_by(name):
        mode = "stage"
    elif not on_meta:
        mode = _mode_in_place(tensor, device, config, name)
        if mode == "fill" and spec.stride is not None:
            mode = "stage"
    elif tensor._backward_hooks is not None or tensor._post_accumulate_grad_hooks:
        refuse_hooks(name)
    return Place(name, spec.num_bytes, dtype, wanted, shape, mode, at, tensor, spec.stride, index, target)


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
    if type(tensor) not in PLAIN and is_sharded(tensor):
        return "stage"
    return "fill" if plain and tensor.device == device else "stage"


def _overlaps(tensor: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _subtree_place(
    name: str, spec: Stored, target: Target | None, subtree: Subtree, config: DeviceConfig, device: int
) -> Place:
    dtype = _stored_dtype(spec, name)
    shape = torch_shape(spec.dtype, spec.shape, tensor=name)
    wanted = dtype
    if target is not None:
        if is_sharded(target.tensor):
            check_sharded(target.tensor, name)
        if is_lazy(target.tensor):  # its hook would give it a shape, which nothing could take away again
            check_kind(target.tensor, name)
        if subtree.keeps_shapes:
            shape = _shape_in_model(target.tensor, shape, name)
        if subtree.keeps_shapes or (target.tensor.dtype in CASTABLE and dtype in CASTABLE):
            wanted = destination_dtype(dtype, target.tensor, config, tensor_name=name)
    position = subtree.targets[0].position if subtree.targets else 0
    tensor = None if target is None else target.tensor
    return Place(name, spec.num_bytes, dtype, wanted, shape, "stage", position, tensor, spec.stride, device, target)


def _shape_in_model(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Return the shape that a stored tensor gets, which is its own but for scalars: torch 0.3 stored them as vectors."""
    if tensor.shape == shape or (tensor.ndim == 0 and shape == (1,)):
        return tuple(tensor.shape)
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
