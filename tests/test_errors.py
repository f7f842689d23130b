"""The error tree: its drawing, its messages, its way through pickle."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from weightstream import errors
from weightstream.errors import HeaderError, ReadError, WeightstreamError

CLASSES = sorted(
    (cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__),
    key=lambda cls: cls.__name__,
)


def drawn_tree() -> dict[str, str]:
    """Parents by child, as the module's docstring draws them."""
    parents: dict[str, str] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        drawn = re.match(r"((?:│   |    )*)(?:├── |└── )?(\w+Error)\b", line)
        if drawn and (above or drawn[2] == "WeightstreamError"):
            depth = len(drawn[1]) // 4 + (1 if "── " in line else 0)
            above[depth:] = [drawn[2]]
            if depth:
                parents[drawn[2]] = above[depth - 1]
    return parents


def test_all_is_sorted_and_names_every_class() -> None:
    assert errors.__all__ == [cls.__name__ for cls in CLASSES]


def test_drawn_tree_is_the_real_one() -> None:
    real = {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES if cls is not WeightstreamError}
    assert drawn_tree() == real


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_says_when_it_is_raised(cls: type[WeightstreamError]) -> None:
    assert cls is WeightstreamError or (cls.__doc__ or "").startswith("Raised")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(WeightstreamError("it failed"), "it failed", id="alone"),
        pytest.param(WeightstreamError("it failed", file="a.bin"), "a.bin: it failed", id="file"),
        pytest.param(WeightstreamError("it failed", tensor="w"), "w: it failed", id="tensor"),
        pytest.param(
            HeaderError(
                "wrong length", file="a.bin", tensor="w", expected="8 bytes", actual="4 bytes", hint="Copy it again."
            ),
            "w in a.bin: wrong length: expected 8 bytes, found 4 bytes. Copy it again.",
            id="all",
        ),
        pytest.param(WeightstreamError("wrong", expected=1), "wrong: expected 1", id="expected alone"),
        pytest.param(WeightstreamError("wrong", actual=0), "wrong: found 0", id="actual alone, and falsy"),
    ],
)
def test_message_is_composed_of_the_parts(error: WeightstreamError, message: str) -> None:
    assert str(error) == message


def test_message_does_not_obey_names_and_is_short() -> None:
    error = WeightstreamError("it\nfailed\x1b[2J", file="a\nb", tensor="\x1b]0;x\x07\u202eä\ud800", actual="x" * 10**6)
    assert str(error).startswith("\\x1b]0;x\\x07\\u202eä\\ud800 in a\\nb: it\nfailed\\x1b[2J: found xxx")
    assert len(str(error)) < 1100
    assert error.tensor == "\x1b]0;x\x07\u202eä\ud800"


@pytest.mark.parametrize(
    ("names", "ending"),
    [
        pytest.param("ab", "(the model is partly written: a, b)", id="few"),
        pytest.param("abcdefg", "(the model is partly written: a, b, c, d, e and 2 more)", id="many"),
    ],
)
def test_message_says_what_was_already_written(names: str, ending: str) -> None:
    error = ReadError("broken off")
    error.partly_written = tuple(names)
    assert str(error) == f"broken off {ending}"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_error_survives_pickling(cls: type[WeightstreamError]) -> None:
    error = cls("it failed", file="a.bin", tensor="w", expected=(1, 2), actual=(2, 1), hint="Try again.")
    error.partly_written = ("v",)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
