"""What `torch.save` pickles, read without unpickling: a machine that makes descriptions and calls nothing.

Knows the instructions of pickle's protocol 2, which is what torch writes and `torch.load(weights_only=True)` reads, and
of all the names that a pickle can mention those few that stand for tensors. It makes strings, numbers, tuples, lists,
dicts, and descriptions of tensors; no object of a class that the file chooses, so there is no code to be run. Not torch's
own unpickler, because its time and memory have no bound: it hashes whatever a file has as a key, and to hash
a tuple of tuples of tuples takes as long as the file likes.

Protocol: https://github.com/python/cpython/blob/main/Lib/pickletools.py; what torch makes of it: torch/_utils.py.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, cast

from weightstream.errors import HeaderError, UnsupportedFormatError
from weightstream.prefetch.header import MAX_RANK

__all__ = ["MAX_OPCODES", "MAX_PICKLE_BYTES", "OPAQUE", "EndOfDataError", "PickledTensor", "Storage", "read_pickle"]

#: Limits of our own. A tensor takes 34 instructions and some 100 bytes; each makes one object at most.
MAX_PICKLE_BYTES = 2**26
MAX_OPCODES = 2**22

#: Names of dtypes in torch, and in the safetensors format. torch's other dtypes keep torch's name.
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "complex32": "complex32",
    "complex128": "complex128",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
}

_STORAGES = {
    "Bool": "BOOL",
    "Byte": "U8",
    "Char": "I8",
    "Short": "I16",
    "Int": "I32",
    "Long": "I64",
    "Half": "F16",
    "BFloat16": "BF16",
    "Float": "F32",
    "Double": "F64",
    "ComplexFloat": "C64",
    "ComplexDouble": "complex128",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QInt32": "qint32",
}

#: Stands for the dtype of a storage of bytes, of which every tensor says its own.
_UNTYPED = "untyped"


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of a file that tensors lie in. `num_elements` counts elements of `dtype`; bytes where that is "untyped"."""

    key: str
    dtype: str
    num_elements: int

    @property
    def is_untyped(self) -> bool:
        return self.dtype == _UNTYPED


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as a pickle describes it, unchecked. Offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    """What the name of a class or function in a pickle stands for; `kind` is how it is used."""

    text: str
    kind: str


class _Opaque:
    """Something that no tensor depends on."""

    __slots__ = ()


OPAQUE = _Opaque()

