"""Parameters in host memory are read into without a copy, and nothing is written to them after the load has ended."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.builders import assert_same, bytes_of, flip, leaves_nothing, write_in_order, write_sums
from tests.fakes.rig import KIB, Rig
from tests.models import SmallNet, tensors_of
from weightstream.errors import IntegrityError, LoadCancelledError, LoadTimeoutError, PlacementError, ReadError
from weightstream.prefetch.filesystem import FileSystem
from weightstream.scheduler import reading
from weightstream.scheduler.handle import LoadHandle
from weightstream.scheduler.report import LoadReport

MakeRig = Callable[..., Rig]
Saved = tuple[dict[str, torch.Tensor], Path]


@pytest.fixture(name="saved")
def fixture_saved(tmp_path: Path) -> Saved:
    tensors = tensors_of(SmallNet(), seed=1)
    return tensors, write_in_order(tmp_path / "checkpoint", tensors, num_shards=2)


def assert_loaded(model: SmallNet, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


def contents(model: SmallNet) -> dict[str, bytes]:
    return {name: bytes_of(tensor) for name, tensor in model.state_dict().items()}


async def load(rig: Rig, model: SmallNet, path: Path, *, num_slots: int) -> LoadReport:
    """Load, and see how many slots that took, of three that there may be."""
    async with rig.loader(num_slots=3, strategy="stream") as loader:
        report = await loader.load(model, path)
        assert (rig.ring.num_slots, rig.ring.num_free) == (num_slots, num_slots)
    return report


async def until_stopped(handle: LoadHandle) -> None:
    while handle._job._stop is None:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0)


async def test_what_is_in_the_page_cache_needs_no_slot_and_no_copy(make_rig: MakeRig, saved: Saved) -> None:
    rig = make_rig("host")
    rig.disk.is_cached = True
    model = SmallNet()
    addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
    report = await load(rig, model, saved[1], num_slots=0)
    assert_loaded(model, saved[0])
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == addresses
    assert report.num_copies == 0


@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize("file_system", ["disk", "network", "unknown"])
async def test_what_comes_from_a_disk_or_another_machine_passes_through_a_slot(
    make_rig: MakeRig, saved: Saved, io: str, file_system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what the page cache has, as long as that may have to ask somebody; nobody copies on the load's thread."""

    def answer(_: int) -> FileSystem:
        if file_system == "unknown":
            raise OSError("?")
        return FileSystem("network", "nfs")

    if file_system != "disk":
        monkeypatch.setattr(reading, "file_system_of", answer)
    rig = make_rig("host", io=io)
    rig.disk.is_cached = file_system != "disk"
    model = SmallNet()
    num_before = rig.disk.num_begun
    report = await load(rig, model, saved[1], num_slots=3)
    assert_loaded(model, saved[0])
    assert report.num_copies == rig.disk.num_begun - num_before > 0


@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "cold"])
async def test_tensor_that_was_saved_for_backward_is_seen_to_have_changed(
    make_rig: MakeRig, saved: Saved, *, is_cached: bool
) -> None:
    rig = make_rig("host")
    rig.disk.is_cached = is_cached
    model = SmallNet()
    losses = [(model.large.weight**2).sum(), (model.scale**2).sum()]
    await load(rig, model, saved[1], num_slots=0 if is_cached else 3)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()  # type: ignore[no-untyped-call]


async def test_tensor_that_is_saved_while_it_is_written_to_is_seen_to_have_changed(
    make_rig: MakeRig, saved: Saved
) -> None:
    rig = make_rig("host")
    rig.disk.is_cached = True
    model = SmallNet()
    gate = rig.disk.stop_at(0)
    async with rig.loader(workers=1) as loader:
        handle = await loader.start(model, saved[1])
        gate.wait_reached()
        filled = [one for one in model.parameters() if one.requires_grad and one.numel()]
        losses = [(parameter**2).sum() for parameter in filled]
        gate.open()
        await handle.wait()
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()  # type: ignore[no-untyped-call]


async def test_preload_changes_nothing_before_all_has_been_read(make_rig: MakeRig, saved: Saved) -> None:
    rig = make_rig("host")
    rig.disk.is_cached = True
    await load(rig, SmallNet(), saved[1], num_slots=0)
    count = rig.disk.num_begun
    model = SmallNet()
    before = contents(model)
    gate = rig.disk.stop_at(2 * count - 1, is_stuck=True)
    async with rig.loader(workers=1, strategy="preload") as loader:
        handle = await loader.start(model, saved[1])
        gate.wait_reached()
        rig.clock.wait_idle()
        assert contents(model) == before
        gate.open()
        await handle.wait()
    assert_loaded(model, saved[0])


@pytest.mark.parametrize("io", ["buffered", "direct"])
async def test_read_that_is_given_up_does_not_write_to_parameters_when_it_returns(
    make_rig: MakeRig, saved: Saved, io: str
) -> None:
    rig = make_rig("host", io=io)
    model = SmallNet()
    gate = rig.disk.stop_at(0, is_stuck=True)
    async with rig.loader(workers=1, num_slots=3) as loader:
        handle = await loader.start(model, saved[1])
        gate.wait_reached()
        await handle.cancel()
        assert rig.clock.now() == 0.5
        before = contents(model)
        gate.open()
    assert rig.ring.num_written_off == 0  # it has come back
    assert contents(model) == before


