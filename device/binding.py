"""Binding: parameters take the tensors that were loaded, and get back what they had if the load fails.

Runs on the load's own thread. Everything it changes in the model it notes first, so that `rollback` can undo it.
"""

# pyright: reportPrivateUsage=false
# `nn.Module` has no public way to set a parameter without a check of its own that takes longer than all the rest.
from __future__ import annotations

from typing import cast

import torch
from torch import nn

from weightstream.device.placement import Place, Placement, Site, Subtree, Target
from weightstream.device.stage import DeviceStage
from weightstream.errors import MissingKeysError, PlacementError, UnexpectedKeysError

__all__ = ["Binder"]

_make_parameter = torch.Tensor._make_subclass


class Binder:
    """Carries out a placement, tensor by tensor, and undoes it."""

    def __init__(self, placement: Placement, stage: DeviceStage, *, strict: bool) -> None:
        self._placement = placement
        self._stage = stage
        self._strict = strict
        self._staged: dict[str, torch.Tensor] = {}
        self._undo: list[tuple[Site, torch.Tensor]] = []
        self._written: list[str] = []
        self._plain_setattr: dict[type[nn.Module], bool] = {}

    @property
    def written(self) -> list[str]:
        """Materialised tensors that hold loaded bytes, or some, by now."""
        return [self._placement.places[index].name for index in sorted(self._stage.touched)] + self._written

    def bind(self, places: list[int]) -> list[str]:
        """Place tensors whose bytes are all there; return the names, in the model, that may be used from now on."""
        ready: list[str] = []
        described = self._placement.places
        made = [index for index in places if described[index].mode != "fill"]
        for index in places:
            if described[index].mode == "fill":
                ready.extend(site.name for site in _sites(described[index]))
        for index, tensor in zip(made, self._stage.take(made), strict=True):
            place = described[index]
            target = place.target
            if place.mode == "stage":
                self._staged[place.name] = tensor
                continue
            assert target is not None
            self._adopt(target, tensor)
            ready.append(target.site.name)
            if target.ties:
                ready.extend(tie.name for tie in target.ties)
        return ready

    def finish(self) -> list[str]:
        """Place what could not be placed tensor by tensor; return the names that became usable.

        Raises:
            PlacementError: two names of one tied tensor have different bytes, or a module's own hooks failed.
        """
        ready: list[str] = []
        if self._placement.doubles or self._placement.strided or self._placement.subtrees:
            self._stage.run(lambda: self._finish_staged(ready))
        return ready

    def rollback(self) -> None:
        """Put back every tensor that was replaced, latest first. Copies must have completed."""
        for site, tensor in reversed(self._undo):
            self._register(site, tensor)
        self._undo.clear()

    def forget(self) -> None:
        """Let go of what a rollback would need."""
        self._undo.clear()
        self._staged.clear()

    def _adopt(self, target: Target, tensor: torch.Tensor) -> None:
        old = target.tensor
        site = target.site
        if site.is_parameter:
            new = _make_parameter(type(old), tensor, old.requires_grad)
        else:
            new = tensor.requires_grad_(old.requires_grad) if old.requires_grad else tensor
        _take_attributes(new, old)
        self._undo.append((site, old))
        self._register(site, new)
        for tie in target.ties:
            self._undo.append((tie, old))
            self._register(tie, new)

    def _register(self, site: Site, tensor: torch.Tensor) -> None:
        """Set a parameter or buffer; through `__setattr__` where the module has one of its own, as nn.LSTM does."""
        kind = type(site.module)
        plain = self._plain_setattr.get(kind)
        if plain is None:
            plain = self._plain_setattr[kind] = kind.__setattr__ is nn.Module.__setattr__
        if not plain:
            setattr(site.module, site.key, tensor)
        elif site.is_parameter:
            site.module._parameters[site.key] = tensor  # type: ignore[assignment]  # made with the old one's class
        else:
            site.module._buffers[site.key] = tensor

    @torch.no_grad()
    def _finish_staged(self, ready: list[str]) -> None:
        for place in self._placement.strided:
            assert place.target is not None
            place.target.tensor.copy_(self._staged.pop(place.name))
            self._written.append(place.name)
            ready.extend(site.name for site in _sites(place))
        for first, second in self._placement.doubles:
            self._compare(first, self._staged.pop(second.name), second)
        for subtree in self._placement.subtrees:
            self._load_subtree(subtree)
            ready.extend(place.name for place in subtree.places)
            ready.extend(site.name for target in subtree.targets for site in target.sites)

    def _compare(self, first: Place, second: torch.Tensor, place: Place) -> None:
        assert first.target is not None
        site = first.target.site
        loaded = _registered(site)
        if loaded.dtype != second.dtype:
            second = second.to(loaded.dtype)
        if not torch.equal(loaded.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8)):
            raise PlacementError(
                f"the model ties this tensor to {first.name}, but the checkpoint has other values for it",
                tensor=place.name,
                expected="the same bytes under both names",
                hint="Remove one of the two from the checkpoint, or untie them in the model",
            )

    def _load_subtree(self, subtree: Subtree) -> None:
        """Let a module load its part of the checkpoint itself, as `load_state_dict` would."""
        prefix = subtree.prefix
        state = {place.name.removeprefix(prefix): self._staged.pop(place.name) for place in subtree.places}
        adopted = [target for target in subtree.targets if target.tensor.is_meta]
        for target in subtree.targets:
            self._undo.extend((site, target.tensor) for site in target.sites)
        self._written.extend(target.site.name for target in subtree.targets if not target.tensor.is_meta)
        try:
            loaded = subtree.module.load_state_dict(state, strict=False, assign=bool(adopted))
        except Exception as exc:
            raise PlacementError(
                f"the module {subtree.name or 'itself'} ({type(subtree.module).__qualname__}), which loads itself,"
                f" failed: {exc}",
                tensor=subtree.name or None,
            ) from exc
        self._adopt_classes(adopted)
        missing_keys, unexpected_keys = cast("tuple[list[str], list[str]]", loaded)
        missing = [prefix + key for key in missing_keys if prefix + key not in self._placement.names]
        unexpected = [prefix + key for key in unexpected_keys]
        for keys, kind in ((missing, MissingKeysError), (unexpected, UnexpectedKeysError)):
            if self._strict and keys:
                raise kind(
                    f"so says the module {subtree.name or 'itself'} ({type(subtree.module).__qualname__}), which"
                    " loads itself",
                    actual=", ".join(keys[:5]),
                )
        self._placement.missing_keys += missing
        self._placement.unexpected_keys += unexpected
        self._placement.loaded_themselves.append(f"{subtree.name or 'the model'} ({type(subtree.module).__qualname__})")

    def _adopt_classes(self, targets: list[Target]) -> None:
        """Give the parameters that `load_state_dict` made the class, attributes and ties of those they replaced."""
        for target in targets:
            tensor, old = _registered(target.site), target.tensor
            if tensor is old:
                continue
            if target.site.is_parameter and type(tensor) is not type(old):
                tensor = _make_parameter(type(old), tensor.data, old.requires_grad)
            _take_attributes(tensor, old)
            for site in target.sites:
                self._register(site, tensor)


def _take_attributes(new: torch.Tensor, old: torch.Tensor) -> None:
    attributes = vars(old)
    if attributes:
        vars(new).update(attributes)


def _sites(place: Place) -> tuple[Site, ...]:
    assert place.target is not None
    return place.target.sites


def _registered(site: Site) -> torch.Tensor:
    found = site.module._parameters.get(site.key) if site.is_parameter else site.module._buffers.get(site.key)
    assert found is not None
    return found
