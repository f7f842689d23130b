"""The stage: copies in, tensors out, blocks let go of as soon as nobody needs them."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.builders import assert_same
from tests.fakes.accelerator import FRESH, FakeAccelerator
from weightstream.device.backend import HostBackend, NowhereBackend
from weightstream.device.layout import Layout
from weightstream.device.placement import Mode, Place
from weightstream.device.stage import Destination, DeviceStage
from weightstream.prefetch.arena import Arena
from weightstream.prefetch.memory import allocate

OWN = 4096


def place(tensor: torch.Tensor, mode: Mode = "adopt", parameter: torch.Tensor | None = None) -> Place:
    dtype = tensor.dtype if parameter is None else parameter.dtype
    return Place("t", tensor.nbytes, tensor.dtype, dtype, tuple(tensor.shape), mode, 0, parameter)


class Bench:
    """A stage on a fake accelerator, and the sizes of blocks as they come and go."""

    def __init__(self, *places: Place, lands: bool = False, fills_land: bool = False) -> None:
        self.accelerator = FakeAccelerator()
        self.changes: list[int] = []
        self.layout = Layout(list(places), lands=[lands], own_bytes=OWN, block_bytes=1 << 16, fills_land=fills_land)
        backend = HostBackend(Arena().allocate) if lands else self.accelerator
        self.stage = DeviceStage([Destination(backend, None, self.changes.append, self.changes.append)], self.layout)
        self.memory = memoryview(allocate(1 << 16))

    def fill(self, *tensors: torch.Tensor, direct: bool = False) -> None:
        """Read all tensors as one chunk, copy them, and wait for that."""
        data = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)
        transfer = self.layout.transfer(0, len(tensors), 0, len(data))
        shift = 77 if direct else None
        slot = self.memory if direct or transfer.slot_bytes else None
        if direct:
            self.memory[77 : 77 + len(data)] = data
        else:
            for buffer in self.stage.buffers(transfer, slot, 0, len(data)):
                buffer[:] = data[: len(buffer)]
                data = data[len(buffer) :]
        event = self.stage.submit(transfer, slot, shift)
        if event is not None:
            event.synchronize()


@pytest.fixture
def benches() -> Generator[list[Bench], None, None]:
    made: list[Bench] = []
    yield made
    for bench in made:
        bench.accelerator.close()
        assert bench.accelerator.hazards == []


SMALL, LARGE = torch.arange(10.0), torch.arange(2000.0)


@pytest.mark.parametrize("direct", [False, True], ids=["packed", "as-in-the-file"])
@pytest.mark.parametrize("lands", [False, True], ids=["device", "host"])
def test_tensors_come_out_as_they_went_in(benches: list[Bench], *, lands: bool, direct: bool) -> None:
    bench = Bench(place(SMALL), place(LARGE), place(SMALL + 1), lands=lands)
    benches.append(bench)
    bench.fill(SMALL, LARGE, SMALL + 1, direct=direct)
    for found, expected in zip(bench.stage.take([0, 1, 2]), [SMALL, LARGE, SMALL + 1], strict=True):
        assert_same(found, expected)


def test_small_tensors_and_a_large_one_are_two_copies(benches: list[Bench]) -> None:
    bench = Bench(place(SMALL), place(LARGE), place(SMALL))
    benches.append(bench)
    bench.fill(SMALL, LARGE, SMALL)
    assert bench.stage.num_copies == bench.accelerator.num_copies == 2
    assert bench.accelerator.num_spreads == 0


def test_chunk_as_in_the_file_is_one_spread_and_the_large_copies(benches: list[Bench]) -> None:
    bench = Bench(place(SMALL), place(SMALL), place(LARGE))
    benches.append(bench)
    bench.fill(SMALL, SMALL, LARGE, direct=True)
    assert (bench.accelerator.num_copies, bench.accelerator.num_spreads, bench.stage.num_copies) == (1, 1, 2)


def test_block_goes_with_the_last_tensor_in_it(benches: list[Bench]) -> None:
    bench = Bench(place(SMALL), place(SMALL), place(LARGE))
    benches.append(bench)
    bench.fill(SMALL, SMALL, LARGE)
    assert sorted(bench.changes) == [512, 8192]
    bench.stage.take([0])
    assert len(bench.changes) == 2
    bench.stage.take([1])
    assert bench.changes[2:] == [-512]
    bench.stage.close()
    assert sum(bench.changes) == 0


def test_tensors_outlive_the_stage(benches: list[Bench]) -> None:
    for lands in (False, True):
        bench = Bench(place(SMALL), place(LARGE), lands=lands)
        benches.append(bench)
        bench.fill(SMALL, LARGE)
        (tensor,) = bench.stage.take([0])
        bench.stage.close()
        assert_same(tensor, SMALL)


def test_tensors_of_a_block_have_version_counters_of_their_own(benches: list[Bench]) -> None:
    bench = Bench(place(SMALL), place(SMALL))
    benches.append(bench)
    bench.fill(SMALL, SMALL)
    one, other = bench.stage.take([0, 1])
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    one.add_(1)
    assert (one._version, other._version) == (1, 0)
    assert_same(other, SMALL)


@pytest.mark.parametrize("direct", [False, True], ids=["packed", "as-in-the-file"])
def test_parameter_with_storage_is_written_and_noted(benches: list[Bench], *, direct: bool) -> None:
    small, large, cast = torch.zeros(10), torch.zeros(2000), torch.zeros(10, dtype=torch.float64)
    bench = Bench(place(SMALL, "fill", small), place(LARGE, "fill", large), place(SMALL, "fill", cast))
    benches.append(bench)
    assert bench.stage.touched == set()
    bench.fill(SMALL, LARGE, SMALL, direct=direct)
    assert_same(small, SMALL)
    assert_same(large, LARGE)
    assert_same(cast, SMALL.double())
    assert bench.stage.touched == {0, 1, 2}
    assert bench.changes == []
    assert small._version > 0  # autograd sees that it was written to


def test_parameter_in_host_memory_is_read_into_and_noted() -> None:
    small, large = torch.zeros(12)[2:], nn.Parameter(torch.zeros(2000))
    bench = Bench(place(SMALL, "fill", small), place(LARGE, "fill", large), lands=True, fills_land=True)
    bench.fill(SMALL, LARGE)
    assert_same(small, SMALL)
    assert_same(large.detach(), LARGE)
    assert bench.stage.touched == {0, 1}
    assert (bench.stage.num_copies, bench.changes) == (0, [])
    versions = small._version, large._version
    assert min(versions) > 0  # autograd sees that it may have been written to, and once more when it has been
    bench.stage.filled([0, 1])
    assert small._version > versions[0]
    assert large._version > versions[1]


def test_storage_that_is_read_into_outlives_the_model_and_the_stage() -> None:
    large = torch.zeros(2000)
    storage = cast("Any", StorageWeakRef)(large.untyped_storage())
    bench = Bench(place(LARGE, "fill", large), lands=True, fills_land=True)
    (buffer,) = bench.stage.buffers(bench.layout.transfer(0, 1, 0, LARGE.nbytes), None, 8, LARGE.nbytes)
    bench.stage.close()
    del bench, large
    assert not storage.expired()
    buffer[:] = bytes(len(buffer))
    del buffer
    assert storage.expired()


def test_tensor_without_bytes_is_made_on_the_device(benches: list[Bench]) -> None:
    bench = Bench(place(torch.zeros(0, 3)))
    benches.append(bench)
    (tensor,) = bench.stage.take([0])
    assert tensor.shape == (0, 3)
    assert bench.accelerator.num_allocations == 0


def test_nothing_is_there_before_the_copy(benches: list[Bench]) -> None:
    bench = Bench(place(SMALL))
    benches.append(bench)
    bench.accelerator.hold()
    transfer = bench.layout.transfer(0, 1, 0, SMALL.nbytes)
    for buffer in bench.stage.buffers(transfer, bench.memory, 0, SMALL.nbytes):
        buffer[:] = b"\1" * len(buffer)
    event = bench.stage.submit(transfer, bench.memory, None)
    (tensor,) = bench.stage.take([0])
    assert set(tensor.view(torch.uint8).tolist()) == {FRESH}
    bench.accelerator.release()
    assert event is not None
    event.synchronize()
    assert set(tensor.view(torch.uint8).tolist()) == {1}


def test_nowhere_takes_everything_and_keeps_nothing() -> None:
    """A load does not even ask: see `copies`."""
    layout = Layout([place(SMALL), place(LARGE)], lands=[False], own_bytes=OWN, block_bytes=1 << 16)
    stage = DeviceStage([Destination(NowhereBackend(), None, lambda _: None, lambda _: None)], layout)
    assert not stage.copies
    transfer = layout.transfer(0, 2, 0, SMALL.nbytes + LARGE.nbytes)
    assert stage.submit(transfer, memoryview(allocate(1 << 16)), None) is None
    assert stage.take([1])[0].is_meta


def test_blocks_are_counted_one_at_a_time() -> None:
    """By readers and by the load's thread: who counts them needs no lock."""
    weight = torch.ones(2 * OWN, dtype=torch.uint8)
    layout = Layout([place(weight)], lands=[True], own_bytes=OWN, block_bytes=1 << 16)
    was_locked: list[tuple[int, bool]] = []

    def count(num_bytes: int) -> None:
        was_locked.append((num_bytes, stage._lock.locked()))

    stage = DeviceStage([Destination(HostBackend(Arena().allocate), None, count, count)], layout)
    stage.buffers(layout.transfer(0, 1, 0, weight.nbytes), None, 0, weight.nbytes)
    stage.take([0])
    stage.close()
    stage.free([0])
    assert was_locked == [(2 * OWN, True), (-2 * OWN, True), (2 * OWN, True)]
