"""What a load wants of a checkpoint, by the names of the model; and where that is, for those who complain about it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import cast

import torch

from weightstream.device.config import DeviceConfig
from weightstream.device.dtypes import torch_dtype, torch_shape, unsupported
from weightstream.device.names import NameRules
from weightstream.errors import UnsupportedFormatError, WeightstreamError
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.extras import ExtraState, ExtraTensor
from weightstream.prefetch.header import TensorSpec
from weightstream.prefetch.versions import Versions

__all__ = ["Wanted"]


class Wanted:
    """The tensors of a checkpoint that a load wants.

    Attributes:
        tensors: by their names in the model, in the order of shards and bytes.
        extras: likewise, what modules keep besides tensors.
        versions: what is said of modules, by their names in the model.

    Raises:
        PlacementError: two get one name.
    """

    def __init__(self, checkpoint: Checkpoint, config: DeviceConfig) -> None:
        self._checkpoint = checkpoint
        self.tensors: Mapping[str, TensorSpec] = {}
        self.extras: Mapping[str, ExtraState] = {}
        self.versions = checkpoint.versions
        with self.locating():
            rules = NameRules(config)
            self.tensors, self.extras = rules.apply(checkpoint.tensors), rules.apply(checkpoint.extras)
        if rules.renames and checkpoint.versions:
            self.versions = _renamed(checkpoint.versions, {**self.extras, **self.tensors})

    def extra_state(self, name: str) -> object:
        """Make the extra state of a module, as `torch.load` would, with tensors on the CPU.

        Raises:
            UnsupportedFormatError: it is not made of plain data and tensors, or there is too much of it.
        """
        state = self.extras[name]
        if state.problem is not None:
            raise UnsupportedFormatError(
                f"the extra state of a module cannot be taken from the file: {state.problem}",
                tensor=name,
                hint="Have get_extra_state return a tensor, or plain data; device.exclude loads the model without it",
            )
        return _with_tensors(name, state.value)

    @contextmanager
    def locating(self) -> Generator[None, None, None]:
        """Let errors that name a tensor say in which file it is, and as what."""
        try:
            yield
        except WeightstreamError as error:
            spec = self.tensors.get(error.tensor or "") or self.extras.get(error.tensor or "")
            error.file = str(self._checkpoint.path if spec is None else self._checkpoint.shards[spec.shard].path)
            if spec is not None and spec.name != error.tensor:
                error.stored_as = spec.name
            raise


def _renamed(versions: Versions, stored: Mapping[str, TensorSpec | ExtraState]) -> Versions:
    """Call modules as their tensors are called now, for whose names the rules are, and those around them while they end alike."""
    found: dict[str, Mapping[str, object]] = {}
    for name, spec in stored.items():
        old, new = spec.name.rpartition(".")[0], name.rpartition(".")[0]
        while new not in found:
            found[new] = versions.get(old, {})
            (old, _, old_end), (new, _, new_end) = old.rpartition("."), new.rpartition(".")
            if old_end != new_end:
                break
    return found


def _with_tensors(name: str, value: object) -> object:
    """Make tensors of what stands for them. The levels are few, as `take_extra_states` has seen to."""
    if isinstance(value, ExtraTensor):
        dtype = torch_dtype(value.dtype)
        if dtype is None:
            raise unsupported(value.dtype, name)
        shape = torch_shape(value.dtype, value.shape, tensor=name)
        if not value.raw:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(bytearray(value.raw), dtype=dtype)
        return flat.view(shape) if value.stride is None else flat.as_strided(shape, value.stride)
    if isinstance(value, (tuple, list)):
        items = [_with_tensors(name, item) for item in cast("list[object]", value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        kept = {key: _with_tensors(name, item) for key, item in cast("dict[object, object]", value).items()}
        return OrderedDict(kept) if isinstance(value, OrderedDict) else kept
    return value
