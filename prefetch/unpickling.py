"""A machine for pickles of protocols 2 and 3, which torch reads: it makes plain values, and calls nothing.

Strings, numbers, tuples, lists and dicts are its own; whatever a pickle asks for by name is up to its `Meaning`. Not
Python's own unpickler, nor torch's, because their time and memory have no bound: they hash whatever a file has as a key,
and to hash a tuple of tuples of tuples takes as long as the file likes.

Protocol: https://github.com/python/cpython/blob/main/Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol, cast

__all__ = ["EndOfDataError", "MalformedError", "Meaning", "NewerProtocolError", "unpickle"]

#: A name, in the two lines of an instruction that has one.
_MOST_LINE_BYTES = 1000


class EndOfDataError(Exception):
    """The pickle goes on behind the bytes that there are."""


class MalformedError(Exception):
    """What a pickle does makes no sense."""


class NewerProtocolError(Exception):
    """A pickle of a protocol that has other instructions. Its argument is the number."""


class Meaning(Protocol):
    """What a pickle's names, references, calls and attributes stand for. What makes no sense is a MalformedError."""

    def name(self, text: str) -> object:
        """Return what stands for a class or a function, of which only the name is known: "module.name"."""
        ...

    def reference(self, description: object) -> object:
        """Return what stands for something that is not in the pickle."""
        ...

    def call(self, function: object, arguments: object) -> object:
        """Return what stands for the result of a call."""
        ...

    def attributes(self, target: object, state: object) -> None:
        """Take note of attributes that something is given."""
        ...


def unpickle(raw: bytes, start: int, meaning: Meaning, *, most_opcodes: int) -> tuple[object, int]:
    """Read one pickle; return what it stands for, and where it ends in `raw`.

    Keys of dicts are strings and numbers alone. Each instruction makes one object at most.

    Raises:
        EndOfDataError: `raw` ends before the pickle does.
        MalformedError: not a pickle of the instructions that torch uses, or more than so many of them.
        NewerProtocolError: a pickle of protocol 4 or later, which torch's own reader of weights does not take either.
        Exception: what `meaning` raises.
    """
    machine = _Machine(raw, start, meaning)
    try:
        return machine.run(most_opcodes), machine.position
    except (IndexError, KeyError, UnicodeDecodeError, MalformedError) as exc:
        raise MalformedError(f"{str(exc) or type(exc).__name__} at byte {machine.position}") from exc


class _Machine:
    """The stack, the marks and the memo of one pickle; a method for each instruction."""

    def __init__(self, raw: bytes, start: int, meaning: Meaning) -> None:
        self.position = start
        self._raw = raw
        self._meaning = meaning
        self._stack: list[object] = []
        self._marked: list[list[object]] = []
        self._memo: dict[int, object] = {}

    def run(self, most_opcodes: int) -> object:
        """Do one instruction after the other.

        The five that are most of every checkpoint's, and that do least, are done in place: a call for each of them would
        take most of the time. Whatever is unusual about them is left to their methods.
        """
        raw, marked, memo, instructions = self._raw, self._marked, self._memo, _INSTRUCTIONS
        stack, position, end = self._stack, self.position, len(self._raw)
        for _ in range(most_opcodes):
            if position >= end:
                raise EndOfDataError
            code = raw[position]
            position += 1
            if code == _BINPUT and stack and position < end:
                memo[raw[position]] = stack[-1]
                position += 1
            elif code == _BINGET and position < end and raw[position] in memo:
                stack.append(memo[raw[position]])
                position += 1
            elif code == _BININT1 and position < end:
                stack.append(raw[position])
                position += 1
            elif code == _LONG_BINPUT and stack and position + 4 <= end:
                memo[int.from_bytes(raw[position : position + 4], "little")] = stack[-1]
                position += 4
            elif code == _MARK:
                marked.append(stack)
                self._stack = stack = []
            else:
                self.position = position
                if code == _STOP:
                    return stack.pop()
                instruction = instructions.get(code)
                if instruction is None:
                    raise MalformedError(f"the instruction {bytes([code])!r}, which torch does not write")
                instruction(self)
                stack, position = self._stack, self.position
        self.position = position
        raise MalformedError(f"more than {most_opcodes} instructions")

    def _bytes(self, count: int) -> bytes:
        begin = self.position
        self.position = end = begin + count
        if end > len(self._raw):
            raise EndOfDataError
        return self._raw[begin:end]

    def _number(self, count: int) -> int:
        return int.from_bytes(self._bytes(count), "little")

    def _line(self) -> str:
        end = self._raw.find(b"\n", self.position, self.position + _MOST_LINE_BYTES)
        if end < 0:
            if self.position + _MOST_LINE_BYTES > len(self._raw):
                raise EndOfDataError
            raise MalformedError("a name without an end")
        line = self._raw[self.position : end]
        self.position = end + 1
        return line.decode()

    def _pop_mark(self) -> list[object]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    # Instructions, by their names in pickletools

    def proto(self) -> None:
        """Take 2, and 3, which adds only instructions that no tensor needs."""
        number = self._number(1)
        if number not in (2, 3):
            raise NewerProtocolError(number) if number in (4, 5) else MalformedError(f"protocol {number}")

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
        begin = self.position + count
        self.position = end = begin + int.from_bytes(self._raw[self.position : begin], "little")
        if end > len(self._raw):
            raise EndOfDataError
        self._stack.append(str(self._raw[begin:end], "utf-8", "surrogatepass"))

    def constant(self, value: object) -> None:
        self._stack.append(value)

    def tuple1(self) -> None:
        stack = self._stack
        stack[-1] = (stack[-1],)

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
            raise MalformedError("items for what is no list")
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
            raise MalformedError("items for what is no dict")
        mapping = cast("dict[object, object]", target)
        before = len(mapping)
        for key in items[::2]:
            if type(key) not in (str, int, bool, float):
                raise MalformedError("a key that is neither a string nor a number")
        mapping.update(zip(items[::2], items[1::2], strict=True))
        if len(mapping) != before + len(items) // 2:
            raise MalformedError("a key that is there twice")

    def global_name(self) -> None:
        self._stack.append(self._meaning.name(f"{self._line()}.{self._line()}"))

    def persistent(self) -> None:
        self._stack.append(self._meaning.reference(self._stack.pop()))

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._meaning.call(function, arguments))

    def build(self) -> None:
        state = self._stack.pop()
        self._meaning.attributes(self._stack[-1], state)


def _with(instruction: Callable[[_Machine, int], None], count: int) -> Callable[[_Machine], None]:
    return lambda machine: instruction(machine, count)


def _push(value: object) -> Callable[[_Machine], None]:
    return lambda machine: machine.constant(value)


#: Those that `run` does in place; `_INSTRUCTIONS` has the others, and those of the former that can go wrong.
_BINPUT, _LONG_BINPUT, _BINGET, _BININT1, _MARK, _STOP = b"qrhK(."

_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    code[0]: instruction
    for code, instruction in {
        b"\x80": _Machine.proto,
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
        b"N": _push(None),
        b"\x88": _push(True),
        b"\x89": _push(False),
        b")": _push(()),
        b"t": _Machine.tuple_from_mark,
        b"\x85": _Machine.tuple1,
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