class TestReadIntoParameters:
    """One that is in the kernel writes to the model's memory: nobody can say when, and nobody can call it back."""

    async def test_is_waited_for(self, make_rig: MakeRig, saved: Saved) -> None:
        rig = make_rig("host")
        rig.disk.is_cached = True
        model = SmallNet()
        gate = rig.disk.stop_at(0)
        async with rig.loader(workers=1) as loader:
            handle = await loader.start(model, saved[1])
            gate.wait_reached()
            cancelling = asyncio.create_task(handle.cancel())
            await until_stopped(handle)
            gate.open()
            await cancelling
            before = contents(model)
            with pytest.raises(LoadCancelledError) as caught:
                await handle.wait()
        changed = [name for name in before if before[name] == bytes_of(saved[0][name]) and before[name]]
        assert changed
        assert set(changed) <= set(caught.value.partly_written)
        assert contents(model) == before

    async def test_is_waited_for_longer_than_others(self, make_rig: MakeRig, saved: Saved) -> None:
        """Not half a second after the load has failed, but until it is overdue."""
        rig = make_rig("host")
        rig.disk.is_cached = True
        gate = rig.disk.stop_at(0, is_stuck=True)
        async with rig.loader(workers=1, stall_s=60.0, scheduler={"timeout_s": 1.0}) as loader:
            with pytest.raises(LoadTimeoutError):
                await loader.load(SmallNet(), saved[1])
            assert rig.clock.now() == 60.0
            gate.open()

    async def test_says_so_if_it_never_returns(
        self, make_rig: MakeRig, saved: Saved, caplog: pytest.LogCaptureFixture
    ) -> None:
        rig = make_rig("host")
        rig.disk.is_cached = True
        gate = rig.disk.stop_at(0, is_stuck=True)
        async with rig.loader(workers=1, stall_s=60.0) as loader:
            with caplog.at_level(logging.WARNING), pytest.raises(LoadTimeoutError) as caught:
                await loader.load(SmallNet(), saved[1])
            gate.open()
        assert "1 of them may still write to parameters" in caplog.text
        assert caught.value.partly_written


async def test_what_is_in_a_slot_is_not_copied_once_the_load_is_stopped(make_rig: MakeRig, saved: Saved) -> None:
    rig = make_rig("host", read_bytes_per_s=100 * KIB)
    model = SmallNet()
    before = contents(model)
    gate = rig.disk.stop_at(0)  # in the slot, and not copied yet
    async with rig.loader(workers=1, num_slots=3) as loader:
        handle = await loader.start(model, saved[1])
        gate.wait_reached()
        cancelling = asyncio.create_task(handle.cancel())
        await until_stopped(handle)
        gate.open()
        await cancelling
        with pytest.raises(LoadCancelledError) as caught:
            await handle.wait()
    assert contents(model) == before
    assert caught.value.partly_written == ()


# What goes wrong while the model's own memory is read into


@pytest.fixture(name="cached")
def fixture_cached(make_rig: MakeRig) -> Rig:
    rig = make_rig("host")
    rig.disk.is_cached = True
    return rig


