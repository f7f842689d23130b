"""What pickles of torch are read as, beside strings, numbers, tuples, lists and dicts: descriptions, and nothing that acts."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

__all__ = ["OPAQUE", "UNTYPED", "PickledBytes", "PickledDict", "PickledSet", "PickledTensor", "Storage"]

#: Stands for the dtype of a storage of bytes, of which every tensor says its own.
UNTYPED = "untyped"


class Storage(msgspec.Struct, frozen=True):
    """Bytes of a file that tensors lie in. `num_elements` counts elements of `dtype`; bytes where that is "untyped"."""

    key: str
    dtype: str
    num_elements: int

    @property
    def is_untyped(self) -> bool:
        return self.dtype == UNTYPED


class PickledTensor(msgspec.Struct, frozen=True):
    """A tensor as a pickle describes it, unchecked. Offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class PickledBytes(msgspec.Struct, frozen=True):
    """Bytes, as the characters of the same numbers; `is_array`: a bytearray of them."""

    text: str
    is_array: bool = False


class PickledDict(OrderedDict[object, object]):
    """An OrderedDict. `metadata` is what the pickle gives it as its attribute `_metadata`, unchecked; None: nothing."""

    metadata: object = None


class PickledSet(msgspec.Struct, frozen=True):
    """A set of the first `count` items of a list, which can only grow: strings, numbers, None, and bytes."""

    items: list[object]
    count: int


class _Opaque:
    """Something that no tensor depends on."""

    __slots__ = ()


OPAQUE = _Opaque()
