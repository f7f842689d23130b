"""Where tensors lie in blocks, and which copies that takes. The properties of all layouts: `scheduler/test_plan.py`."""

from __future__ import annotations

import pytest
import torch

from weightstream.device.layout import IN_SLOT, Given, Landing, Layout, Piece, Run, padded
from weightstream.device.placement import Mode, Place


def place(num_bytes: int, mode: Mode = "adopt", *, dtype: torch.dtype = torch.uint8) -> Place:
    return Place("t", num_bytes, torch.uint8 if dtype is torch.uint8 else torch.float16, dtype, (num_bytes,), mode, 0)


def layout_of(
    *places: Place,
    lands: bool = False,
    share_across_large: bool = True,
    fills_land: bool = False,
    given: Given | None = None,
) -> Layout:
    return Layout(
        list(places),
        lands=[lands],
        own_bytes=1000,
        block_bytes=2048,
        share_across_large=share_across_large,
        fills_land=fills_land,
        given=given,
    )


@pytest.mark.parametrize(("num_bytes", "expected"), [(0, 0), (1, 256), (256, 256), (257, 512)])
def test_padded_rounds_up_to_256(num_bytes: int, expected: int) -> None:
    assert padded(num_bytes) == expected


def test_small_tensors_share_a_block_until_it_is_full() -> None:
    layout = layout_of(*[place(900)] * 3)
    assert layout.block_of == [0, 0, 1]
    assert layout.offset_of == [0, 1024, 0]
    assert (layout.blocks, layout.members) == ([2048, 1024], [2, 1])


def test_large_tensor_has_a_block_of_its_own() -> None:
    layout = layout_of(place(10), place(1000), place(10))
    assert layout.block_of == [0, 1, 0]
    assert (layout.blocks, layout.members) == ([512, 1024], [2, 1])
    assert [layout.is_small(i) for i in range(3)] == [True, False, True]


def test_blocks_do_not_reach_across_a_large_tensor_if_so_asked() -> None:
    layout = layout_of(place(10), place(1000), place(10), share_across_large=False)
    assert layout.block_of == [0, 1, 2]


def test_tensor_with_storage_or_without_bytes_has_no_block() -> None:
    layout = layout_of(place(10, "fill"), place(0), place(10))
    assert layout.block_of == [IN_SLOT, IN_SLOT, 0]


def test_block_has_room_for_what_the_cast_makes() -> None:
    assert layout_of(place(200, dtype=torch.float64)).blocks == [1024]  # 100 halves become 100 doubles


def test_neighbours_go_in_one_copy_with_the_gaps_of_their_block() -> None:
    layout = layout_of(place(10), place(300), place(20))
    transfer = layout.transfer(0, 3, 0, 330)
    assert transfer.runs == (Run(0, 0, 0, 256 + 512 + 20),)
    assert transfer.landings == (Landing(IN_SLOT, 0, 10), Landing(IN_SLOT, 256, 300), Landing(IN_SLOT, 768, 20))
    assert (transfer.loose, transfer.slot_bytes) == ((), 1024)


def test_small_neighbours_of_a_large_tensor_still_go_in_one_copy() -> None:
    layout = layout_of(place(10), place(1000), place(20))
    transfer = layout.transfer(0, 3, 0, 1030)
    assert transfer.runs == (Run(0, 0, 0, 276), Run(1, 0, 512, 1000))
    assert [landing.offset for landing in transfer.landings] == [0, 512, 256]


def test_host_memory_is_read_into_without_slot_or_copy() -> None:
    layout = layout_of(place(10), place(1000), place(20), lands=True)
    transfer = layout.transfer(0, 3, 0, 1030)
    assert transfer.landings == (Landing(0, 0, 10), Landing(1, 0, 1000), Landing(0, 256, 20))
    assert (transfer.runs, transfer.loose, transfer.slot_bytes) == ((), (), 0)


def test_part_of_a_large_tensor_lands_where_it_belongs() -> None:
    layout = layout_of(place(5000), lands=True)
    assert layout.transfer(0, 1, 1024, 2000).landings == (Landing(0, 1024, 2000),)


@pytest.mark.parametrize("lands", [False, True], ids=["device", "host"])
def test_cast_and_small_parameters_with_storage_are_copied_one_by_one(*, lands: bool) -> None:
    layout = layout_of(place(200, dtype=torch.float64), place(30, "fill"), place(2000, "fill"), lands=lands)
    transfer = layout.transfer(0, 3, 0, 2230)
    assert transfer.loose == (Piece(0, 0, 0, 200), Piece(1, 0, 256, 30))
    assert transfer.runs == (Run(IN_SLOT, 0, 512, 2000, 2),)


def test_parameters_in_host_memory_are_read_into_where_that_is_allowed() -> None:
    layout = layout_of(place(10), place(30, "fill"), place(10), place(2000, "fill"), lands=True, fills_land=True)
    transfer = layout.transfer(0, 4, 0, 2050)
    assert transfer.landings == (
        Landing(0, 0, 10),
        Landing(IN_SLOT, 0, 30, 1),
        Landing(0, 256, 10),
        Landing(IN_SLOT, 0, 2000, 3),
    )
    assert (transfer.runs, transfer.loose, transfer.slot_bytes, transfer.in_place) == ((), (), 0, True)
    assert layout.transfer(3, 4, 512, 1000).landings == (Landing(IN_SLOT, 512, 1000, 3),)
    assert not layout.transfer(2, 3, 0, 10).in_place
    assert layout.blocks == [512]


def test_parameter_beside_a_tensor_that_is_cast_is_copied_from_its_slot() -> None:
    layout = layout_of(place(2000, "fill"), place(40, dtype=torch.float64), lands=True, fills_land=True)
    transfer = layout.transfer(0, 2, 0, 2040)
    assert transfer.landings == (Landing(IN_SLOT, 0, 2000), Landing(IN_SLOT, 2048, 40))
    assert (transfer.runs, transfer.in_place) == ((Run(IN_SLOT, 0, 0, 2000, 0),), False)


def test_copies_of_ten_thousand_small_tensors_are_few() -> None:
    layout = Layout([place(100)] * 10_000, lands=[False], own_bytes=1000, block_bytes=2**20)
    transfer = layout.transfer(0, 10_000, 0, 1_000_000)
    assert len(transfer.runs) == len(layout.blocks) == 3


def test_tensor_stays_in_given_memory_if_it_is_aligned_and_goes_as_it_is() -> None:
    places = [place(10), place(10, "fill"), place(20, dtype=torch.float64), place(0), place(10)]
    layout = layout_of(*places, given=Given([100, 200], [(0, 0), (0, 10), (1, 7), (1, 27), (1, 27)]))
    assert layout.block_of == [0, IN_SLOT, 2, IN_SLOT, 1]
    assert layout.offset_of == [0, 0, 0, 0, 27]
    assert (layout.blocks, layout.num_given, layout.members) == ([100, 200, 256], 2, [1, 1, 1])
    assert [layout.is_given(i) for i in range(5)] == [True, False, False, False, True]
