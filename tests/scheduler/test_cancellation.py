"""Loads that end before their time leave nothing behind, and what comes after them works."""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from tests.builders import assert_same, bytes_of, leaves_nothing, write_in_order
from tests.fakes.rig import KIB, Rig
from tests.models import SmallNet, tensors_of
from weightstream.errors import LoadCancelledError, LoadTimeoutError, MemoryBudgetError, ReadError
from weightstream.scheduler.handle import LoadHandle

MakeRig = Callable[..., Rig]
Saved = tuple[dict[str, torch.Tensor], Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    tensors = tensors_of(SmallNet())
    return tensors, write_in_order(tmp_path / "checkpoint", tensors, num_shards=2)


def on_meta() -> SmallNet:
    with torch.device("meta"):
        return SmallNet()


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """The model has the very tensors that it had, on meta."""
    after = contents(model)
    assert after.keys() == before.keys()
    assert all(after[name] is tensor and tensor.is_meta for name, tensor in before.items())


def assert_loaded(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


def assert_all_free(rig: Rig, *, num_written_off: int = 0) -> None:
    found = rig.ring
    assert (found.num_free, found.num_written_off) == (found.num_slots - num_written_off, num_written_off)


def assert_no_tasks() -> None:
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def until_stopped(handle: LoadHandle) -> None:
    """Let the event loop run until the load has been asked to end. Nothing public says so."""
    while handle._job._stop is None:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0)


async def num_reads(rig: Rig, path: Path) -> int:
    """How many reads a load takes; those that come now are counted from here on."""
    async with rig.loader() as loader:
        await loader.load(on_meta(), path)
    return rig.disk.num_begun


reads = pytest.mark.parametrize("part", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])


@reads
async def test_cancelled_while_a_chunk_is_read(rig: Rig, saved: Saved, part: float) -> None:
    tensors, path = saved
    count = await num_reads(rig, path)
    gate = rig.disk.stop_at(count + int(part * (count - 1)))
    model = on_meta()
    before = contents(model)
    with leaves_nothing():
        async with rig.loader(workers=1, num_slots=3) as loader:
            handle = await loader.start(model, path)
            gate.wait_reached()
            cancelling = asyncio.create_task(handle.cancel())
            await until_stopped(handle)
            gate.open()
            await cancelling

            with pytest.raises(LoadCancelledError):
                await handle.wait()
            with pytest.raises(LoadCancelledError):
                await handle.ready()
            assert handle.progress.state == "failed"
            assert_untouched(model, before)
            assert_all_free(rig)
            assert rig.disk.num_open == 0
            assert rig.disk.num_begun == count + int(part * (count - 1)) + 1  # nothing was read after the chunk in hand

            await loader.load(model, path)
            assert_loaded(model, tensors)
    assert_no_tasks()


@reads
async def test_cancelled_while_a_chunk_is_copied(make_rig: MakeRig, saved: Saved, part: float) -> None:
    rig = make_rig("fake")
    tensors, path = saved
    async with rig.loader() as loader:
        num_copies = (await loader.load(on_meta(), path)).num_copies
    done = int(part * (num_copies - 1))
    model = on_meta()
    before = contents(model)
    rig.accelerator.hold()
    rig.accelerator.release(done)
    with leaves_nothing():
        async with rig.loader(workers=1, num_slots=3) as loader:
            handle = await loader.start(model, path)
            rig.accelerator.wait_submitted(num_copies + done + 1)
            cancelling = asyncio.create_task(handle.cancel())
            await until_stopped(handle)
            rig.clock.wait_idle()
            assert not cancelling.done()  # copies in flight are waited for, however long they take
            assert rig.ring.num_free < rig.ring.num_slots
            rig.accelerator.release()
            await cancelling

            assert_untouched(model, before)
            assert_all_free(rig)
            await loader.load(model, path)
            assert_loaded(model, tensors)
    assert_no_tasks()


