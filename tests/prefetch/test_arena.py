"""Pieces of an arena: theirs alone, side by side in huge pages, and gone with their last reference."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest

from weightstream.prefetch.arena import Arena
from weightstream.prefetch.memory import PAGE_BYTES

MIB = 2**20
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def address_of(piece: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(piece))


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


def test_pieces_are_zeroed_pages_of_their_own() -> None:
    arena = Arena()
    first, second = arena.allocate(100), arena.allocate(PAGE_BYTES + 1)
    assert (len(first), len(second)) == (100, PAGE_BYTES + 1)
    assert address_of(first) % PAGE_BYTES == address_of(second) % PAGE_BYTES == 0
    assert address_of(second) == address_of(first) + PAGE_BYTES
    assert bytes(first) == bytes(100)
    second[:] = b"x" * len(second)
    assert bytes(first) == bytes(100)


def test_piece_is_unmapped_with_its_last_reference_and_neighbours_stay() -> None:
    arena = Arena()
    first, second, third = (arena.allocate(PAGE_BYTES) for _ in range(3))
    address = address_of(second)
    part = second[10:20]
    del second
    assert is_mapped(address)
    del part
    assert not is_mapped(address)
    first[0], third[0] = 1, 1
    assert is_mapped(address_of(first))


def test_rest_of_a_mapping_goes_with_the_arena_and_pieces_outlive_it() -> None:
    arena = Arena()
    piece = arena.allocate(PAGE_BYTES)
    after = address_of(piece) + PAGE_BYTES
    assert is_mapped(after)
    del arena
    assert not is_mapped(after)
    piece[0] = 1


def test_piece_larger_than_a_mapping_has_one_of_its_own() -> None:
    arena = Arena()
    small, large = arena.allocate(MIB), arena.allocate(300 * MIB)
    large[0] = large[-1] = small[-1] = 1
    assert len(large) == 300 * MIB


def test_too_much_is_an_error() -> None:
    with pytest.raises(MemoryError, match="cannot map"):
        Arena().allocate(2**60)


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="no transparent huge pages on this machine"
)
def test_pieces_that_are_no_whole_huge_pages_are_filled_in_huge_pages() -> None:
    arena = Arena()
    pieces: list[memoryview] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(24):
        pieces.append(arena.allocate(3 * MIB))
        ctypes.memset(address_of(pieces[-1]), 1, len(pieces[-1]))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 24 * 256 / 2  # of small pages, each piece has 256 or more outside of its one whole huge page
