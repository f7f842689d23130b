"""What pickles of torch may say: of all the names that a pickle can mention, those few that stand for tensors.

What comes out are strings, numbers, tuples, lists, dicts, and descriptions of tensors; no object of a class that the file
chooses, and nothing of a pickle is called: there is no code to be run. How the instructions are read is in `unpickling`.

What torch makes of these names: torch/_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, cast

from weightstream.errors import HeaderError, UnsupportedFormatError
from weightstream.prefetch.header import MAX_RANK
from weightstream.prefetch.pickled import OPAQUE, UNTYPED, PickledBytes, PickledDict, PickledSet, PickledTensor, Storage
from weightstream.prefetch.torchnames import DEVICES, DTYPES, OWN_ATTRIBUTES, STORAGES
from weightstream.prefetch.unpickling import MalformedError, NewerProtocolError, unpickle

__all__ = [
    "MAX_OPCODES",
    "MAX_PICKLE_BYTES",
    "newer_protocol",
    "read_pickle",
]

#: Limits of our own. A tensor takes 30 to 34 instructions and some 100 bytes, so that a file has room for 60,000; and so
#: many instructions, each of which makes one object at most, are read within a second.
MAX_PICKLE_BYTES = 2**26
MAX_OPCODES = 2**21

#: So many tensors with attributes are made inside each other: each takes stack. torch makes one.
_MOST_INSIDE = 2


def read_pickle(
    raw: bytes, start: int = 0, *, file: str, is_old: bool = False, most_opcodes: int = MAX_OPCODES
) -> tuple[object, int, dict[str, Storage]]:
    """Read one pickle; `is_old`: of the older layout, which describes storages with one field more.

    Returns:
        What it stands for: None, bool, int, float, complex, str, tuple, list, dict with keys that are strings or numbers,
        `PickledTensor`, `PickledBytes`, `PickledSet`, or `OPAQUE`; where it ends in `raw`; and the storages that it
        mentions, by their keys.

    Raises:
        EndOfDataError: `raw` ends before the pickle does.
        HeaderError: not a pickle as torch writes them, or one above the limits.
        UnsupportedFormatError: a pickle of something else than tensors, numbers, strings and what holds them.
    """
    tensors = _Tensors(file, is_old=is_old)
    try:
        value, end = unpickle(raw, start, tensors, most_opcodes=most_opcodes)
    except MalformedError as exc:
        raise HeaderError("the pickle is not valid", file=file, actual=str(exc)) from exc
    except NewerProtocolError as exc:
        raise newer_protocol(file, cast("int", exc.args[0])) from exc
    return value, end, tensors.storages


def newer_protocol(file: str, number: int) -> UnsupportedFormatError:
    """Return the error about a pickle whose protocol is too new."""
    return UnsupportedFormatError(
        "the pickle's protocol is too new, also for torch.load(weights_only=True)",
        file=file,
        expected="protocol 2 or 3",
        actual=f"protocol {number}",
        hint="Save it again without pickle_protocol",
    )


class _Tensors:
    """The meaning of a pickle of tensors.

    Args:
        file: its file, for messages.
        is_old: whether that has the older layout, in which a storage may be part of another. None that can be read is.

    Attributes:
        storages: those that it mentions, by their keys.
    """

    def __init__(self, file: str, *, is_old: bool) -> None:
        self.storages: dict[str, Storage] = {}
        self._file = file
        self._behind = (None,) if is_old else ()
        self._checked: dict[int, tuple[int, ...]] = {}
        self._num_inside = 0
        self._num_attributes = 0
        self._encoded: dict[int, str] = {}
        self._hashable: dict[int, tuple[list[object], int]] = {}

    def name(self, text: str) -> object:
        found = _NAMES.get(text)
        if found is None:
            raise UnsupportedFormatError(
                f"the pickle needs {text}, which is neither a plain tensor nor part of one",
                file=self._file,
                hint="Save the model's state_dict alone; safetensors holds nothing but tensors",
            )
        return found

    def reference(self, description: object) -> Storage:
        """Take the description of a storage: ("storage", class, key, device, elements), in old files with None behind."""
        parts = cast("tuple[object, ...]", description if isinstance(description, tuple) else ())
        if len(parts) != 5 + len(self._behind) or parts[0] != "storage" or parts[5:] != self._behind:
            raise MalformedError("a reference to something else than a storage")
        kind, key, num_elements = parts[1], parts[2], parts[4]
        if not isinstance(kind, _StorageClass) or not isinstance(key, str):
            raise MalformedError("a storage without a class or a key")
        storage = Storage(key, kind.dtype, _whole(num_elements))
        if self.storages.setdefault(key, storage) != storage:
            raise MalformedError("two descriptions of one storage")
        return storage

    def attributes(self, target: object, state: object) -> None:
        """Take note of the versions of modules, which torch gives the state dict along; leave out what else there is."""
        if not isinstance(target, PickledDict) or type(state) is not dict:
            raise MalformedError("attributes for what has none")
        given = cast("dict[object, object]", state)
        if "_metadata" in given:
            target.metadata = given["_metadata"]

    def call(self, function: object, arguments: object) -> object:
        if not isinstance(function, _Function) or not isinstance(arguments, tuple):
            raise MalformedError("a call of what is no function")
        return function.stands_for(self, cast("tuple[object, ...]", arguments))

    def tensor(self, given: tuple[object, ...]) -> PickledTensor:
        return self._tensor(given, least=4)

    def tensor_v2(self, given: tuple[object, ...]) -> PickledTensor:
        return self._tensor(given, least=6)

    def tensor_v3(self, given: tuple[object, ...]) -> PickledTensor:
        return self._tensor(given, least=7)

    def _tensor(self, given: tuple[object, ...], *, least: int) -> PickledTensor:
        """Check the arguments: storage, offset, sizes, strides, then whether there is a gradient, hooks, and a dtype."""
        if not least <= len(given) <= least + 1:
            raise MalformedError("a tensor without a storage")
        storage = given[0]
        if not isinstance(storage, Storage):
            raise MalformedError("a tensor without a storage")
        dtype = storage.dtype
        if least == 7:
            named = given[6]
            if not isinstance(named, _DType):
                raise MalformedError("a tensor without a dtype")
            dtype = named.dtype
        if len(given) > least and given[least]:
            raise UnsupportedFormatError(
                "the pickle has a tensor whose elements are conjugated or negated when they are used",
                file=self._file,
                hint="Save what `resolve_conj` and `resolve_neg` return",
            )
        if least > 4:
            _check_gradient(dtype, given[4], given[5])
        return PickledTensor(storage, dtype, _whole(given[1]), self._sizes(given[2]), self._sizes(given[3]))

    def parameter(self, given: tuple[object, ...]) -> PickledTensor:
        return self._parameter(given, count=3)

    def parameter_with_state(self, given: tuple[object, ...]) -> PickledTensor:
        return self._parameter(given, count=4)

    def _parameter(self, given: tuple[object, ...], *, count: int) -> PickledTensor:
        if len(given) != count or not isinstance(given[0], PickledTensor):
            raise MalformedError("a parameter without a tensor")
        _check_gradient(given[0].dtype, given[1], given[2])
        if count == 4:
            self._check_state(given[3])
        return given[0]

    def from_type(self, given: tuple[object, ...]) -> object:
        """Take the tensor itself: how it is made stands beside its class, and attributes that are of no interest."""
        inner, kind, rest, state = given if len(given) == 4 else (None, None, None, None)
        self._check_state(state)
        if kind is not _PLAIN_CLASS:
            raise MalformedError("a tensor of a class that is unknown")
        if self._num_inside == _MOST_INSIDE:
            raise MalformedError("tensors with attributes inside each other")
        self._num_inside += 1
        tensor = self.call(inner, rest)
        self._num_inside -= 1
        return tensor

    def ordered_dict(self, given: tuple[object, ...]) -> object:
        """Make an empty one, which is how torch begins them."""
        if given:
            raise MalformedError("an OrderedDict that is not empty from the beginning")
        return PickledDict()

    def size(self, given: tuple[object, ...]) -> object:
        if len(given) != 1:
            raise MalformedError("a torch.Size without sizes")
        return self._sizes(given[0])

    def device(self, given: tuple[object, ...]) -> object:
        kind, index = (*given, 0) if len(given) == 1 else given if len(given) == 2 else (None, 0)
        if not isinstance(kind, str) or kind not in DEVICES or not 0 <= _whole(index) < 128:
            raise MalformedError("a device that torch may not know")
        return OPAQUE

    def encode(self, given: tuple[object, ...]) -> object:
        """Take bytes, which protocol 2 writes as a call; they are made where somebody asks for them."""
        text, encoding = given if len(given) == 2 else (None, None)
        if not isinstance(text, str) or encoding != "latin1":
            raise MalformedError("bytes that are none")
        if not text.isascii() and id(text) not in self._encoded:  # once for each string: it may be there many times
            try:
                text.encode("latin1")
            except UnicodeEncodeError as exc:
                raise MalformedError("bytes that are none") from exc
            self._encoded[id(text)] = text  # which keeps it, and its id with it
        return PickledBytes(text)

    def byte_array(self, given: tuple[object, ...]) -> object:
        """Take one that is empty, or made of bytes, as protocol 2 writes them."""
        whole = PickledBytes("") if not given else given[0]
        if len(given) > 1 or not isinstance(whole, PickledBytes):
            raise MalformedError("a bytearray of something else than bytes")
        return PickledBytes(whole.text, is_array=True)

    def complex_number(self, given: tuple[object, ...]) -> object:
        real, imaginary = given if len(given) == 2 else (None, None)
        if type(real) is not float or type(imaginary) is not float:
            raise MalformedError("a complex number that is not made of two")
        return complex(real, imaginary)

    def set_of_list(self, given: tuple[object, ...]) -> object:
        """Take one whose items are quick to hash. Each item of a list is looked at once, of however many sets it is."""
        if len(given) != 1 or type(given[0]) is not list:
            raise MalformedError("a set that is not made of a list")
        items = cast("list[object]", given[0])
        known = self._hashable.get(id(items), (items, 0))[1]
        if not all(map(_is_quick_to_hash, items[known:])):
            raise UnsupportedFormatError(
                "the pickle has a set of something else than strings, numbers and bytes",
                file=self._file,
                hint="Save the model's state_dict alone; safetensors holds nothing but tensors",
            )
        self._hashable[id(items)] = items, len(items)  # which keeps it, and its id with it
        return PickledSet(items, len(items))

    def _check_state(self, state: object) -> None:
        """Check the attributes of a tensor, none of which is needed: a dict of them, and one for those in slots."""
        parts = cast("tuple[object, ...]", state) if isinstance(state, tuple) else (state, None)
        if len(parts) != 2:
            raise MalformedError("attributes that are none")
        for part in parts:
            if part is None:
                continue
            if not isinstance(part, dict):
                raise MalformedError("attributes that are none")
            names = cast("dict[object, object]", part)
            self._num_attributes += len(names)
            if self._num_attributes > MAX_OPCODES or not all(type(name) is str for name in names):
                raise MalformedError("attributes without a name, or too many")
            if any(name in OWN_ATTRIBUTES for name in names):
                raise MalformedError("attributes that are not a tensor's to set")

    def _sizes(self, value: object) -> tuple[int, ...]:
        """Check sizes, once for each tuple: it may be the shape of every tensor."""
        known = self._checked.get(id(value))
        if known is not None:
            return known
        if not isinstance(value, tuple):
            _refuse_number()
        sizes = cast("tuple[object, ...]", value)
        if len(sizes) > MAX_RANK:
            raise MalformedError(f"a tensor of more than {MAX_RANK} dimensions")
        for size in sizes:
            _whole(size)
        checked = self._checked[id(sizes)] = cast("tuple[int, ...]", sizes)  # which keeps it, and its id with it
        return checked


def _is_quick_to_hash(item: object) -> bool:
    if isinstance(item, PickledBytes):
        return not item.is_array
    return item is None or type(item) in (str, int, bool, float, complex)


def _check_gradient(dtype: str, requires_grad: object, hooks: object) -> None:
    """Refuse what torch would not make a tensor of, though nothing of it is needed here."""
    if type(requires_grad) is not bool or (requires_grad and (dtype.startswith(("U", "I", "q")) or dtype == "BOOL")):
        raise MalformedError("a tensor that cannot have a gradient, and shall")
    if hooks is not None and not isinstance(hooks, PickledDict):
        raise MalformedError("hooks that are none")


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        _refuse_number()
    return value


def _refuse_number() -> NoReturn:
    raise MalformedError("a size that is no whole number of 63 bits")


@dataclass(frozen=True, slots=True)
class _StorageClass:
    dtype: str


@dataclass(frozen=True, slots=True)
class _DType:
    dtype: str


@dataclass(frozen=True, slots=True)
class _Function:
    """`stands_for` makes what a call of it results in, given the arguments."""

    stands_for: Callable[[_Tensors, tuple[object, ...]], object]


#: A class of tensors that says nothing about what is in them.
_PLAIN_CLASS = object()

_NAMES: dict[str, object] = {
    **{f"torch.{name}Storage": _StorageClass(dtype) for name, dtype in STORAGES.items()},
    **{f"torch.{name}": _DType(dtype) for name, dtype in DTYPES.items()},
    **{f"torch.{module}UntypedStorage": _StorageClass(UNTYPED) for module in ("storage.", "")},
    **dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"), _PLAIN_CLASS),
    "torch._utils._rebuild_tensor": _Function(_Tensors.tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_Tensors.tensor_v2),
    "torch._utils._rebuild_tensor_v3": _Function(_Tensors.tensor_v3),
    "torch._utils._rebuild_parameter": _Function(_Tensors.parameter),
    "torch._utils._rebuild_parameter_with_state": _Function(_Tensors.parameter_with_state),
    "torch._tensor._rebuild_from_type_v2": _Function(_Tensors.from_type),
    "collections.OrderedDict": _Function(_Tensors.ordered_dict),
    "torch.Size": _Function(_Tensors.size),
    "torch.device": _Function(_Tensors.device),
    "_codecs.encode": _Function(_Tensors.encode),
    **{f"{module}.bytearray": _Function(_Tensors.byte_array) for module in ("__builtin__", "builtins")},
    **{f"{module}.complex": _Function(_Tensors.complex_number) for module in ("__builtin__", "builtins")},
    **{f"{module}.set": _Function(_Tensors.set_of_list) for module in ("__builtin__", "builtins")},
}
