"""Placement: which tensor of the checkpoint goes into which tensor of the model, and how.

Reads the model and decides; changes nothing. The decisions are carried out by `stage` (bytes) and `binding`
(parameters).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

import msgspec
import torch
from torch import nn

from weightstream.device.config import DeviceConfig
from weightstream.device.dtypes import CASTABLE, destination_dtype, torch_dtype, torch_shape, unsupported
from weightstream.errors import MissingKeysError, PlacementError, ShapeMismatchError, UnexpectedKeysError

__all__ = ["Mode", "Place", "Placement", "Site", "Stored", "Subtree", "Target", "deliver", "match", "model_device"]

#: adopt: the loader makes the storage and the parameter takes it. fill: the parameter has contiguous storage, which is
#: written to. stage: the loader makes a tensor that somebody else places at the end (module hooks, strided copies,
#: comparison of ties) or that is delivered as it is.
Mode = Literal["adopt", "fill", "stage"]


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


# There is one of each of the following per tensor: hidden from the garbage collector, so that it does not scan tens of
# thousands of them. They refer to modules, so whoever holds them must let them go when the load ends.


class Site(msgspec.Struct, frozen=True, gc=False):
    """One place where a tensor is registered: `module._parameters[key]` or `module._buffers[key]`."""

    name: str
    module: nn.Module
    key: str
    is_parameter: bool


class Target(msgspec.Struct, gc=False):
    """One tensor of the model with all its sites (several, if it is tied). `position`: in order of registration."""

    tensor: torch.Tensor
    site: Site
    position: int
    ties: tuple[Site, ...] = ()
    subtree: "Subtree | None" = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site, *self.ties)


class Place(msgspec.Struct, frozen=True, gc=False):
    """What becomes of one tensor of the checkpoint. `num_bytes` are those stored, `stored_dtype` theirs."""

    name: str
    num_bytes: int
    stored_dtype: torch.dtype
    dtype: torch.dtype
    shape: tuple[int, ...]
    mode: Mode
    position: int
    target: Target | None = None

    @property
    def is_cast(self) -> bool:
        return self.dtype is not self.stored_dtype


class Subtree:
    """A module that loads itself: through hooks, an overridden `_load_from_state_dict`, or extra state."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.prefix = f"{name}." if name else ""
        self.module = module
        loads = type(module)._load_from_state_dict
        #: Whether it takes every tensor in the model's own shape, so that shapes can be checked beforehand: torch's
        #: own modules do (BatchNorm overrides the method for old versions of itself), hooks may reshape anything.
        self.keeps_shapes = not module._load_state_dict_pre_hooks and loads.__module__.startswith("torch.nn.")
        self.targets: list[Target] = []
        self.places: list[Place] = []


