# pyright: reportPrivateUsage=false
# Hooks, overrides, and where tensors are registered have no public names in `nn.Module`.
"""Modules that load themselves: which do, through hooks, an overridden `_load_from_state_dict`, or extra state, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn

from weightstream.device.dtypes import CASTABLE
from weightstream.device.exchange import Original
from weightstream.errors import PlacementError

if TYPE_CHECKING:  # it asks this module which they are
    from weightstream.device.targets import Site, Subtree, Target

__all__ = ["Keys", "OwnCode", "described", "load_subtree", "made_dtype", "own_code", "own_hooks"]


class OwnCode(NamedTuple):
    """Which code of its own runs when a module loads.

    Attributes:
        overrides: it loads itself, whatever hooks a single one may have besides.
        reshapes: it may take tensors of any shape, so that shapes cannot be checked beforehand.
        is_foreign: there is some that is not torch's, and may change whatever it likes.
    """

    overrides: bool
    reshapes: bool
    is_foreign: bool


def own_code(kind: type[nn.Module]) -> OwnCode:
    """Return what a class brings. torch's own modules take tensors as they are (BatchNorm looks at old versions of itself)."""
    home, has_state = _loading_home(kind), kind.set_extra_state is not nn.Module.set_extra_state
    reshapes = not home.startswith("torch.nn.")
    return OwnCode(home != nn.Module.__module__ or has_state, reshapes, reshapes or has_state)


def own_hooks(module: nn.Module) -> OwnCode:
    """Return what a single module brings. Hooks before loading may reshape anything; those after it may do all else."""
    state = vars(module)
    reshapes = bool(state["_load_state_dict_pre_hooks"]) or "_load_from_state_dict" in state
    has_hooks = reshapes or bool(state["_load_state_dict_post_hooks"])
    return OwnCode(has_hooks, reshapes, has_hooks)


class Keys(NamedTuple):
    """What hooks after a module's loading may look at and change; torch's names."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Loading(NamedTuple):
    """What the modules of a subtree have in common while they load themselves.

    Attributes:
        keys, errors: what they say.
        versions: what the checkpoint says of modules, by their names, as the `_metadata` of a state dict.
        assign: as in `load_state_dict`.
        tied: tensors that have several names, by the identities of modules where they are registered.
    """

    keys: Keys
    errors: list[str]
    versions: Mapping[str, Mapping[str, object]]
    assign: bool
    tied: dict[int, list[tuple[Site, Target]]]


def _load_module(module: nn.Module, state: dict[str, object], prefix: str, loading: _Loading) -> None:
    """Do what `nn.Module.load_state_dict` does for one module and those below, with names as in the whole model."""
    keys = loading.keys
    metadata = dict(loading.versions.get(prefix[:-1], {}))
    if loading.assign:
        metadata["assign_to_params_buffers"] = True
    load = cast("Callable[..., None]", module._load_from_state_dict)  # pyright: ignore[reportUnknownMemberType]
    load(state, prefix, metadata, True, keys.missing_keys, keys.unexpected_keys, loading.errors)
    for site, target in loading.tied.get(id(module), ()):
        _tie_again(site, target)
    below: dict[str, dict[str, object]] = {}  # in one pass, because children may be many
    for key, value in state.items():
        if key.startswith(prefix):
            below.setdefault(key[len(prefix) :].partition(".")[0], {})[key] = value
    for name, child in module._modules.items():
        if child is not None:
            _load_module(child, below.get(name, {}), f"{prefix}{name}.", loading)
    hooks = cast("dict[int, Callable[[nn.Module, Keys], object]]", vars(module)["_load_state_dict_post_hooks"])
    for hook in hooks.values():
        if hook(module, keys) is not None:
            raise RuntimeError(
                "a hook after loading returned a value, where it may only change the keys that it is given"
            )


def _tied_sites(subtree: Subtree) -> dict[int, list[tuple[Site, Target]]]:
    found: dict[int, list[tuple[Site, Target]]] = {}
    for target in subtree.all_targets:
        if len(target.sites) > 1:
            for site in target.sites:
                found.setdefault(id(site.module), []).append((site, target))
    return found


def _tie_again(site: Site, target: Target) -> None:
    """Register what has replaced a tied tensor in one place in the others, so that hooks see it there too."""
    new = _registered(site)
    if new is None or new is target.tensor:
        return
    for other in target.sites:
        there = _registered(other)
        if there is not None and there is not new:
            setattr(other.module, other.key, new)


def load_subtree(
    subtree: Subtree, state: Mapping[str, torch.Tensor], versions: Mapping[str, Mapping[str, object]]
) -> tuple[Keys, list[tuple[Target, torch.Tensor]]]:
    """Let a module load its part of a checkpoint itself, as `load_state_dict` of the whole model would.

    The parameters stay registered that were. Those on meta, which it has replaced by new ones, are returned with the
    contents of these; what others load after it is as it was.

    Raises:
        PlacementError: its hooks failed, or it gave a parameter that has storage another shape.
    """
    overruled = subtree.overruled
    saved = [Original.of(target.names, target.tensor) for target in overruled if not target.tensor.is_meta]
    assign = any(target.tensor.is_meta for target in subtree.all_targets)
    loading = _Loading(Keys([], []), [], versions, assign, _tied_sites(subtree))
    try:
        _load_module(subtree.module, {**state, **subtree.extras}, subtree.prefix, loading)
        if loading.errors:
            raise RuntimeError("; ".join(loading.errors))  # noqa: TRY301 (mapped like those that hooks raise)
    except BaseException as exc:
        for target in subtree.all_targets:
            _restore(target)
        if not isinstance(exc, Exception):
            raise
        raise PlacementError(
            f"{described(subtree)}, which loads itself, failed: {exc}", tensor=subtree.name or None
        ) from exc
    # All of them first: what is done with their contents may fail, and no parameter of the module's making may stay.
    restored = [(target, _restore(target)) for target in subtree.all_targets]
    for original in saved:
        original.put_back()
    not_counting = set(map(id, overruled))
    made = [
        (target, contents) for target, contents in restored if contents is not None and id(target) not in not_counting
    ]
    for target, contents in made:
        if not target.tensor.is_meta and target.tensor.shape != contents.shape:
            raise PlacementError(
                f"{described(subtree)}, which loads itself, gave this parameter another shape, and it has storage",
                tensor=target.name,
                expected=str(tuple(target.tensor.shape)),
                actual=str(tuple(contents.shape)),
                hint="Load into a model on meta",
            )
    return loading.keys, made


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
