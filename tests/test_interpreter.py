"""What a load sets in the interpreter holds while somebody wants it, and is then as it was before."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Generator

import pytest

from weightstream.interpreter import no_garbage_collection, quick_thread_switches


@pytest.fixture(autouse=True)
def _as_before() -> Generator[None, None, None]:
    yield
    gc.enable()


def test_is_off_inside_and_on_again_after() -> None:
    with no_garbage_collection():
        assert not gc.isenabled()
        with no_garbage_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_comes_back_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), no_garbage_collection():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_stays_off_for_who_has_it_off() -> None:
    gc.disable()
    with no_garbage_collection():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_is_off_until_the_last_of_several_threads_is_done() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with no_garbage_collection():
            inside.set()
            leave.wait(30)

    other = threading.Thread(target=hold)
    with no_garbage_collection():
        other.start()
        assert inside.wait(30)
    assert not gc.isenabled()
    leave.set()
    other.join()
    assert gc.isenabled()


def test_thread_switches_are_quick_inside_and_as_before_after() -> None:
    before = sys.getswitchinterval()
    with quick_thread_switches(), quick_thread_switches():
        assert sys.getswitchinterval() == pytest.approx(0.0005)
    assert sys.getswitchinterval() == pytest.approx(before, abs=2e-6)


def test_thread_switches_that_are_quicker_already_stay_so() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    try:
        with quick_thread_switches():
            assert sys.getswitchinterval() == pytest.approx(0.0001, abs=2e-6)
    finally:
        sys.setswitchinterval(before)
