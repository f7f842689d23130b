# pyright: reportPrivateUsage=false
# `nn.Module` has no public way to look a tensor up where it is registered.
"""Binding: parameters take the tensors that were loaded, and give them back if the load fails.

A parameter on meta stays the object that it is: only what is behind it is exchanged, as `torch.utils.swap_tensors` does
it. So its class, its attributes, its ties and every reference that somebody holds stay true, and binding 46,000
parameters leaves not one new object to the garbage collector. `requires_grad` belongs to what is exchanged and is
copied. Runs on the load's own thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import nn

from weightstream.device.placement import Place, Placement
from weightstream.device.sharded import is_sharded, local_parts, split_like
from weightstream.device.stage import DeviceStage
from weightstream.device.targets import Site, Subtree, Target
from weightstream.errors import PlacementError

__all__ = ["Binder"]

_exchange = cast(
    "Callable[[torch.Tensor, torch.Tensor], None]",
    torch._C._swap_tensor_impl,  # pyright: ignore[reportUnknownMemberType]  # what `swap_tensors` is made of
)


class Binder:
    """Carries out a placement, tensor by tensor, and undoes it."""

    def __init__(self, placement: Placement, stage: DeviceStage) -> None:
        self._placement = placement
        self._stage = stage
        self._staged: dict[str, torch.Tensor] = {}
        self._sharded = {place.name for place in placement.sharded}
        self._adopted: list[torch.Tensor] = []
        self._on_meta: list[torch.Tensor] = []
        self._written: list[str] = []

    @property
    def written(self) -> list[str]:
        """Materialised tensors that hold loaded bytes, or some, by now."""
        return [self._placement.places[index].name for index in sorted(self._stage.touched)] + self._written

    def bind(self, places: list[int]) -> list[str]:
        """Place tensors whose bytes are all there; return the names, in the model, that may be used from now on."""
        described = self._placement.places
        ready: list[str] = []
        filled = [index for index in places if described[index].mode == "fill"]
        if filled:
            for index in filled:
                ready.extend(site.name for site in _sites(described[index]))
            places = [index for index in places if described[index].mode != "fill"]
        adopt = self._adopt
        for index, tensor in zip(places, self._stage.take(places), strict=True):
            place = described[index]
            if place.mode == "stage":
                self._staged[place.name] = tensor
                continue
            target = place.target
            assert target is not None
            adopt(target.tensor, tensor)
            ready.append(target.name)
            if target.ties:
                ready.extend(tie.name for tie in target.ties)
        if self._sharded:
            whole = [described[index] for index in places if described[index].name in self._sharded]
            if whole:
                self._stage.run(lambda: self._write(whole, ready))
        return ready

    def finish(self) -> list[str]:
        """Place what could not be placed tensor by tensor; return the names that became usable.

        Raises:
            PlacementError: two names of one tied tensor have different bytes, or a module's own hooks failed.
        """
        ready: list[str] = []
        placement = self._placement
        if placement.doubles or placement.strided or placement.shared or placement.subtrees:
            self._stage.run(lambda: self._finish_staged(ready))
        return ready

    def rollback(self) -> None:
        """Put every parameter that was on meta back there, as it was. Copies must have completed."""
        while self._adopted:
            tensor, on_meta = self._adopted.pop(), self._on_meta.pop()
            on_meta.requires_grad_(tensor.requires_grad)
            _exchange(tensor, on_meta)
        self._staged.clear()

    def release(self) -> None:
        """Let go of what a rollback would need, a few at a time: all at once holds the interpreter's lock for 20 ms."""
        while self._on_meta:
            del self._on_meta[-1000:], self._adopted[-1000:]

    def _adopt(self, tensor: torch.Tensor, loaded: torch.Tensor) -> None:
        """Put a loaded tensor behind a parameter or buffer that is on meta."""
        if tensor.requires_grad:
            loaded.requires_grad_(True)
        _exchange(tensor, loaded)
        self._adopted.append(tensor)
        self._on_meta.append(loaded)  # which is what the parameter was before

    @torch.no_grad()
    def _finish_staged(self, ready: list[str]) -> None:
        shared = {place.name: self._staged[place.name] for place in self._placement.shared}
        self._write([*self._placement.strided, *self._placement.shared], ready)
        for place in self._placement.shared:
            if not _are_same(_target(place), shared[place.name]):
                raise PlacementError(
                    "the model has this tensor in the memory of another one, for which the checkpoint has other values",
                    tensor=place.name,
                    expected="the same bytes for what both hold",
                    hint="Remove one of the two from the checkpoint, or give it memory of its own in the model",
                )
        for first, second in self._placement.doubles:
            self._compare(first, self._staged.pop(second.name), second)
        for subtree in filter(self._placement.wants, self._placement.subtrees):
            self._load_subtree(subtree)
            ready.extend(place.name for place in subtree.places)
            ready.extend(name for target in subtree.targets for name in target.names)

    @torch.no_grad()
    def _write(self, places: list[Place], ready: list[str]) -> None:
        """Copy staged tensors to the storage that their targets have."""
        for place in places:
            tensor, loaded = _target(place), self._staged.pop(place.name)
            self._written.append(place.name)
            if is_sharded(tensor):
                tensor, loaded = local_parts(tensor, loaded)
            tensor.copy_(loaded)
            ready.extend(site.name for site in _sites(place))

    def _compare(self, first: Place, second: torch.Tensor, place: Place) -> None:
        assert first.target is not None
        loaded = _registered(first.target.sites[0])
        if is_sharded(loaded):
            loaded, second = local_parts(loaded, second)
        if not _are_same(loaded, second.to(loaded.dtype)):
            raise PlacementError(
                f"the model ties this tensor to {first.name}, but the checkpoint has other values for it",
                tensor=place.name,
                expected="the same bytes under both names",
                hint="Remove one of the two from the checkpoint, or untie them in the model",
            )

    def _load_subtree(self, subtree: Subtree) -> None:
        """Let a module load its part of the checkpoint itself, as `load_state_dict` of the whole model would."""
        name = f"{subtree.name or 'the model'} ({type(subtree.module).__qualname__})"
        state = {place.name: _split(place, self._staged.pop(place.name)) for place in subtree.places}
        whole = {(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in state.values() if not is_sharded(tensor)}
        assign = any(target.tensor.is_meta for target in subtree.targets)
        self._written.extend(target.name for target in subtree.targets if not target.tensor.is_meta)
        keys = _Keys([], [])
        errors: list[str] = []
        try:
            _load_module(subtree.module, state, subtree.prefix, keys, errors, assign=assign)
            if errors:
                raise RuntimeError("; ".join(errors))  # noqa: TRY301 (mapped like those that hooks raise)
        except Exception as exc:
            for target in subtree.targets:
                _restore(target)
            raise PlacementError(f"{name}, which loads itself, failed: {exc}", tensor=subtree.name or None) from exc
        for target in subtree.targets:
            tensor = _restore(target)
            if tensor is not None and target.tensor.is_meta:
                if (tensor.data_ptr(), tensor.dtype, tensor.shape) not in whole:
                    tensor = tensor.clone(memory_format=torch.contiguous_format)  # a hook's slice holds all of a block
                self._adopt(target.tensor, tensor)
            elif tensor is not None:  # it had storage, which `assign` does not ask for
                target.tensor.copy_(tensor)
        self._note_keys(subtree, name, keys.missing_keys, keys.unexpected_keys)
        self._placement.loaded_themselves.append(name)

    def _note_keys(self, subtree: Subtree, name: str, missing: list[str], unexpected: list[str]) -> None:
        if missing:
            filled = self._filled_otherwise(subtree, set(missing))
            missing = [key for key in missing if key not in filled]
        self._placement.note_keys(missing, unexpected, says=name)

    def _filled_otherwise(self, subtree: Subtree, missing: set[str]) -> set[str]:
        """Return which of the names that a module misses are those of tensors that were loaded under another name."""
        named = set(self._placement.names)
        filled: set[str] = set()
        for target in subtree.targets:
            names = target.names
            own = [name for name in names if name.startswith(subtree.prefix)]
            if not target.tensor.is_meta and (named.intersection(names) or set(own) - missing):
                filled.update(names)
        return filled


class _Keys(NamedTuple):
    """What hooks after a module's loading may look at and change; torch's names."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def _load_module(
    module: nn.Module, state: dict[str, torch.Tensor], prefix: str, keys: _Keys, errors: list[str], *, assign: bool
) -> None:
    """Do what `nn.Module.load_state_dict` does for one module and those below, with names as in the whole model."""
    metadata = {"assign_to_params_buffers": assign}
    load = cast("Callable[..., None]", module._load_from_state_dict)  # pyright: ignore[reportUnknownMemberType]
    load(state, prefix, metadata, True, keys.missing_keys, keys.unexpected_keys, errors)
    for name, child in module._modules.items():
        if child is not None:
            below = {key: value for key, value in state.items() if key.startswith(f"{prefix}{name}.")}
            _load_module(child, below, f"{prefix}{name}.", keys, errors, assign=assign)
    hooks = cast("dict[int, Callable[[nn.Module, _Keys], object]]", vars(module)["_load_state_dict_post_hooks"])
    for hook in hooks.values():
        hook(module, keys)


def _restore(target: Target) -> torch.Tensor | None:
    """Register a parameter again that `load_state_dict` replaced by a new one; return the new one's contents."""
    found = _registered(target.sites[0])
    if found is target.tensor:
        return None
    for one in target.sites:  # as the module itself would: nn.LSTM, for one, keeps a list of its own
        setattr(one.module, one.key, target.tensor)
    return found.data


def _split(place: Place, whole: torch.Tensor) -> torch.Tensor:
    """Return what a module that loads itself gets: of a tensor that is split over several devices, its own part."""
    target = place.target
    if target is not None and is_sharded(target.tensor) and target.tensor.shape == whole.shape:
        return split_like(target.tensor, whole)
    return whole


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bytes: what is not a number equals itself, and zeros may differ in their sign."""
    first, second = (tensor.resolve_conj().resolve_neg().contiguous() for tensor in (one, other))
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _target(place: Place) -> torch.Tensor:
    assert place.target is not None
    return place.target.tensor


def _sites(place: Place) -> tuple[Site, ...]:
    assert place.target is not None
    return place.target.sites


def _registered(site: Site) -> torch.Tensor:
    found = site.module._parameters.get(site.key) if site.is_parameter else site.module._buffers.get(site.key)
    assert found is not None
    return found