class Placement:
    """All decisions for one load.

    Attributes:
        device: where adopted tensors go.
        places: one per tensor that is wanted from the checkpoint, in the checkpoint's order.
        subtrees: modules that load themselves, in order of registration.
        doubles: pairs of places that hold the same tied tensor and must be equal; the second is staged.
        strided: staged places that are copied into a target without contiguous storage.
        names: names in the model -> the place that fills them.
        module_names: every module of the model.
        loaded_themselves: filled in by `binding`: which subtrees loaded themselves.
        missing_keys, unexpected_keys: names on one side alone, as torch names them; `binding` adds those of subtrees.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.places: list[Place] = []
        self.subtrees: list[Subtree] = []
        self.doubles: list[tuple[Place, Place]] = []
        self.strided: list[Place] = []
        self.names: dict[str, Place] = {}
        self.module_names: list[str] = []
        self.loaded_themselves: list[str] = []
        self.missing_keys: list[str] = []
        self.unexpected_keys: list[str] = []


def model_device(model: nn.Module, config: DeviceConfig, default: torch.device) -> torch.device:
    """Return the one device a load into `model` uses: that of its materialised parameters, else `default`.

    Raises:
        PlacementError: materialised parameters lie on several devices, or not on the target that was asked for.
    """
    device: torch.device | None = None
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            continue
        if config.target != "auto" and parameter.device != default:
            raise PlacementError(
                "the parameter already has storage on another device than the target",
                tensor=name,
                expected=str(default),
                actual=str(parameter.device),
                hint="Move the model, or set device.target to auto",
            )
        if device is not None and device != parameter.device:
            raise PlacementError(
                "the model's parameters lie on several devices", tensor=name, expected=device, actual=parameter.device
            )
        device = parameter.device
    return device or default


def deliver(stored: Iterable[Stored], config: DeviceConfig, device: torch.device) -> Placement:
    """Decide for a load without a model: every tensor is staged, for a consumer.

    Raises:
        UnsupportedFormatError: torch lacks a dtype.
    """
    placement = Placement(device)
    for position, spec in enumerate(stored):
        dtype = _stored_dtype(spec)
        wanted = dtype
        if config.dtype not in ("model", "checkpoint") and dtype in CASTABLE:
            wanted = getattr(torch, config.dtype)
        shape = torch_shape(spec.dtype, spec.shape)
        placement.places.append(Place(spec.name, spec.num_bytes, dtype, wanted, shape, "stage", position))
    return placement


def match(model: nn.Module, stored: Mapping[str, Stored], config: DeviceConfig, device: torch.device) -> Placement:
    """Decide for every tensor of a checkpoint, or fail before anything has changed.

    Names, shapes, dtypes and devices are compared; all names that shared one tensor go on sharing one.

    Args:
        model: on meta, materialised, or partly so.
        stored: the checkpoint's tensors by name.
        config: `dtype` and `strict` are used.
        device: from `model_device`.

    Raises:
        MissingKeysError, UnexpectedKeysError: with `strict`, for names on one side alone.
        ShapeMismatchError, DtypeMismatchError: for the first tensor that does not fit.
        PlacementError: a tensor of a kind that cannot be loaded, or a buffer on meta that is in no checkpoint.
        UnsupportedFormatError: torch lacks a dtype.
    """
    placement = Placement(device)
    targets = _walk(model, placement)
    filled: set[int] = set()
    for name, spec in stored.items():
        target = targets.get(name)
        subtree = target.subtree if target is not None else _enclosing(placement.subtrees, name)
        if target is None and subtree is None:
            placement.unexpected_keys.append(name)
            continue
        place = _place(spec, target, subtree, config, double=target is not None and id(target) in filled)
        placement.places.append(place)
        if subtree is not None:
            subtree.places.append(place)
        elif target is not None and id(target) in filled:
            placement.doubles.append((placement.names[target.site.name], place))
        elif place.mode == "stage":
            placement.strided.append(place)
        if target is None:
            placement.names[name] = place
        elif id(target) not in filled:
            filled.add(id(target))
            for site in target.sites:
                placement.names[site.name] = place
    placement.missing_keys = [
        name for name, target in targets.items() if id(target) not in filled and target.subtree is None
    ]
    if config.strict:
        _check_keys(placement)
    return placement


def _walk(model: nn.Module, placement: Placement) -> dict[str, Target]:
    """Return every persistent tensor by each of its names, in order of registration; note the subtrees."""
    targets: dict[str, Target] = {}
    by_id: dict[int, Target] = {}
    stack: list[tuple[str, str, nn.Module, Subtree | None]] = [("", "", model, None)]
    while stack:
        name, prefix, module, subtree = stack.pop()
        placement.module_names.append(name)
        if subtree is None and _loads_itself(module):
            subtree = Subtree(name, module)
            placement.subtrees.append(subtree)
        for is_parameter, tensors in ((True, module._parameters), (False, module._buffers)):
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                full_name = prefix + key
                if not is_parameter and key in module._non_persistent_buffers_set:
                    _check_own_buffer(full_name, tensor)
                    continue
                site = Site(full_name, module, key, is_parameter)
                target = by_id.get(id(tensor))
                if target is None:
                    target = by_id[id(tensor)] = Target(tensor, site, len(by_id), (), subtree)
                    if subtree is not None:
                        subtree.targets.append(target)
                else:
                    target.ties = (*target.ties, site)
                targets[full_name] = target
        for key, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((prefix + key, f"{prefix}{key}.", child, subtree))
    return targets


def _loads_itself(module: nn.Module) -> bool:
    kind = type(module)
    return bool(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or kind._load_from_state_dict is not nn.Module._load_from_state_dict
        or kind.set_extra_state is not nn.Module.set_extra_state
        or "_load_from_state_dict" in module.__dict__
    )


def _check_own_buffer(name: str, buffer: torch.Tensor) -> None:
    if buffer.device.type == "meta":
        raise PlacementError(
            "this buffer is on meta, but it is not persistent, so no checkpoint holds it",
            tensor=name,
            hint="Compute it on a real device before loading: only what the checkpoint holds may be on meta",
        )


def _enclosing(subtrees: list[Subtree], name: str) -> Subtree | None:
    return next((subtree for subtree in subtrees if name.startswith(subtree.prefix)), None) if subtrees else None


def _place(
    spec: Stored, target: Target | None, subtree: Subtree | None, config: DeviceConfig, *, double: bool
) -> Place:
    dtype = _stored_dtype(spec)
    shape = torch_shape(spec.dtype, spec.shape)
    if subtree is not None:
        wanted = dtype
        if target is not None and subtree.keeps_shapes:
            _check_shape(target.tensor, shape, spec.name)
        if target is not None and target.tensor.dtype in CASTABLE and dtype in CASTABLE:
            on_meta = target.tensor.device.type == "meta"
            wanted = destination_dtype(dtype, target.tensor.dtype, config, on_meta=on_meta, tensor=spec.name)
        position = subtree.targets[0].position if subtree.targets else 0
        return Place(spec.name, spec.num_bytes, dtype, wanted, shape, "stage", position, target)
    assert target is not None
    tensor = target.tensor
    _check_kind(tensor, spec.name)
    _check_shape(tensor, shape, spec.name)
    on_meta = tensor.is_meta
    declared = tensor.dtype
    if dtype is declared and (config.dtype == "model" or not on_meta):
        wanted = declared
    else:
        wanted = destination_dtype(dtype, declared, config, on_meta=on_meta, tensor=spec.name)
    mode: Mode = "adopt"
    if double or not (on_meta or tensor.is_contiguous()):
        mode = "stage"
    elif not on_meta:
        mode = "fill"
    return Place(spec.name, spec.num_bytes, dtype, wanted, shape, mode, target.position, target)


def _check_shape(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    if tensor.shape != shape:
        raise ShapeMismatchError(
            "the shapes differ",
            tensor=name,
            expected=f"{tuple(tensor.shape)} (model)",
            actual=f"{shape} (checkpoint)",
        )


def _stored_dtype(spec: Stored) -> torch.dtype:
    dtype = torch_dtype(spec.dtype)
    if dtype is None:
        raise unsupported(spec.dtype, spec.name)
    return dtype


def _check_kind(tensor: torch.Tensor, name: str) -> None:
    kind = type(tensor)
    if kind is nn.Parameter or kind is torch.Tensor:
        return
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        raise PlacementError(
            "the parameter has no shape yet (a lazy module)", tensor=name, hint="Run the module once before loading"
        )
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise PlacementError(
            f"the parameter is a tensor subclass with a storage of its own kind ({kind.__module__}.{kind.__qualname__})",
            tensor=name,
            hint="Load the plain tensor first and wrap or quantise it afterwards",
        )


def _check_keys(placement: Placement) -> None:
    for keys, kind, side, other in (
        (placement.missing_keys, MissingKeysError, "model", "checkpoint"),
        (placement.unexpected_keys, UnexpectedKeysError, "checkpoint", "model"),
    ):
        if keys:
            names = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise kind(
                f"{len(keys)} tensors of the {side} are not in the {other}",
                actual=names,
                hint="device.strict: false lists them in the report instead",
            )