async def test_cancelled_task_cancels_its_load(rig: Rig, saved: Saved) -> None:
    tensors, path = saved
    model = on_meta()
    before = contents(model)
    gate = rig.disk.stop_at(2)
    with leaves_nothing():
        async with rig.loader(num_slots=3) as loader:
            task = asyncio.create_task(loader.load(model, path))
            await asyncio.sleep(0)
            gate.wait_reached()
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()  # it waits for the read in hand
            gate.open()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert_untouched(model, before)
            assert_all_free(rig)
            await loader.load(model, path)
            assert_loaded(model, tensors)


async def test_leaving_the_loader_cancels_what_runs(rig: Rig, saved: Saved) -> None:
    _, path = saved
    models = [on_meta(), on_meta()]
    before = [contents(model) for model in models]
    gate = rig.disk.stop_at(2)
    with leaves_nothing():
        loader = await rig.loader(workers=1, num_slots=3).__aenter__()  # the one worker waits at the gate
        handles = [await loader.start(model, path) for model in models]
        gate.wait_reached()
        leaving = asyncio.create_task(loader.__aexit__(None, None, None))  # in another task than it was entered in
        for handle in handles:
            await until_stopped(handle)
        assert not leaving.done()
        gate.open()
        await leaving
        for handle in handles:
            with pytest.raises(LoadCancelledError):
                await handle.wait()
    for model, tensors in zip(models, before, strict=True):
        assert_untouched(model, tensors)
    assert_no_tasks()


async def test_exception_inside_the_loader_passes_through(rig: Rig, saved: Saved) -> None:
    _, path = saved
    model = on_meta()
    with leaves_nothing(), pytest.raises(ZeroDivisionError):  # noqa: PT012 - it is raised inside
        async with rig.loader() as loader:
            await loader.start(model, path)
            raise ZeroDivisionError
    assert_no_tasks()


async def test_cancelled_waiter_leaves_the_load_alone(rig: Rig, saved: Saved) -> None:
    tensors, path = saved
    model = on_meta()
    gate = rig.disk.stop_at(1)
    async with rig.loader() as loader:
        handle = await loader.start(model, path)
        waiters = [asyncio.create_task(handle.wait()) for _ in range(2)]
        ready = [asyncio.create_task(handle.ready()) for _ in range(2)]
        gate.wait_reached()
        await asyncio.sleep(0)
        waiters[0].cancel()
        ready[0].cancel()
        await asyncio.wait([waiters[0], ready[0]])
        gate.open()
        report = await waiters[1]
        await ready[1]
    assert report.num_tensors == len(tensors)
    assert_loaded(model, tensors)


async def test_cancel_after_the_end_does_nothing(rig: Rig, saved: Saved) -> None:
    tensors, path = saved
    model = on_meta()
    async with rig.loader() as loader:
        handle = await loader.start(model, path)
        report = await handle.wait()
        await handle.cancel()
        assert await handle.wait() is report
    assert_loaded(model, tensors)


async def test_failed_load_leaves_its_sibling_alone(rig: Rig, saved: Saved) -> None:
    tensors, path = saved
    models = [on_meta(), on_meta()]
    before = contents(models[1])
    gate = rig.disk.stop_at(0, is_stuck=True)
    error = ReadError("the disk is broken")
    rig.disk.fail_at(1, error)  # one reader, two loads in turn: the second load's first read
    with leaves_nothing():
        async with rig.loader(workers=1) as loader:
            good = await loader.start(models[0], path)
            gate.wait_reached()
            bad = await loader.start(models[1], path)
            rig.clock.wait_idle()  # until both loads wait for the one reader
            gate.open()
            with pytest.raises(ReadError) as caught:
                await bad.wait()
            assert caught.value is error
            await good.wait()
            assert_loaded(models[0], tensors)
            assert_untouched(models[1], before)
            assert_all_free(rig)
            await loader.load(models[1], path)
            assert_loaded(models[1], tensors)
    assert_no_tasks()