async def test_short_and_failing_reads_go_on_where_they_stopped(
    cached: Rig, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, numbers = os.preadv, iter(range(10**6))

    def poor(fd: int, buffers: list[memoryview], position: int) -> int:
        number = next(numbers)
        if number in (2, 5):
            raise OSError(errno.EIO, "broken for a moment")
        first = next(buffer for buffer in buffers if len(buffer))
        return preadv(fd, [first[: max(1, len(first) // 3)]], position)

    monkeypatch.setattr(os, "preadv", poor)
    model = SmallNet()
    async with cached.loader(workers=1, strategy="stream") as loader:
        report = await loader.load(model, saved[1])
    assert_loaded(model, saved[0])
    assert report.num_retries == 2
    assert cached.ring.num_slots == 0


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
@pytest.mark.parametrize("fault", ["read fails", "file shrinks", "file is rewritten"])
async def test_what_was_written_before_a_fault_is_named_and_the_next_load_works(
    cached: Rig, saved: Saved, fault: str, part: float
) -> None:
    tensors, path = saved
    await load(cached, SmallNet(), path, num_slots=0)
    count = cached.disk.num_begun
    gate = cached.disk.stop_at(count + int(part * (count - 1)))
    model = SmallNet()
    before = contents(model)
    files = {file: file.read_bytes() for file in path.glob("*.safetensors")}
    async with cached.loader(workers=1) as loader:
        handle = await loader.start(model, path)
        gate.wait_reached()
        if fault == "read fails":
            cached.disk.fail_at(count + int(part * (count - 1)), ReadError("gone"))
        for file, raw in files.items():
            if fault == "file shrinks":
                os.truncate(file, len(raw) // 2)
            if fault == "file is rewritten":
                file.write_bytes(bytes(len(raw)))
                os.utime(file, ns=(0, 0))
        gate.open()
        with pytest.raises((ReadError, IntegrityError)) as caught:
            await handle.wait()
        changed = {name for name, raw in contents(model).items() if raw != before[name]}
        assert changed <= set(caught.value.partly_written)
        assert part == 0.0 or changed
        for file, raw in files.items():
            file.write_bytes(raw)
        await loader.load(model, path)
    assert_loaded(model, tensors)


async def test_wrong_digest_is_seen_in_the_memory_of_the_parameters(cached: Rig, saved: Saved) -> None:
    """They are hashed where they are: there are no slots."""
    tensors, path = saved
    write_sums(path)
    model = SmallNet()
    async with cached.loader(workers=1, verify="sha256", strategy="stream") as loader:
        report = await loader.load(model, path)
        assert_loaded(model, tensors)
        assert report.verified == "sha256 (manifest)"
        last = max(path.glob("*.safetensors"))
        flip(last, last.stat().st_size - 1)
        model = SmallNet()
        before = contents(model)
        with pytest.raises(IntegrityError, match="SHA-256") as caught:
            await loader.load(model, path)
        assert cached.ring.num_slots == 0
    changed = {name for name, raw in contents(model).items() if raw != before[name]}
    assert changed
    assert changed <= set(caught.value.partly_written)


async def test_atomic_load_reads_nothing_into_parameters(cached: Rig, saved: Saved) -> None:
    tensors, path = saved
    gate = cached.disk.stop_at(1)
    model = SmallNet()
    before = contents(model)
    async with cached.loader(workers=1, commit="atomic", strategy="stream") as loader:
        handle = await loader.start(model, path)
        gate.wait_reached()
        assert contents(model) == before
        await asyncio.gather(handle.cancel(), asyncio.to_thread(gate.open))
        with pytest.raises(LoadCancelledError) as caught:
            await handle.wait()
        assert caught.value.partly_written == ()
        assert contents(model) == before
        await loader.load(model, path)
    assert_loaded(model, tensors)


class Memory(bytearray):
    """Memory of a parameter that says when it goes."""


async def test_memory_lives_until_a_read_that_was_given_up_returns(cached: Rig, tmp_path: Path) -> None:
    """Whatever becomes of the model: the kernel still writes to it."""
    tensors = {"a": torch.arange(1024.0)}
    path = write_in_order(tmp_path / "c", tensors)
    memory = Memory(4096)
    gone = weakref.ref(memory)
    model = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.frombuffer(memory, dtype=torch.float32))})
    del memory
    gate = cached.disk.stop_at(0, is_stuck=True)
    with leaves_nothing():
        async with cached.loader(workers=1, stall_s=7.0) as loader:
            with pytest.raises(LoadTimeoutError) as caught:
                await loader.load(model, path)
            assert caught.value.partly_written == ("a",)
            del model, caught
            gc.collect()
            found = gone()
            assert found is not None
            view = memoryview(found)
            assert bytes(view) == bytes(4096)
            cached.disk.closed.clear()
            gate.open()
            assert cached.disk.closed.wait(30)
            assert bytes(view) == bytes_of(tensors["a"])  # it did write
            del view, found
    gc.collect()
    assert gone() is None


async def test_no_load_writes_where_a_read_that_was_given_up_may_still_write(cached: Rig, tmp_path: Path) -> None:
    """Its late bytes would overwrite those of the next load."""
    path = write_in_order(tmp_path / "c", {"a": torch.arange(1024.0)})
    other = write_in_order(tmp_path / "d", {"a": torch.zeros(1024)})
    model = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(1024))})
    part = torch.nn.ParameterDict({"a": torch.nn.Parameter(model["a"].data[512:])})
    gate = cached.disk.stop_at(0, is_stuck=True)
    async with cached.loader(workers=1, stall_s=7.0) as loader:
        with pytest.raises(LoadTimeoutError):
            await loader.load(model, path)
        for tensors, checkpoint in ((model, other), (part, other)):
            async with cached.loader(workers=1) as second:  # of another Loader, too
                with pytest.raises(PlacementError, match="may still write to this parameter's memory") as caught:
                    await second.load(tensors, checkpoint)
                assert caught.value.tensor == "a"
        assert torch.equal(model["a"], torch.ones(1024))
        elsewhere = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(1024))})
        await loader.load(elsewhere, other)
        assert torch.equal(elsewhere["a"], torch.zeros(1024))
        cached.disk.closed.clear()
        gate.open()
        assert cached.disk.closed.wait(30)
        assert torch.equal(model["a"], torch.arange(1024.0)), "it did write"
        await loader.load(model, other)
        assert torch.equal(model["a"], torch.zeros(1024))


async def test_model_made_for_inference_alone_is_loaded(cached: Rig, saved: Saved) -> None:
    """Its tensors have no versions to count."""
    with torch.inference_mode():
        model = SmallNet()
    await load(cached, model, saved[1], num_slots=0)
    assert_loaded(model, saved[0])
