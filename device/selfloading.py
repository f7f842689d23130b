# pyright: reportPrivateUsage=false
# Hooks, overrides, and where tensors are registered have no public names in `nn.Module`.
"""Modules that load themselves: which do, through hooks, an overridden `_load_from_state_dict`, or extra state, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn

from weightstream.device.dtypes import CASTABLE
from weightstream.errors import PlacementError

if TYPE_CHECKING:  # it asks this module which they are
    from weightstream.device.targets import Site, Subtree, Target

__all__ = ["Keys", "described", "keeps_shapes", "load_subtree", "made_dtype", "overrides_loading"]


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


def _load_module(
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
            _load_module(child, below, f"{prefix}{name}.", keys, errors, versions=versions, assign=assign)
    hooks = cast("dict[int, Callable[[nn.Module, Keys], object]]", vars(module)["_load_state_dict_post_hooks"])
    for hook in hooks.values():
        if hook(module, keys) is not None:
            raise RuntimeError(
                "a hook after loading returned a value, where it may only change the keys that it is given"
            )


def load_subtree(
    subtree: Subtree, state: Mapping[str, torch.Tensor], versions: Mapping[str, Mapping[str, object]]
) -> tuple[Keys, list[tuple[Target, torch.Tensor]]]:
    """Let a module load its part of a checkpoint itself, as `load_state_dict` of the whole model would.

    The parameters stay registered that were. Those on meta, which it has replaced by new ones, are returned with the
    contents of these.

    Raises:
        PlacementError: its hooks failed, or it gave a parameter that has storage another shape.
    """
    assign = any(target.tensor.is_meta for target in subtree.targets)
    keys = Keys([], [])
    errors: list[str] = []
    try:
        given = {**state, **subtree.extras}
        _load_module(*(subtree.module, given, subtree.prefix, keys, errors), versions=versions, assign=assign)
        if errors:
            raise RuntimeError("; ".join(errors))  # noqa: TRY301 (mapped like those that hooks raise)
    except Exception as exc:
        for target in (*subtree.targets, *subtree.tied):
            _restore(target)
        raise PlacementError(
            f"{described(subtree)}, which loads itself, failed: {exc}", tensor=subtree.name or None
        ) from exc
    # All of them first: what is done with their contents may fail, and no parameter of the module's making may stay.
    restored = [(target, _restore(target)) for target in subtree.targets]
    for target in subtree.tied:  # others load it
        _restore(target)
    made = [(target, contents) for target, contents in restored if contents is not None]
    for target, contents in made:
        if not target.tensor.is_meta and target.tensor.shape != contents.shape:
            raise PlacementError(
                f"{described(subtree)}, which loads itself, gave this parameter another shape, and it has storage",
                tensor=target.name,
                expected=str(tuple(target.tensor.shape)),
                actual=str(tuple(contents.shape)),
                hint="Load into a model on meta",
            )
    return keys, made


def described(subtree: Subtree) -> str:
    """Return what to call it in sentences."""
    return f"{subtree.name or 'the model'} ({type(subtree.module).__qualname__})"


def made_dtype(tensor: torch.Tensor, contents: torch.Tensor, asked: str) -> torch.dtype:
    """Return which dtype a parameter on meta gets that a module has made itself, of tensors with names of their own.

    `device.dtype`, which is `asked`, says so as for any other; but what is no floating-point number stays what the module
    has made it.
    """
    if asked == "checkpoint" or not {tensor.dtype, contents.dtype} <= CASTABLE:
        return contents.dtype
    return tensor.dtype if asked == "model" else getattr(torch, asked)


def _restore(target: Target) -> torch.Tensor | None:
    """Register a parameter again that `load_state_dict` replaced by a new one; return the new one's contents.

    One that is registered in several places may have been replaced in some of them: the last one counts. Where hooks have
    taken it away, it stays away.
    """
    sites = [(site, found) for site in target.sites if (found := _registered(site)) is not None]
    replaced = [found for _, found in sites if found is not target.tensor]
    if not replaced:
        return None
    for site, _ in sites:  # as the module itself would: nn.LSTM, for one, keeps a list of its own
        setattr(site.module, site.key, target.tensor)
    return replaced[-1].data


def _loading_home(kind: type[nn.Module]) -> str:
    """Return the name of the Python module that a class has its `_load_from_state_dict` from."""
    owner = next(base for base in kind.__mro__ if "_load_from_state_dict" in vars(base))
    return owner.__module__


def _registered(site: Site) -> torch.Tensor | None:
    module, key = site.module, site.key
    return module._parameters[key] if key in module._parameters else module._buffers.get(key)