async def test_cancelled_sibling_leaves_the_other_alone(rig: Rig, saved: Saved) -> None:
    tensors, path = saved
    models = [on_meta(), on_meta()]
    gate = rig.disk.stop_at(0)
    async with rig.loader(workers=1) as loader:
        first = await loader.start(models[0], path)
        gate.wait_reached()
        second = await loader.start(models[1], path)
        cancelling = asyncio.create_task(first.cancel())
        await until_stopped(first)
        gate.open()
        await cancelling
        await second.wait()
    assert_loaded(models[1], tensors)
    assert models[0].scale.is_meta


async def test_cancelled_load_in_place_names_what_it_has_written(rig: Rig, saved: Saved) -> None:
    _, path = saved
    count = await num_reads(rig, path)
    model = SmallNet()
    before = {name: bytes_of(tensor) for name, tensor in model.state_dict().items()}
    gate = rig.disk.stop_at(count + 8)
    async with rig.loader(workers=1, num_slots=4) as loader:
        handle = await loader.start(model, path)
        gate.wait_reached()
        cancelling = asyncio.create_task(handle.cancel())
        await until_stopped(handle)
        gate.open()
        await cancelling
        with pytest.raises(LoadCancelledError) as caught:
            await handle.wait()
    changed = {name for name, tensor in model.state_dict().items() if bytes_of(tensor) != before[name]}
    assert changed
    assert changed <= set(caught.value.partly_written) < before.keys()
    assert caught.value.partly_written[0] in str(caught.value)


class TestStuckRead:
    async def test_is_given_up_with_its_slot(
        self, make_rig: MakeRig, saved: Saved, caplog: pytest.LogCaptureFixture
    ) -> None:
        rig = make_rig("fake")
        tensors, path = saved
        model = on_meta()
        before = contents(model)
        gate = rig.disk.stop_at(3, is_stuck=True)
        with leaves_nothing():
            async with rig.loader(workers=1, num_slots=3) as loader:
                handle = await loader.start(model, path)
                gate.wait_reached()
                with caplog.at_level(logging.WARNING):
                    await handle.cancel()
                assert "1 reads did not return" in caplog.text
                assert rig.clock.now() == 0.5  # what a read in hand is given
                assert_untouched(model, before)
                assert_all_free(rig, num_written_off=1)

                report = await loader.load(model, path)  # with two slots, and with a new reader
                assert_loaded(model, tensors)
                assert len(report.fallbacks) == 1
                assert "1 slots are lost" in report.fallbacks[0]
                gate.open()  # it comes back at last, into memory that nobody looks at
            assert_loaded(model, tensors)
        assert_no_tasks()

    async def test_does_not_keep_the_loader_from_closing(self, make_rig: MakeRig, saved: Saved) -> None:
        rig = make_rig("fake")
        _, path = saved
        gate = rig.disk.stop_at(0, is_stuck=True)
        with leaves_nothing():
            async with rig.loader(workers=1, num_slots=3) as loader:
                await loader.start(on_meta(), path)
                gate.wait_reached()
            gate.open()

    async def test_can_cost_all_slots(self, make_rig: MakeRig, saved: Saved) -> None:
        rig = make_rig("fake")
        _, path = saved
        gates = [rig.disk.stop_at(read, is_stuck=True) for read in range(2)]
        async with rig.loader(workers=2, num_slots=2) as loader:
            handle = await loader.start(on_meta(), path)
            for gate in gates:
                gate.wait_reached()
            await handle.cancel()
            with pytest.raises(MemoryBudgetError, match="host_memory"):
                await loader.load(on_meta(), path)
            for gate in gates:
                gate.open()

    async def test_into_a_parameter_s_memory_does_no_harm(self, make_rig: MakeRig, saved: Saved) -> None:
        """On the host there is no slot: the block is let go of, and the next load has another one."""
        rig = make_rig("host")
        tensors, path = saved
        model = on_meta()
        before = contents(model)
        gate = rig.disk.stop_at(0, is_stuck=True)
        async with rig.loader(workers=1) as loader:
            handle = await loader.start(model, path)
            gate.wait_reached()
            await handle.cancel()
            assert_untouched(model, before)
            await loader.load(model, path)
            gate.open()
        assert_loaded(model, tensors)


