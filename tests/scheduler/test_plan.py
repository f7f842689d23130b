"""The plan covers every wanted byte once, and keeps to slots and boundaries, whatever the tensors are."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from weightstream.device.layout import ALIGNMENT_BYTES, IN_SLOT
from weightstream.device.placement import Mode, Place
from weightstream.device.turns import Turn, Turns
from weightstream.prefetch.header import TensorSpec
from weightstream.scheduler.plan import LoadPlan, make_plan

CHUNK = 4096
OWN = 2048
BLOCK = 8192

#: Stored dtype and the model's, the number of elements, the mode, whether a tensor that nobody wants comes before.
Wanted = tuple[torch.dtype, torch.dtype, int, Mode, bool]

kinds = st.sampled_from(
    [
        (torch.uint8, torch.uint8),
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float64),
    ]
)
tensors = st.lists(
    st.tuples(
        kinds,
        st.one_of(
            st.integers(0, 300), st.sampled_from([255, 256, 257, 511, 512, 1024, 2047, 2048]), st.integers(0, 6000)
        ),
        st.sampled_from(["adopt", "fill", "stage"]),
        st.sampled_from([False, False, False, True]),
    ).map(lambda one: (*one[0], *one[1:])),
    max_size=25,
)


def plan_of(
    wanted: list[Wanted],
    *,
    lands: bool = False,
    order: Literal["model", "file"] = "file",
    isolate_large: bool = False,
    fills_land: bool = False,
    positions: list[int] | None = None,
    num_turns: int = 0,
) -> tuple[LoadPlan, list[TensorSpec], list[Place]]:
    """A plan for tensors that lie one behind the other in shards of ten. Of `num_turns`, each has every fourth or so."""
    specs: list[TensorSpec] = []
    places: list[Place] = []
    end = 0
    for i, (stored, dtype, count, mode, has_gap) in enumerate(wanted):
        begin = 99 if i % 10 == 0 else end + 7 * has_gap
        end = begin + count * stored.itemsize
        specs.append(TensorSpec(f"t{i}", "U8", (count,), i // 10, begin, end))
        position = i if positions is None else positions[i]
        places.append(Place(f"t{i}", end - begin, stored, dtype, (count,), mode, position))
    of = {i: i % (num_turns + 1) for i in range(len(wanted)) if i % (num_turns + 1) < num_turns}
    members = [tuple(i for i in of if of[i] == turn) for turn in range(num_turns)]
    plan = make_plan(
        specs,
        places,
        lands=[lands],
        chunk_bytes=CHUNK,
        own_bytes=OWN,
        block_bytes=BLOCK,
        order=order,
        isolate_large=isolate_large,
        fills_land=fills_land,
        turns=Turns(tuple(Turn(indices, indices) for indices in members), of) if num_turns else None,
    )
    return plan, specs, places


options = {
    "lands": st.booleans(),
    "isolate_large": st.booleans(),
    "fills_land": st.booleans(),
    "order": st.sampled_from(["model", "file"]),
    "num_turns": st.sampled_from([0, 0, 3]),
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(wanted=tensors, **options)
def test_chunks_cover_every_wanted_byte_once(wanted: list[Wanted], **options: bool) -> None:
    plan, specs, _ = plan_of(wanted, **options)  # type: ignore[arg-type]
    covered = sorted((chunk.source.shard, chunk.source.begin, chunk.source.end) for chunk in plan.chunks)
    for (shard, _, end), (next_shard, begin, _) in itertools.pairwise(covered):
        assert shard < next_shard or end <= begin
    for spec in specs:
        inside = [
            (max(begin, spec.begin), min(end, spec.end))
            for shard, begin, end in covered
            if shard == spec.shard and begin < spec.end and end > spec.begin
        ]
        assert sum(end - begin for begin, end in inside) == spec.num_bytes
    assert sum(chunk.num_bytes for chunk in plan.chunks) == plan.num_bytes == sum(spec.num_bytes for spec in specs)
    assert [chunk.index for chunk in plan.chunks] == list(range(len(plan.chunks)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(wanted=tensors, **options)
def test_chunk_fits_its_slot_and_small_tensors_are_not_cut(wanted: list[Wanted], **options: bool) -> None:
    plan, specs, _ = plan_of(wanted, **options)  # type: ignore[arg-type]
    num_chunks_of: dict[int, int] = {}
    for chunk in plan.chunks:
        assert 0 < chunk.num_bytes <= CHUNK
        assert chunk.transfer.slot_bytes <= CHUNK
        assert sum(landing.num_bytes for landing in chunk.transfer.landings) == chunk.num_bytes
        for i, *_ in pieces(plan, chunk.index):
            num_chunks_of[i] = num_chunks_of.get(i, 0) + 1
    for i, spec in enumerate(specs):
        expected = plan.parts.get(i, 1) if spec.num_bytes else 0
        assert num_chunks_of.get(i, 0) == expected
        if spec.num_bytes < OWN:
            assert i not in plan.parts
    assert list(plan.empty) == [i for i, spec in enumerate(specs) if spec.num_bytes == 0]


def pieces(plan: LoadPlan, index: int) -> list[tuple[int, int, int, int]]:
    transfer = plan.chunks[index].transfer
    return list(plan.layout.pieces(transfer.first, transfer.stop, transfer.head, transfer.num_bytes))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(wanted=tensors, **options)
def test_every_tensor_begins_on_256_bytes_and_overlaps_no_other(wanted: list[Wanted], **options: bool) -> None:
    plan, _, places = plan_of(wanted, **options)  # type: ignore[arg-type]
    layout = plan.layout
    used: dict[int, list[tuple[int, int]]] = {}
    for i, place in enumerate(places):
        if layout.block_of[i] == IN_SLOT:
            assert place.num_bytes == 0 or place.mode == "fill"
            continue
        begin = layout.offset_of[i]
        assert begin % ALIGNMENT_BYTES == 0
        end = begin + math.prod(place.shape) * place.dtype.itemsize
        used.setdefault(layout.block_of[i], []).append((begin, end))
        if place.num_bytes >= OWN:
            assert begin == 0
            assert layout.members[layout.block_of[i]] == 1
    for block, ranges in used.items():
        assert len(ranges) == layout.members[block]
        assert max(end for _, end in ranges) <= layout.blocks[block]
        for (_, end), (begin, _) in itertools.pairwise(sorted(ranges)):
            assert end <= begin


@settings(max_examples=40, deadline=None, derandomize=True)
@given(wanted=tensors, lands=st.booleans(), isolate_large=st.booleans(), fills_land=st.booleans())
def test_packed_chunk_brings_every_byte_to_its_place(wanted: list[Wanted], **options: bool) -> None:
    """Carry the layout out on plain byte arrays, and look where the bytes of the files arrive."""
    plan, specs, places = plan_of(wanted, **options)  # type: ignore[arg-type]
    layout = plan.layout
    blocks = [bytearray(size) for size in layout.blocks]
    parameters = {i: bytearray(place.num_bytes) for i, place in enumerate(places)}
    sources = {i: bytes((i * 31 + k * 7 + 1) % 255 + 1 for k in range(spec.num_bytes)) for i, spec in enumerate(specs)}
    for chunk in plan.chunks:
        transfer = chunk.transfer
        slot = bytearray(CHUNK)
        stream = b"".join(sources[i][offset : offset + count] for i, offset, _, count in pieces(plan, chunk.index))
        for landing in transfer.landings:
            assert not (landing.place >= 0 and transfer.slot_bytes)
            into_slot = parameters[landing.place] if landing.place >= 0 else slot
            memory = into_slot if landing.block == IN_SLOT else blocks[landing.block]
            memory[landing.offset : landing.offset + landing.num_bytes] = stream[: landing.num_bytes]
            stream = stream[landing.num_bytes :]
        for run in transfer.runs:
            target = parameters[run.place] if run.block == IN_SLOT else blocks[run.block]
            target[run.block_offset : run.block_offset + run.num_bytes] = slot[run.slot_offset :][: run.num_bytes]
        for piece in transfer.loose:
            assert piece.offset % places[piece.place].stored_dtype.itemsize == 0
            parameters[piece.place][piece.offset : piece.offset + piece.num_bytes] = slot[piece.slot_offset :][
                : piece.num_bytes
            ]
    for i, place in enumerate(places):
        if layout.block_of[i] == IN_SLOT or place.is_cast:
            found = bytes(parameters[i])
        else:
            found = bytes(blocks[layout.block_of[i]][layout.offset_of[i] :][: place.num_bytes])
        assert found == sources[i], place


@settings(max_examples=40, deadline=None, derandomize=True)
@given(wanted=tensors)
def test_isolated_large_tensor_shares_neither_chunk_nor_block_across_it(wanted: list[Wanted]) -> None:
    wanted = [(*one[:3], "stage", one[4]) for one in wanted]  # as for a consumer
    plan, specs, _ = plan_of(wanted, isolate_large=True)
    for chunk in plan.chunks:
        held = [i for i, *_ in pieces(plan, chunk.index)]
        assert len(held) == 1 or all(specs[i].num_bytes < OWN for i in held)
    block_of = plan.layout.block_of
    for i, spec in enumerate(specs):
        if spec.num_bytes >= OWN:
            assert not ({*block_of[:i]} & {*block_of[i + 1 :]}) - {IN_SLOT}


def small(count: int) -> list[Wanted]:
    return [(torch.uint8, torch.uint8, 2000, "adopt", False)] * count


def test_order_file_is_that_of_the_files() -> None:
    plan, _, _ = plan_of(small(10), order="file", positions=list(range(9, -1, -1)))
    begins = [(chunk.source.shard, chunk.source.begin) for chunk in plan.chunks]
    assert begins == sorted(begins)


def test_order_model_is_that_of_the_earliest_tensor_in_each_chunk() -> None:
    positions = [5, 4, 9, 8, 1, 0, 7, 6, 3, 2]  # two to a chunk
    plan, _, _ = plan_of(small(10), order="model", positions=positions)
    assert [sorted(positions[i] for i, *_ in pieces(plan, k)) for k in range(5)] == [
        *([0, 1], [2, 3], [4, 5], [6, 7], [8, 9]),
    ]


@pytest.mark.parametrize(
    ("gap", "num_extents"), [(False, 2), (True, 20)], ids=["contiguous-in-two-shards", "gaps-between"]
)
def test_extents_are_contiguous_ranges(gap: bool, num_extents: int) -> None:  # noqa: FBT001
    wanted: list[Wanted] = [(torch.uint8, torch.uint8, 10, "adopt", gap)] * 20
    assert plan_of(wanted)[0].num_extents == num_extents


@pytest.mark.parametrize("order", ["model", "file"])
def test_chunks_of_a_turn_come_together_behind_all_others(order: Literal["model", "file"]) -> None:
    """Two turns and others in turn, in the file: each chunk has one tensor."""
    wanted: list[Wanted] = [(torch.uint8, torch.uint8, 10, "stage", False)] * 9
    positions = list(reversed(range(9))) if order == "model" else None
    plan, _, _ = plan_of(wanted, order=order, positions=positions, num_turns=2)
    found = [chunk.transfer.first for chunk in plan.chunks]
    assert found == ([8, 5, 2, 6, 3, 0, 7, 4, 1] if order == "model" else [2, 5, 8, 0, 3, 6, 1, 4, 7])


def test_tensors_of_turns_have_blocks_of_their_own_and_one_turn_counts() -> None:
    wanted: list[Wanted] = [(torch.uint8, torch.uint8, 10 * (i + 1), "stage", False) for i in range(9)]
    plan, _, _ = plan_of(wanted, num_turns=2)
    layout = plan.layout
    shared = [layout.block_of[place] for place in range(9) if plan.turns is not None and place not in plan.turns.of]
    assert len(set(shared)) == 1
    assert sorted(layout.members) == [1] * 6 + [3]
    # Each turn has three tensors, of less than 256 bytes each, and only one turn is there at a time.
    assert plan.bytes_on(0) == sum(layout.blocks) - 3 * 256


def test_nothing_wanted_is_a_plan_of_nothing() -> None:
    plan, _, _ = plan_of([])
    assert (plan.chunks, plan.num_bytes) == ((), 0)
