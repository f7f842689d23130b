"""The model's tensors: which there are, under which names, where they are registered, and which modules load themselves.

Reads the model; changes nothing.
"""

# pyright: reportPrivateUsage=false
# Hooks and non-persistence have no public names in `nn.Module`.
from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import torch
from torch import nn

from weightstream.device.selfloading import keeps_shapes, overrides_loading

if TYPE_CHECKING:
    from weightstream.device.placement import Place

__all__ = ["Site", "Subtree", "Target", "Targets", "find_targets"]

# There is one of each of the following per tensor: hidden from the garbage collector, so that it does not scan tens of
# thousands of them. They refer to modules, so whoever holds them must let them go when the load ends.


class Site(msgspec.Struct, frozen=True, gc=False):
    """One place where a tensor is registered: `module._parameters[key]` or `module._buffers[key]`."""

    name: str
    module: nn.Module
    key: str
    is_parameter: bool


class Target(msgspec.Struct, gc=False):
    """One tensor of the model. `name`, `module`, `key` and `is_parameter` are its first site; `ties` are the others.

    `declared` is its dtype, `position` its rank in order of registration; `filled_by` is the index of the place that
    fills it (-1: none so far; the place refers to the target already, and objects that the collector does not see must
    not form a cycle).
    """

    tensor: torch.Tensor
    declared: torch.dtype
    on_meta: bool
    name: str
    module: nn.Module
    key: str
    is_parameter: bool
    position: int
    subtree: Subtree | None = None
    ties: tuple[Site, ...] = ()
    filled_by: int = -1

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(self.name, self.module, self.key, self.is_parameter), *self.ties)

    @property
    def names(self) -> list[str]:
        return [self.name, *(tie.name for tie in self.ties)]


class Subtree:
    """A module that loads itself: through hooks, an overridden `_load_from_state_dict`, or extra state.

    Attributes:
        targets: its tensors, except for those that were found elsewhere first.
        tied: those, which others load.
        places: what it is given.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.prefix = f"{name}." if name else ""
        self.module = module
        self.keeps_shapes = keeps_shapes(module)
        self.targets: list[Target] = []
        self.tied: list[Target] = []
        self.places: list[Place] = []

    def own_name(self, name: str, target: Target | None) -> str:
        """Return the name by which the module knows a tensor, which may be tied to one elsewhere."""
        if target is None or name.startswith(self.prefix):
            return name
        return next((own for own in target.names if own.startswith(self.prefix)), name)


class Targets:
    """What a walk over a model found.

    Attributes:
        by_name: every persistent tensor by each of its names, in order of registration.
        subtrees: modules that load themselves, in order of registration.
        prefixes: of every module, what the names of its tensors begin with ("" or "layers.0.").
        own_buffers: the buffers that are not persistent: the model computes them itself.
        own_on_meta: those of them that are on meta, where no load gets them from.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Target] = {}
        self.subtrees: list[Subtree] = []
        self.prefixes: list[str] = []
        self.own_buffers: set[str] = set()
        self.own_on_meta: list[str] = []


def find_targets(model: nn.Module) -> Targets:  # noqa: C901, PLR0912 (one loop, see below)
    """Walk over a model. Plain look-ups and no calls: 69,000 modules take 0.1 s like this and 0.2 s otherwise."""
    found = Targets()
    by_name, by_id = found.by_name, dict[int, Target]()
    note_prefix = found.prefixes.append
    loads_itself: dict[type[nn.Module], bool] = {}
    inside: set[int] = set()  # modules that subtrees load, which may be registered twice
    stack: list[tuple[str, nn.Module, Subtree | None]] = [("", model, None)]
    pop, push = stack.pop, stack.append
    while stack:
        prefix, module, subtree = pop()
        note_prefix(prefix)
        state = module.__dict__
        if subtree is None:
            kind = module.__class__
            overrides = loads_itself.get(kind)
            if overrides is None:
                overrides = loads_itself[kind] = overrides_loading(kind)
            if (
                overrides
                or state["_load_state_dict_pre_hooks"]
                or state["_load_state_dict_post_hooks"]
                or "_load_from_state_dict" in state
            ) and id(module) not in inside:
                subtree = Subtree(prefix[:-1], module)
                found.subtrees.append(subtree)
        if subtree is not None:
            inside.add(id(module))
        parameters, buffers = state["_parameters"], state["_buffers"]
        for tensors in (parameters, buffers) if buffers else (parameters,):
            is_parameter = tensors is parameters
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                name = prefix + key
                if not is_parameter and key in state["_non_persistent_buffers_set"]:
                    found.own_buffers.add(name)
                    if tensor.is_meta:
                        found.own_on_meta.append(name)
                    continue
                target = by_id.get(id(tensor))
                if target is None:
                    target = by_id[id(tensor)] = Target(
                        tensor, tensor.dtype, tensor.is_meta, name, module, key, is_parameter, len(by_id), subtree
                    )
                    if subtree is not None:
                        subtree.targets.append(target)
                else:
                    target.ties = (*target.ties, Site(name, module, key, is_parameter))
                    if subtree is not None and target.subtree is not subtree:
                        subtree.tied.append(target)
                by_name[name] = target
        modules = state["_modules"]
        if modules:
            for key in reversed(modules):
                child = modules[key]
                if child is not None:
                    push((f"{prefix}{key}.", child, subtree))
    return found