class TestTimeout:
    async def test_ends_the_load(self, rig: Rig, saved: Saved, make_rig: MakeRig) -> None:
        _, path = saved
        slow = make_rig(rig.device, io=rig.io, read_bytes_per_s=64 * KIB * 4)  # a chunk takes 0.25 s at most
        model = on_meta()
        before = contents(model)
        async with slow.loader(workers=1, scheduler={"timeout_s": 2.1}) as loader:
            with pytest.raises(LoadTimeoutError, match=r"at most 2.1 s, found \d+ of \d+ bytes"):
                await loader.load(model, path)
            assert 2.1 <= slow.clock.now() <= 2.1 + 0.25
            assert_untouched(model, before)
            assert_all_free(slow)

    async def test_that_is_not_reached_changes_nothing(self, rig: Rig, saved: Saved) -> None:
        tensors, path = saved
        model = on_meta()
        async with rig.loader(scheduler={"timeout_s": 100.0}) as loader:
            await loader.load(model, path)
        assert_loaded(model, tensors)


class TestMisuse:
    async def test_loader_that_is_not_open(self, rig: Rig, saved: Saved) -> None:
        _, path = saved
        loader = rig.loader()
        for _ in range(2):
            for call in (loader.load(on_meta(), path), loader.start(on_meta(), path), loader.warm(path)):
                with pytest.raises(RuntimeError, match="not open"):
                    await call
            with pytest.raises(RuntimeError, match="not open"):
                loader.stream(path)
            if loader._supervisor is None:
                async with loader:
                    pass

    async def test_loader_that_was_entered_before(self, rig: Rig) -> None:
        loader = rig.loader()
        async with loader:
            with pytest.raises(RuntimeError, match="entered before"):
                await loader.__aenter__()
        with pytest.raises(RuntimeError, match="entered before"):
            await loader.__aenter__()

    async def test_no_checkpoint_is_named(self, rig: Rig) -> None:
        async with rig.loader() as loader:
            with pytest.raises(ValueError, match="no checkpoint"):
                await loader.load(on_meta())

    async def test_loader_in_a_forked_process(self, rig: Rig, saved: Saved) -> None:
        _, path = saved
        async with rig.loader() as loader:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: what is tested here
                child = os.fork()
            if child == 0:
                code = 1
                try:
                    loader.stream(path)
                except RuntimeError as error:
                    code = 42 if "forked" in str(error) else 2
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)  # noqa: ASYNC222 - it ends at once
            assert os.waitstatus_to_exitcode(status) == 42
            model = on_meta()
            await loader.load(model, path)  # the parent's loader is as good as before
            assert not cast("torch.Tensor", model.scale).is_meta


@pytest.mark.parametrize("commit", ["progressive", "atomic"])
@pytest.mark.parametrize("where", ["meta", "cpu"])
@pytest.mark.parametrize("strategy", ["stream", "preload", "direct"])
async def test_time_that_modules_take_to_load_themselves_counts_whatever_the_strategy(
    make_rig: MakeRig, tmp_path: Path, strategy: str, where: str, commit: str
) -> None:
    rig = make_rig("host")
    with torch.device(where):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
    taken: list[str] = []

    def take_a_second(_: nn.Module, __: object, prefix: str, *___: object) -> None:
        taken.append(prefix)
        rig.clock.sleep(1.0)

    for layer in model:
        cast("Any", layer).register_load_state_dict_pre_hook(take_a_second)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = write_in_order(tmp_path, tensors_of(model))
    async with rig.loader(strategy=strategy, commit=commit, scheduler={"timeout_s": 3.5}) as loader:
        with pytest.raises(LoadTimeoutError, match=r"at most 3\.5 s") as caught:
            await loader.load(model, path)
    assert taken == ["0.", "1.", "2.", "3."]
    if where == "meta" or commit == "atomic":
        assert not caught.value.partly_written
        for name, tensor in model.state_dict().items():
            assert tensor.is_meta == before[name].is_meta
            assert tensor.is_meta or torch.equal(tensor, before[name])
