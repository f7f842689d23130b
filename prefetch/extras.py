"""Extra state: what modules keep in a file of `torch.save` besides tensors, under names that end with `_extra_state`.

Plain data, and tensors inside it, which are read with the file's pickle. What takes more than the limits, or is made of
anything else, is not taken; whoever asks for it is told so, and nobody else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import cast

import msgspec

from weightstream.errors import UnsupportedFormatError
from weightstream.prefetch.pickled import PickledBytes, PickledSet, PickledTensor

__all__ = ["ExtraState", "ExtraTensor", "is_extra_state", "take_extra_states"]

#: Limits of our own for all of a file: bytes of tensors, text and the like; values; and levels of what is in each other.
#: A pickle of a few bytes can say more than any memory holds, because it may mention one list again and again.
MAX_BYTES = 2**24
MAX_VALUES = 100_000
MAX_LEVELS = 32


class ExtraTensor(msgspec.Struct, frozen=True):
    """A tensor inside of it: its bytes, and how its elements lie in them (see `TensorSpec`)."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    raw: bytes


class ExtraState(msgspec.Struct, frozen=True):
    """What one module keeps.

    `value`: None, bool, int, float, complex, str, bytes, bytearray, `ExtraTensor`, or tuples, lists, sets and dicts of these. `problem`: why there is
    none; None: there is.
    """

    name: str
    shard: int
    value: object
    problem: str | None = None


def is_extra_state(name: object) -> bool:
    """Tell whether torch gives this name in a state dict to extra state."""
    return isinstance(name, str) and (name == "_extra_state" or name.endswith("._extra_state"))


def take_extra_states(
    found: dict[str, object], shard: int, read: Callable[[str, PickledTensor, int], ExtraTensor | None]
) -> dict[str, ExtraState]:
    """Take the extra states of one file.

    Args:
        found: what the pickle says, by name.
        shard: the number of the file.
        read: reads a tensor, of so many bytes at most; None: it has more.

    Raises:
        Exception: what `read` raises, except for UnsupportedFormatError.
    """
    taker = _Taker(read)
    states: dict[str, ExtraState] = {}
    for name, value in found.items():
        try:
            states[name] = ExtraState(name, shard, taker.take(name, value, 0))
        except _UnusableError as exc:
            states[name] = ExtraState(name, shard, None, str(exc))
        except UnsupportedFormatError as exc:
            states[name] = ExtraState(name, shard, None, f"it holds {exc.what}: {exc.actual}")
    return states


class _UnusableError(Exception):
    """Why something cannot be taken."""


class _Taker:
    def __init__(self, read: Callable[[str, PickledTensor, int], ExtraTensor | None]) -> None:
        self._read = read
        self._left_bytes = MAX_BYTES
        self._left_values = MAX_VALUES

    def take(self, name: str, value: object, level: int) -> object:
        """Copy a value, and count what it takes."""
        self._left_values -= 1
        if self._left_values < 0 or level > MAX_LEVELS:
            raise _UnusableError(f"it holds more than {MAX_VALUES} values, or more than {MAX_LEVELS} levels of them")
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            self._count(len(value) if isinstance(value, str) else 0)
            return value
        if isinstance(value, PickledBytes):
            self._count(len(value.text))
            try:
                raw = value.text.encode("latin1")
            except UnicodeEncodeError:
                raise _UnusableError("it holds bytes that are none") from None
            return bytearray(raw) if value.is_array else raw
        if isinstance(value, PickledTensor):
            tensor = self._read(name, value, self._left_bytes)
            self._count(MAX_BYTES + 1 if tensor is None else len(tensor.raw))
            return tensor
        if isinstance(value, PickledSet):
            return {self.take(name, item, level + 1) for item in value.items[: value.count]}
        if isinstance(value, (tuple, list)):
            items = [self.take(name, item, level + 1) for item in cast("list[object]", value)]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            pairs = cast("dict[object, object]", value).items()
            kept = {self.take(name, key, level): self.take(name, item, level + 1) for key, item in pairs}
            return OrderedDict(kept) if isinstance(value, OrderedDict) else kept
        raise _UnusableError("it holds something else than plain data and tensors")

    def _count(self, num_bytes: int) -> None:
        self._left_bytes -= num_bytes
        if self._left_bytes < 0:
            raise _UnusableError(f"it holds more than {MAX_BYTES} bytes")