_NAMES = {
    **{f"torch.{name}Storage": _Name(dtype, "storage") for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": _Name(dtype, "dtype") for name, dtype in _DTYPES.items()},
    **{f"torch.{module}UntypedStorage": _Name(_UNTYPED, "storage") for module in ("storage.", "")},
    **{f"torch._utils.{name}": _Name(name, "call") for name in (
        "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_parameter_with_state",
    )},
    **{f"torch.{name}": _Name(name, "plain class") for name in ("Tensor", "nn.parameter.Parameter", "nn.parameter.Buffer")},
    **{name: _Name(name, "call") for name in (
        "torch._tensor._rebuild_from_type_v2", "collections.OrderedDict", "torch.Size", "torch.device", "_codecs.encode",
    )},
}  # fmt: skip


class EndOfDataError(Exception):
    """The pickle goes on behind the bytes that there are."""


def read_pickle(
    raw: bytes, start: int = 0, *, file: str, most_opcodes: int = MAX_OPCODES
) -> tuple[object, int, dict[str, Storage]]:
    """Read one pickle.

    Returns:
        What it stands for: None, bool, int, float, str, tuple, list, dict with keys that are strings or numbers,
        `PickledTensor`, or `OPAQUE`; where it ends in `raw`; and the storages that it mentions, by their keys.

    Raises:
        EndOfDataError: `raw` ends before the pickle does.
        HeaderError: not a pickle as torch writes them, or one above the limits.
        UnsupportedFormatError: a pickle of something else than tensors, numbers, strings and what holds them.
    """
    machine = _Machine(raw, start, file, most_opcodes)
    try:
        value = machine.run()
    except (IndexError, KeyError, UnicodeDecodeError, _MalformedError) as exc:
        raise HeaderError(
            "the pickle is not valid", file=file, actual=f"{str(exc) or type(exc).__name__} at byte {machine.position}"
        ) from exc
    return value, machine.position, machine.storages


class _MalformedError(Exception):
    """What a pickle does makes no sense."""


class _Machine:
    """The stack, the marks and the memo of one pickle; a method for each instruction."""

    def __init__(self, raw: bytes, start: int, file: str, most_opcodes: int) -> None:
        self.position = start
        self.storages: dict[str, Storage] = {}
        self._raw = raw
        self._file = file
        self._most_opcodes = most_opcodes
        self._stack: list[object] = []
        self._marked: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._checked: dict[int, tuple[int, ...]] = {}

    def run(self) -> object:
        raw, instructions = self._raw, _INSTRUCTIONS
        last = len(raw)
        for _ in range(self._most_opcodes):
            position = self.position
            if position >= last:
                raise EndOfDataError
            self.position = position + 1
            instruction = instructions.get(raw[position])
            if instruction is None:
                if raw[position] == _STOP:
                    return self._stack.pop()
                raise _MalformedError(f"the instruction {raw[position : position + 1]!r}, which torch does not write")
            instruction(self)
        raise _MalformedError(f"more than {self._most_opcodes} instructions")

    def _bytes(self, count: int) -> bytes:
        begin = self.position
        self.position = end = begin + count
        if end > len(self._raw):
            raise EndOfDataError
        return self._raw[begin:end]

    def _number(self, count: int) -> int:
        return int.from_bytes(self._bytes(count), "little")

    def _line(self) -> str:
        end = self._raw.find(b"\n", self.position, self.position + 1000)
        if end < 0:
            if self.position + 1000 > len(self._raw):
                raise EndOfDataError
            raise _MalformedError("a name without an end")
        line = self._raw[self.position : end]
        self.position = end + 1
        return line.decode()

    def _pop_mark(self) -> list[object]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    # Instructions, by their names in pickletools

    def proto(self) -> None:
        if self._number(1) != 2:
            raise _MalformedError("another protocol than 2")

    def mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def put(self, count: int) -> None:
        self._memo[self._number(count)] = self._stack[-1]

    def get(self, count: int) -> None:
        self._stack.append(self._memo[self._number(count)])

    def integer(self, count: int) -> None:
        self._stack.append(self._number(count))

    def signed(self) -> None:
        self._stack.append(int.from_bytes(self._bytes(4), "little", signed=True))

    def long1(self) -> None:
        self._stack.append(int.from_bytes(self._bytes(self._number(1)), "little", signed=True))

    def binfloat(self) -> None:
        self._stack.append(struct.unpack(">d", self._bytes(8))[0])

    def string(self, count: int) -> None:
        self._stack.append(self._bytes(self._number(count)).decode("utf-8", "surrogatepass"))

    def constant(self, value: object) -> None:
        self._stack.append(value)

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError("a tuple of more than there is")
        items = tuple(self._stack[-count:])
        self._stack[-count:] = [items]

    def tuple_from_mark(self) -> None:
        items = tuple(self._pop_mark())
        self._stack.append(items)

    def empty_list(self) -> None:
        self._stack.append([])

    def empty_dict(self) -> None:
        self._stack.append({})

    def append(self) -> None:
        item = self._stack.pop()
        self._extend([item])

    def appends(self) -> None:
        items = self._pop_mark()
        self._extend(items)

    def _extend(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise _MalformedError("items for what is no list")
        cast("list[object]", target).extend(items)

    def setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def setitems(self) -> None:
        items = self._pop_mark()
        self._update(items)

    def _update(self, items: list[object]) -> None:
        """Add keys and values to a dict. Keys are strings and numbers alone: to hash others can take any time."""
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise _MalformedError("items for what is no dict")
        mapping = cast("dict[object, object]", target)
        before = len(mapping)
        for key in items[::2]:
            if type(key) not in (str, int, bool, float):
                raise _MalformedError("a key that is neither a string nor a number")
        mapping.update(zip(items[::2], items[1::2], strict=True))
        if len(mapping) != before + len(items) // 2:
            raise _MalformedError("a key that is there twice")

    def global_name(self) -> None:
        name = f"{self._line()}.{self._line()}"
        found = _NAMES.get(name)
        if found is None:
            raise UnsupportedFormatError(
                f"the pickle needs {name}, which is neither a plain tensor nor part of one",
                file=self._file,
                hint="Save the model's state_dict alone; safetensors holds nothing but tensors",
            )
        self._stack.append(found)

    def persistent(self) -> None:
        """Take the description of a storage: ("storage", class, key, device, elements), in old files with None behind."""
        found = self._stack.pop()
        parts = cast("tuple[object, ...]", found) if isinstance(found, tuple) else ()
        if len(parts) == 6 and parts[5] is None:
            parts = parts[:5]
        if len(parts) != 5 or parts[0] != "storage":
            raise _MalformedError("a reference to something else than a storage")
        _, kind, key, _, num_elements = parts
        if not isinstance(kind, _Name) or kind.kind != "storage" or not isinstance(key, str):
            raise _MalformedError("a storage without a class or a key")
        storage = Storage(key, kind.text, _whole(num_elements))
        if self.storages.setdefault(key, storage) != storage:
            raise _MalformedError("two descriptions of one storage")
        self._stack.append(storage)

    def build(self) -> None:
        """Leave attributes out: those of an OrderedDict are the versions of modules, which loading does not need."""
        state = self._stack.pop()
        if not isinstance(self._stack[-1], OrderedDict) or type(state) is not dict:
            raise _MalformedError("attributes for what has none")

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def _call(self, function: object, arguments: object, *, depth: int = 0) -> object:
        if not isinstance(function, _Name) or function.kind != "call" or not isinstance(arguments, tuple) or depth > 2:
            raise _MalformedError("a call of what is no function")
        given = cast("tuple[object, ...]", arguments)
        name = function.text
        if name.startswith("_rebuild_tensor"):
            return self._tensor(name, given)
        if name.startswith("_rebuild_parameter"):
            most = 3 if name == "_rebuild_parameter" else 4
            if len(given) != most or not isinstance(given[0], PickledTensor):
                raise _MalformedError("a parameter without a tensor")
            _check_gradient(given[0].dtype, given[1], given[2])
            return given[0]
        if name == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes
            inner, kind, rest, _ = given if len(given) == 4 else (None, None, None, None)
            if not isinstance(kind, _Name) or kind.kind != "plain class":
                raise _MalformedError("a tensor of a class that is unknown")
            return self._call(inner, rest, depth=depth + 1)
        if name == "collections.OrderedDict" and not given:
            return OrderedDict[object, object]()
        if name == "torch.Size" and len(given) == 1:
            return given[0]
        return OPAQUE

    def _tensor(self, name: str, given: tuple[object, ...]) -> PickledTensor:
        least = {"_rebuild_tensor": 4, "_rebuild_tensor_v2": 6, "_rebuild_tensor_v3": 7}[name]
        if not least <= len(given) <= least + 1 or not isinstance(given[0], Storage):
            raise _MalformedError("a tensor without a storage")
        storage, dtype = given[0], given[0].dtype
        if name == "_rebuild_tensor_v3":
            named = given[6]
            if not isinstance(named, _Name) or named.kind != "dtype":
                raise _MalformedError("a tensor without a dtype")
            dtype = named.text
        if len(given) > least and given[least]:
            raise UnsupportedFormatError(
                "the pickle has a tensor whose elements are conjugated or negated when they are used",
                file=self._file,
                hint="Save what `resolve_conj` and `resolve_neg` return",
            )
        if least > 4:
            _check_gradient(dtype, given[4], given[5])
        return PickledTensor(storage, dtype, _whole(given[1]), self._sizes(given[2]), self._sizes(given[3]))

    def _sizes(self, value: object) -> tuple[int, ...]:
        """Check sizes, once for each tuple: it may be the shape of every tensor."""
        known = self._checked.get(id(value))
        if known is not None:
            return known
        if not isinstance(value, tuple):
            _refuse_number()
        sizes = cast("tuple[object, ...]", value)
        if len(sizes) > MAX_RANK:
            raise _MalformedError(f"a tensor of more than {MAX_RANK} dimensions")
        for size in sizes:
            _whole(size)
        checked = self._checked[id(sizes)] = cast("tuple[int, ...]", sizes)  # which keeps it, and its id with it
        return checked


def _check_gradient(dtype: str, requires_grad: object, hooks: object) -> None:
    """Refuse what torch would not make a tensor of, though nothing of it is needed here."""
    has_gradient = not (dtype.startswith(("U", "I", "q")) or dtype == "BOOL")
    if type(requires_grad) is not bool or (requires_grad and not has_gradient):
        raise _MalformedError("a tensor that cannot have a gradient, and shall")
    if hooks is not None and not isinstance(hooks, OrderedDict):
        raise _MalformedError("hooks that are none")


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        _refuse_number()
    return value


def _refuse_number() -> NoReturn:
    raise _MalformedError("a size that is no whole number of 63 bits")


def _with(instruction: Callable[[_Machine, int], None], count: int) -> Callable[[_Machine], None]:
    return lambda machine: instruction(machine, count)


def _push(value: object) -> Callable[[_Machine], None]:
    return lambda machine: machine.constant(value)


_STOP = ord(".")
_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    code[0]: instruction
    for code, instruction in {
        b"\x80": _Machine.proto,
        b"(": _Machine.mark,
        b"q": _with(_Machine.put, 1),
        b"r": _with(_Machine.put, 4),
        b"h": _with(_Machine.get, 1),
        b"j": _with(_Machine.get, 4),
        b"K": _with(_Machine.integer, 1),
        b"M": _with(_Machine.integer, 2),
        b"J": _Machine.signed,
        b"\x8a": _Machine.long1,
        b"G": _Machine.binfloat,
        b"X": _with(_Machine.string, 4),
        b"U": _with(_Machine.string, 1),
        b"T": _with(_Machine.string, 4),
        b"N": _push(None),
        b"\x88": _push(True),
        b"\x89": _push(False),
        b")": _push(()),
        b"t": _Machine.tuple_from_mark,
        b"\x85": _with(_Machine.tuple_of, 1),
        b"\x86": _with(_Machine.tuple_of, 2),
        b"\x87": _with(_Machine.tuple_of, 3),
        b"]": _Machine.empty_list,
        b"}": _Machine.empty_dict,
        b"a": _Machine.append,
        b"e": _Machine.appends,
        b"s": _Machine.setitem,
        b"u": _Machine.setitems,
        b"c": _Machine.global_name,
        b"Q": _Machine.persistent,
        b"R": _Machine.reduce,
        b"b": _Machine.build,
    }.items()
}
