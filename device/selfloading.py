# pyright: reportPrivateUsage=false
# Hooks and overrides have no public names in `nn.Module`.
"""Which modules load themselves: through hooks, an overridden `_load_from_state_dict`, or extra state."""

from __future__ import annotations

from torch import nn

__all__ = ["keeps_shapes", "overrides_loading"]


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


def _loading_home(kind: type[nn.Module]) -> str:
    """Return the name of the Python module that a class has its `_load_from_state_dict` from."""
    owner = next(base for base in kind.__mro__ if "_load_from_state_dict" in vars(base))
    return owner.__module__
