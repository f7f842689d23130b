# pyright: reportPrivateUsage=false
# Hooks, overrides, and where tensors are registered have no public names in `nn.Module`.
"""Modules that load themselves: which do, through hooks, an overridden `_load_from_state_dict`, or extra state, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn

if TYPE_CHECKING:  # it asks this module which they are
    from weightstream.device.targets import Site, Target

__all__ = ["Keys", "keeps_shapes", "load_module", "overrides_loading", "restore"]


def overrides_loading(kind: type[nn.Module]) -> bool:
    """Tell whether modules of a class load themselves, whatever hooks a single one of them may have besides."""
    return _loading_home(kind) != nn.Module.__module__ or kind.set_extra_state is not nn.Module.set_extra_state


def keeps_shapes(module: nn.Module) -> bool:
    """Tell whether a module takes every tensor in the model's own shape, so that shapes can be checked beforehand.

    torch's own modules do (BatchNorm overrides the method for old versions of itself); hooks may reshape anything.
    """
    state = vars(module)
    is_hooked = state["_load_state_dict_pre_hooks"] or "_load_from_state_dict" in state
    return not is_hooked and _loading_home(type(module)).startswith("torch.nn.")


class Keys(NamedTuple):
    """What hooks after a module's loading may look at and change; torch's names."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_module(
    module: nn.Module,
    state: dict[str, object],
    prefix: str,
    keys: Keys,
    errors: list[str],
    *,
    versions: Mapping[str, Mapping[str, object]],
    assign: bool,
) -> None:
    """Do what `nn.Module.load_state_dict` does for one module and those below, with names as in the whole model.

    `versions` is what the checkpoint says of modules, by their names, as the `_metadata` of a state dict.
    """
    metadata = dict(versions.get(prefix[:-1], {}))
    if assign:
        metadata["assign_to_params_buffers"] = True
    load = cast("Callable[..., None]", module._load_from_state_dict)  # pyright: ignore[reportUnknownMemberType]
    load(state, prefix, metadata, True, keys.missing_keys, keys.unexpected_keys, errors)
    for name, child in module._modules.items():
        if child is not None:
            below = {key: value for key, value in state.items() if key.startswith(f"{prefix}{name}.")}
            load_module(child, below, f"{prefix}{name}.", keys, errors, versions=versions, assign=assign)
    hooks = cast("dict[int, Callable[[nn.Module, Keys], object]]", vars(module)["_load_state_dict_post_hooks"])
    for hook in hooks.values():
        if hook(module, keys) is not None:
            raise RuntimeError(
                "a hook after loading returned a value, where it may only change the keys that it is given"
            )


def restore(target: Target) -> torch.Tensor | None:
    """Register a parameter again that `load_state_dict` replaced by a new one; return the new one's contents.

    One that is registered in several places may have been replaced in some of them: the last one counts.
    """
    replaced = [found for site in target.sites if (found := _registered(site)) is not target.tensor]
    if not replaced:
        return None
    for one in target.sites:  # as the module itself would: nn.LSTM, for one, keeps a list of its own
        setattr(one.module, one.key, target.tensor)
    return replaced[-1].data


def _loading_home(kind: type[nn.Module]) -> str:
    """Return the name of the Python module that a class has its `_load_from_state_dict` from."""
    owner = next(base for base in kind.__mro__ if "_load_from_state_dict" in vars(base))
    return owner.__module__


def _registered(site: Site) -> torch.Tensor:
    module, key = site.module, site.key
    found = module._parameters[key] if key in module._parameters else module._buffers.get(key)
    assert found is not None
    return found
