"""Fakes and the real things pass the same checks."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

from tests.builders import assert_same, write_in_order
from tests.fakes.accelerator import FRESH, DistantAccelerator, FakeAccelerator
from tests.fakes.clock import VirtualClock
from tests.fakes.ring import STALE, PoisonedRing
from tests.fakes.source import Disk
from weightstream.device.accelerator import AcceleratorBackend
from weightstream.device.backend import Backend, HostBackend, Spread
from weightstream.prefetch.arena import Arena
from weightstream.prefetch.checkpoint import Checkpoint, open_checkpoint
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.memory import Budget, MemoryAccount, allocate
from weightstream.prefetch.ring import Ring
from weightstream.prefetch.source import ByteRange, FileSource, Source


@pytest.fixture(
    params=[
        "host",
        "fake",
        "fake-in-virtual-time",
        pytest.param("accelerator", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Generator[Backend, None, None]:
    if request.param == "host":
        yield HostBackend(Arena().allocate)
    elif request.param == "accelerator":
        yield AcceleratorBackend(torch.device("cuda", torch.cuda.current_device()))
    else:
        paced = request.param == "fake-in-virtual-time"
        fake = FakeAccelerator(VirtualClock() if paced else None, bytes_per_s=1000 if paced else None)
        yield fake
        fake.close()
        assert fake.hazards == []


def settle(backend: Backend) -> None:
    event = backend.record()
    if event is not None:
        event.synchronize()


def in_slot(data: torch.Tensor) -> torch.Tensor:
    """Bytes in host memory as a slot has it."""
    slot = torch.frombuffer(allocate(4096), dtype=torch.uint8)
    slot[: data.numel()].copy_(data)
    return slot[: data.numel()]


class TestBackends:
    def test_block_is_bytes_on_the_device_aligned_to_256(self, backend: Backend) -> None:
        for num_bytes in (256, 1024):
            block, memory = backend.allocate(num_bytes, None)
            assert (block.dtype, block.shape, block.device) == (torch.uint8, (num_bytes,), backend.device)
            assert block.data_ptr() % 256 == 0
            assert block.untyped_storage().nbytes() == num_bytes
            assert (memory is not None) == backend.lands

    def test_reader_writes_into_a_block_where_the_backend_lands(self, backend: Backend) -> None:
        block, memory = backend.allocate(256, None)
        if memory is None:
            return
        memory[3:6] = b"abc"
        del memory
        assert block[3:6].tolist() == list(b"abc")

    def test_copy_has_happened_when_the_event_says_so(self, backend: Backend) -> None:
        block, _ = backend.allocate(512, None)
        data = torch.randint(256, (200,), dtype=torch.uint8)
        source = in_slot(data)
        backend.copy(block[100:300], source)
        settle(backend)
        source.fill_(STALE)  # from now on the slot is free
        assert_same(block[100:300].cpu(), data)

    def test_copies_happen_in_order(self, backend: Backend) -> None:
        block, _ = backend.allocate(256, None)
        for value in range(5):
            backend.copy(block[value:10], in_slot(torch.full((10 - value,), value, dtype=torch.uint8)))
        settle(backend)
        assert block[:10].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]

    def test_event_covers_what_was_submitted_before_it(self, backend: Backend) -> None:
        block, _ = backend.allocate(256, None)
        backend.copy(block[:1], in_slot(torch.tensor([1], dtype=torch.uint8)))
        first = backend.record()
        backend.copy(block[1:2], in_slot(torch.tensor([2], dtype=torch.uint8)))
        if first is not None:
            first.synchronize()
        assert block[0] == 1
        settle(backend)
        assert block[1] == 2

    def test_spread_distributes_and_casts(self, backend: Backend) -> None:
        block, _ = backend.allocate(1024, None)
        floats = torch.tensor([1.5, -2.25, 3e5])
        halves = torch.tensor([0.5, 7.0], dtype=torch.bfloat16)
        numbers = torch.tensor([1, 2, 3], dtype=torch.uint8)
        # As in a file: one behind the other, aligned to nothing.
        source = in_slot(torch.cat([numbers, floats.view(torch.uint8), halves.view(torch.uint8)]))
        as_floats, as_half, as_double = (
            block[0:12].view(torch.float32),
            block[256:260].view(torch.float16),
            block[512:536].view(torch.float64),
        )
        backend.spread(
            source,
            [
                Spread(0, 3, torch.uint8, block[768:771]),
                Spread(3, 12, torch.float32, as_floats),
                Spread(3, 12, torch.float32, as_double),
                Spread(15, 4, torch.bfloat16, as_half),
            ],
        )
        settle(backend)
        source.fill_(STALE)
        assert_same(block[768:771].cpu(), numbers)
        assert_same(as_floats.cpu(), floats)
        assert_same(as_double.cpu(), floats.double())
        assert_same(as_half.cpu(), halves.half())

    def test_run_calls_the_action_once(self, backend: Backend) -> None:
        calls: list[int] = []
        backend.follow(None)
        backend.run(lambda: calls.append(1), None)
        assert calls == [1]

    def test_pin_returns_what_undoes_it_or_none(self, backend: Backend) -> None:
        unpin = backend.pin(allocate(4096))
        assert (unpin is not None) == backend.pinnable
        if unpin is not None:
            unpin()


class TestFakeAccelerator:
    def test_nothing_is_copied_while_it_is_held(self) -> None:
        fake = FakeAccelerator()
        fake.hold()
        block, _ = fake.allocate(256, None)
        fake.copy(block[:1], in_slot(torch.tensor([1], dtype=torch.uint8)))
        fake.copy(block[1:2], in_slot(torch.tensor([2], dtype=torch.uint8)))
        assert block[:2].tolist() == [FRESH, FRESH]
        fake.release(1)
        fake.wait_done(1)
        assert block[:2].tolist() == [1, FRESH]
        fake.close()
        assert block[:2].tolist() == [1, 2]
        assert (fake.num_copies, fake.num_spreads, fake.num_allocations, fake.num_done) == (2, 0, 1, 2)

    def test_source_that_changes_before_the_copy_is_a_hazard(self) -> None:
        fake = FakeAccelerator()
        fake.hold()
        block, _ = fake.allocate(256, None)
        source = in_slot(torch.arange(8, dtype=torch.uint8))
        fake.copy(block[:8], source)
        source[2:4] = STALE
        fake.close()
        assert [hazard.operation for hazard in fake.hazards] == [1]
        assert block[:8].tolist() == [0, 1, STALE, STALE, 4, 5, 6, 7]

    def test_distant_one_checks_sources_and_keeps_nothing(self) -> None:
        fake = DistantAccelerator()
        fake.hold()
        block, _ = fake.allocate(256, None)
        sources = [in_slot(torch.arange(8, dtype=torch.uint8)) for _ in range(3)]
        fake.copy(block[:8], sources[0])
        fake.copy(block[:8], sources[1])
        fake.spread(sources[2], [Spread(0, 8, torch.uint8, block[:8])])
        sources[1][0] = STALE
        sources[2][0] = STALE
        fake.close()
        assert [hazard.operation for hazard in fake.hazards] == [2, 3]
        assert (fake.num_copies, fake.num_spreads, fake.num_allocations) == (2, 1, 1)
        assert not block.any()

    def test_refused_pinning_is_none(self) -> None:
        fake = FakeAccelerator(refuses_pinning=True)
        assert fake.pin(allocate(4096)) is None
        assert fake.num_pins == 0


OpenSource = Callable[[Checkpoint], Source]


@pytest.fixture(params=["file", "disk", "paced-disk", "direct-disk"])
def open_source(request: pytest.FixtureRequest) -> Generator[OpenSource, None, None]:
    opened: list[Source] = []
    clock = VirtualClock()

    def make(checkpoint: Checkpoint) -> Source:
        disk = Disk(
            clock,
            bytes_per_s=1000 if request.param == "paced-disk" else None,
            io="direct" if request.param == "direct-disk" else "buffered",
        )
        opener = FileSource if request.param == "file" else disk.open
        opened.append(
            opener(
                checkpoint, PrefetchConfig(), pause=lambda _: True, on_retry=lambda: None, on_fallback=lambda _: None
            )
        )
        return opened[-1]

    with clock.participate():
        yield make
        for source in opened:
            source.close()


class TestSources:
    def test_bytes_arrive_in_the_buffers_in_order(self, open_source: OpenSource, tmp_path: Path) -> None:
        data = torch.randint(256, (10_000,), dtype=torch.uint8)
        with open_checkpoint(write_in_order(tmp_path, {"a": data})) as checkpoint:
            begin = checkpoint.tensors["a"].begin
            source = open_source(checkpoint)
            parts = [bytearray(n) for n in (1, 4096, 5)]
            source.read(ByteRange(0, begin + 17, begin + 17 + 4102), [memoryview(part) for part in parts])
        assert b"".join(parts) == data[17 : 17 + 4102].numpy().tobytes()

    def test_direct_read_brings_whole_pages(self, open_source: OpenSource, tmp_path: Path) -> None:
        data = torch.randint(256, (10_000,), dtype=torch.uint8)
        with open_checkpoint(write_in_order(tmp_path, {"a": data})) as checkpoint:
            begin = checkpoint.tensors["a"].begin
            source = open_source(checkpoint)
            slot = memoryview(allocate(4 * 4096))
            source.read_direct(ByteRange(0, begin + 5000, begin + 10_000), slot)
        shift = (begin + 5000) % 4096
        assert bytes(slot[shift : shift + 5000]) == data[5000:].numpy().tobytes()


class TestDisk:
    def test_reads_come_one_after_the_other(self) -> None:
        clock = VirtualClock()
        disk = Disk(clock, bytes_per_s=8)
        ends: list[float] = []

        def read() -> None:
            disk.transfer(16)
            ends.append(clock.now())

        with clock.participate():
            threads = [clock.spawn(read, f"reader-{i}") for i in range(3)]
        for thread in threads:
            thread.join()
        assert ends == [2, 4, 6]

    def test_read_fails_where_it_was_told_to(self) -> None:
        disk = Disk()
        disk.fail_at(1, OSError("broken"))
        disk.transfer(1)
        with pytest.raises(OSError, match="broken"):
            disk.transfer(1)
        disk.transfer(1)
        assert (disk.num_begun, disk.num_bytes_begun) == (3, 3)


@pytest.mark.parametrize("kind", [Ring, PoisonedRing], ids=["ring", "poisoned-ring"])
class TestRings:
    def test_slot_is_handed_out_once_until_it_comes_back(self, kind: type[Ring]) -> None:
        freed: list[int] = []
        ring = kind(4096, Budget(3 * 4096), MemoryAccount(), freed.append)
        ring.grow(2)
        first, second = ring.acquire_nowait(), ring.acquire_nowait()
        assert first is not None
        assert second is not None
        assert ring.acquire_nowait() is None
        first.view[:3] = b"abc"
        ring.release(first)
        assert freed == [1]
        assert ring.acquire_nowait() is first
        ring.write_off(second)
        assert ring.statistics().num_written_off == 1
        assert ring.acquire_nowait() is None
        ring.recover(second)
        assert freed == [1, 1]
        assert ring.acquire_nowait() is second


def test_poisoned_ring_overwrites_what_is_given_back() -> None:
    ring = PoisonedRing(4096, Budget(4096), MemoryAccount())
    ring.grow(1)
    slot = ring.acquire_nowait()
    assert slot is not None
    slot.view[:3] = b"abc"
    ring.release(slot)
    assert bytes(slot.view) == bytes([STALE]) * 4096
