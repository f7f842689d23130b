# pyright: reportPrivateUsage=false
# Hooks and overrides have no public names in `nn.Module`.
"""Which modules load themselves: through hooks, an overridden `_load_from_state_dict`, or extra state."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

__all__ = ["SelfLoading", "keeps_shapes"]


class SelfLoading:
    """Tells which modules load themselves; remembers what depends on their class alone."""

    def __init__(self) -> None:
        self._by_kind: dict[type[nn.Module], bool] = {}

    def __call__(self, kind: type[nn.Module], state: Mapping[str, object]) -> bool:
        overrides = self._by_kind.get(kind)
        if overrides is None:
            overrides = self._by_kind[kind] = (
                _loading_home(kind) != nn.Module.__module__ or kind.set_extra_state is not nn.Module.set_extra_state
            )
        return overrides or bool(
            state["_load_state_dict_pre_hooks"]
            or state["_load_state_dict_post_hooks"]
            or "_load_from_state_dict" in state
        )


def keeps_shapes(module: nn.Module) -> bool:
    """Tell whether a module takes every tensor in the model's own shape, so that shapes can be checked beforehand.

    torch's own modules do (BatchNorm overrides the method for old versions of itself); hooks may reshape anything.
    """
    state = vars(module)
    is_hooked = state["_load_state_dict_pre_hooks"] or "_load_from_state_dict" in state
    return not is_hooked and _loading_home(type(module)).startswith("torch.nn.")


def _loading_home(kind: type[nn.Module]) -> str:
    """Return the name of the Python module that a class has its `_load_from_state_dict` from."""
    owner = next(base for base in kind.__mro__ if "_load_from_state_dict" in vars(base))
    return owner.__module__
