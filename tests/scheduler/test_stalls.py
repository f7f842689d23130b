"""Whatever hangs in a file system is given up in time, and what was given up does no harm when it comes back."""

from __future__ import annotations

import asyncio
import errno
import gc
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import weightstream as ws
from tests.builders import SINGLE, assert_same, leaves_nothing, open_files, random_tensors, write_checkpoint
from tests.fakes.filesystem import Behaviour, Fault, mounted
from tests.fakes.fixtures import requires_fuse
from tests.fakes.rig import Rig
from tests.fakes.source import Gate
from tests.models import SmallNet, tensors_of
from weightstream.api import Loader
from weightstream.errors import LoadCancelledError, LoadTimeoutError, MemoryBudgetError, ReadError
from weightstream.prefetch import memory
from weightstream.prefetch.checkpoint import Checkpoint, open_checkpoint
from weightstream.prefetch.digests import MANIFEST_NAME, write_manifest
from weightstream.prefetch.eviction import Eviction
from weightstream.prefetch.filesystem import FileSystem
from weightstream.scheduler import job, survey
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.stragglers import Stragglers

MakeRig = Callable[..., Rig]

MIB = 2**20


@pytest.fixture(name="tensors")
def fixture_tensors() -> dict[str, torch.Tensor]:
    return tensors_of(SmallNet())


@pytest.fixture(name="path")
def fixture_path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return write_checkpoint(tmp_path / "c", tensors, num_shards=2)


def on_meta() -> SmallNet:
    with torch.device("meta"):
        return SmallNet()


def assert_on_meta(model: SmallNet) -> None:
    assert all(parameter.is_meta for parameter in model.parameters())


def assert_loaded(model: SmallNet, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


def files_of(path: Path) -> list[str]:
    return [name for name in open_files().values() if name.startswith(str(path))]


@pytest.mark.parametrize("read", [0, 3], ids=["first", "middle"])
async def test_read_that_does_not_return_ends_the_load(
    rig: Rig, path: Path, tensors: dict[str, torch.Tensor], read: int
) -> None:
    gate = rig.disk.stop_at(read, is_stuck=True)
    model = on_meta()
    with leaves_nothing():
        async with rig.loader(workers=2, num_slots=3, stall_s=7.0) as loader:
            with pytest.raises(
                LoadTimeoutError, match=r"at most 7 s, found no answer to the read at offset \d+ for 7 s"
            ) as caught:
                await loader.load(model, path)
            given_up = "1 reads did not return and were given up; until they do, their slots are lost"
            assert caught.value.fallbacks == (given_up,)
            assert rig.clock.now() == 7.0
            assert_on_meta(model)
            num_lost = rig.ring.num_slots - rig.ring.num_free
            assert rig.ring.num_written_off == num_lost <= 1
            assert rig.disk.num_open == 1  # the read has not let go of the file
            assert files_of(path)

            report = await loader.load(model, path)
            assert_loaded(model, tensors)
            lost = ["1 slots are lost to reads of other loads that have not returned yet"]
            assert list(report.fallbacks) == (lost if num_lost else [])

            rig.disk.closed.clear()
            gate.open()
            assert rig.disk.closed.wait(30)
            assert rig.ring.num_written_off == 0  # it came back before the file did
            assert rig.ring.num_recovered == num_lost
            assert rig.ring.num_free == rig.ring.num_slots
    assert rig.disk.num_open == 0
    assert_loaded(model, tensors)


class TestReadThatIsSlow:
    """It is given up, and returns after all: whatever happens meanwhile, what is its own comes back, once."""

    @pytest.fixture(name="rig")
    def fixture_rig(self, make_rig: MakeRig) -> Rig:
        return make_rig("fake")

    @pytest.fixture(name="gates")
    def fixture_gates(self, rig: Rig) -> list[Gate]:
        """Where the first two reads are stuck: as many as there are slots."""
        return [rig.disk.stop_at(read, is_stuck=True) for read in range(2)]

    async def test_slot_is_handed_out_when_it_has_returned_and_not_before(
        self, rig: Rig, gates: list[Gate], path: Path, tensors: dict[str, torch.Tensor]
    ) -> None:
        async with rig.loader(workers=2, num_slots=2, stall_s=7.0) as loader:
            with pytest.raises(LoadTimeoutError, match="a read does not return"):
                await loader.load(on_meta(), path)
            with pytest.raises(MemoryBudgetError, match="no slot of the ring"):
                await loader.load(on_meta(), path)
            gates[0].open()
            rig.clock.wait_idle()
            assert (rig.ring.num_free, rig.ring.num_written_off) == (1, 1)
            model = on_meta()
            await loader.load(model, path)
            assert_loaded(model, tensors)
            rig.disk.closed.clear()
            gates[1].open()
            assert rig.disk.closed.wait(30)
            report = await loader.load(on_meta(), path)
            assert report.fallbacks == ()
        assert rig.ring.num_recovered == 2

    async def test_load_that_waits_for_its_slot_goes_on(
        self, rig: Rig, gates: list[Gate], path: Path, tensors: dict[str, torch.Tensor]
    ) -> None:
        model = on_meta()
        async with rig.loader(workers=2, num_slots=2) as loader:
            handle = await loader.start(on_meta(), path)
            for gate in gates:
                gate.wait_reached()
            other = await loader.start(model, path)
            await handle.cancel()
            assert rig.ring.num_written_off == rig.ring.num_slots == 2
            assert other.progress.bytes_read == 0
            gates[1].open()
            await other.wait()
            gates[0].open()
        assert_loaded(model, tensors)
        assert rig.ring.num_recovered == 2

    async def test_load_that_waits_for_a_slot_that_does_not_come_back_ends(
        self, rig: Rig, gates: list[Gate], path: Path
    ) -> None:
        """Loads that read from elsewhere do not hang with a file system that does."""
        model = on_meta()
        async with rig.loader(workers=2, num_slots=2, stall_s=7.0) as loader:
            with rig.clock.participate():  # time stands still meanwhile
                handle = await loader.start(on_meta(), path)
                for gate in gates:
                    gate.wait_reached()
                other = await loader.start(model, path)
            with pytest.raises(LoadTimeoutError, match="a read does not return"):
                await handle.wait()
            with pytest.raises(LoadTimeoutError, match="there is no slot to read into"):
                await other.wait()
            assert_on_meta(model)
            for gate in gates:
                gate.open()

    async def test_slot_that_several_reads_write_to_comes_back_with_the_last(
        self, rig: Rig, gates: list[Gate], tmp_path: Path
    ) -> None:
        path = write_checkpoint(tmp_path / "large", random_tensors({"a": (2048, 1024)}))
        model = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.empty(2048, 1024, device="meta"))})
        async with rig.loader(workers=2, num_slots=2, chunk=16 * MIB) as loader:
            handle = await loader.start(model, path)
            for gate in gates:
                gate.wait_reached()
            await handle.cancel()
            assert (rig.ring.num_slots, rig.ring.num_written_off) == (1, 1)
            gates[0].open()
            rig.clock.wait_idle()
            assert (rig.ring.num_written_off, rig.ring.num_recovered) == (1, 0)
            gates[1].open()
            rig.clock.wait_idle()
            assert (rig.ring.num_free, rig.ring.num_written_off, rig.ring.num_recovered) == (1, 0, 1)

    async def test_it_returns_while_the_ring_is_closed(self, rig: Rig, path: Path) -> None:
        """The last one that uses the memory of a ring of its own."""
        gate = rig.disk.stop_at(0, is_stuck=True)
        with leaves_nothing():
            async with rig.loader(strategy="preload") as loader:
                handle = await loader.start(on_meta(), path)
                gate.wait_reached()
                engine = loader._engine
                assert engine is not None
                await handle.cancel()
                assert rig.ring.num_slots == 0
                assert (
                    engine.staging.account.held_bytes
                    == engine.staging.budget.limit_bytes - engine.staging.budget.left_bytes
                    > 0
                )
                rig.disk.closed.clear()
                gate.open()
                assert rig.disk.closed.wait(30)
                assert (
                    engine.staging.account.held_bytes
                    == engine.staging.budget.limit_bytes - engine.staging.budget.left_bytes
                    == 0
                )

    async def test_block_it_reads_into_lives_until_then(self, make_rig: MakeRig, path: Path) -> None:
        """Into host memory that an adopted parameter was to take, and never did."""
        rig = make_rig("host")
        gate = rig.disk.stop_at(0, is_stuck=True)
        async with rig.loader(workers=1) as loader:
            before = set(memory._kept)
            handle = await loader.start(on_meta(), path)
            gate.wait_reached()
            await handle.cancel()
            kept = set(memory._kept) - before
            assert len(kept) == 2, "what is left of the arena, and one block: the others are gone"
            rig.disk.closed.clear()
            gate.open()
            assert rig.disk.closed.wait(30)
            rig.clock.wait_idle()
            assert len(kept & set(memory._kept)) == 1


async def test_memory_of_a_ring_of_its_own_counts_until_the_read_returns(
    make_rig: MakeRig, path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    async with make_rig("fake").loader(strategy="preload") as loader:
        needed_bytes = (await loader.load(on_meta(), path)).host_peak_bytes
    rig = make_rig("fake")
    gate = rig.disk.stop_at(0, is_stuck=True)
    with leaves_nothing():
        async with rig.loader(strategy="preload", host_memory=needed_bytes, workers=2, stall_s=7.0) as loader:
            with pytest.raises(LoadTimeoutError):
                await loader.load(on_meta(), path)
            with pytest.raises(MemoryBudgetError, match=r"expected \d+ bytes, found 0 bytes"):
                await loader.load(on_meta(), path)
            rig.disk.closed.clear()
            gate.open()
            assert rig.disk.closed.wait(30)
            model = on_meta()
            await loader.load(model, path)
    assert_loaded(model, tensors)


async def test_error_names_the_file(make_rig: MakeRig, path: Path) -> None:
    rig = make_rig("fake")
    gate = rig.disk.stop_at(0, is_stuck=True)
    async with rig.loader(stall_s=1.0, scheduler={"order": "file"}) as loader:
        with pytest.raises(LoadTimeoutError) as caught:
            await loader.load(on_meta(), path)
        gate.open()
    assert caught.value.file == str(path / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("strategy", ["stream", "preload", "direct"])
async def test_lost_slots_are_in_the_reports_of_all_loads_that_need_slots(
    make_rig: MakeRig, path: Path, strategy: str
) -> None:
    """Whatever ring they were of, also where there are enough others, and also of a load that was under way."""
    rig = make_rig("fake")
    gate = rig.disk.stop_at(0, is_stuck=True)
    lost = "1 slots are lost to reads of other loads that have not returned yet"
    async with rig.loader(strategy=strategy, workers=1) as loader:
        handle = await loader.start(on_meta(), path)
        gate.wait_reached()
        other = await loader.start(on_meta(), path)  # there is no thread left to read for it
        await handle.cancel()
        assert (await other.wait()).fallbacks == (lost,)
        assert (await loader.load(on_meta(), path)).fallbacks == (lost,)
        rig.disk.closed.clear()
        gate.open()
        assert rig.disk.closed.wait(30)
        assert (await loader.load(on_meta(), path)).fallbacks == ()


@pytest.mark.parametrize("strategy", ["stream", "preload", "direct"])
async def test_timeout_comes_at_the_deadline_although_a_read_is_stuck(rig: Rig, path: Path, strategy: str) -> None:
    """Also to who leaves the loader with it."""
    gate = rig.disk.stop_at(1, is_stuck=True)
    model = on_meta()
    with leaves_nothing():
        with pytest.raises(LoadTimeoutError, match=r"the load took too long: expected at most 7 s"):
            async with rig.loader(strategy=strategy, scheduler={"timeout_s": 7.0}) as loader:
                await loader.load(model, path)
        assert rig.clock.now() == 7.0
        assert_on_meta(model)
        gate.open()


async def test_read_that_has_just_begun_at_the_deadline_is_waited_for_a_moment(make_rig: MakeRig, path: Path) -> None:
    rig = make_rig("fake", latency_s=2.3)
    async with rig.loader(workers=1, scheduler={"timeout_s": 7.0}) as loader:
        handle = await loader.start(on_meta(), path)
        ended_s: list[float] = []
        handle._job.finished.add_done_callback(lambda _: ended_s.append(rig.clock.now()))
        with pytest.raises(LoadTimeoutError):
            await handle.wait()
        assert ended_s == pytest.approx([3 * 2.3 + 0.5])


async def test_slow_reads_are_no_stall(make_rig: MakeRig, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    rig = make_rig("fake", latency_s=6.9)
    model = on_meta()
    async with rig.loader(workers=1, stall_s=7.0) as loader:
        await loader.load(model, path)
    assert rig.clock.now() > 5 * 7
    assert_loaded(model, tensors)


async def test_consumer_that_takes_its_time_is_no_stall(make_rig: MakeRig, path: Path) -> None:
    rig = make_rig("host")
    async with rig.loader(host_memory=3 * 2**20 // 2, stall_s=7.0) as loader, loader.stream(path) as stream:
        await anext(stream)
        with rig.clock.participate():
            rig.clock.sleep(1000.0)
        assert len([name async for name, _ in stream]) == len(tensors_of(SmallNet())) - 1


class TestClosing:
    """A Loader that is closed waits for what is merely slow, and says what is stuck."""

    @pytest.fixture(name="stuck")
    def fixture_stuck(self, make_rig: MakeRig) -> tuple[Rig, Gate]:
        rig = make_rig("fake")
        return rig, rig.disk.stop_at(0, is_stuck=True)

    async def test_waits_for_a_read_that_is_slow(
        self, stuck: tuple[Rig, Gate], path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rig, gate = stuck
        wait = Stragglers.wait

        def answer() -> None:
            rig.clock.sleep(0.4)
            gate.open()

        def wait_for_answer(self: Stragglers, grace_s: float) -> int:
            rig.clock.spawn(answer, "weightstream-file-system")
            return wait(self, grace_s)

        monkeypatch.setattr(Stragglers, "wait", wait_for_answer)
        with leaves_nothing():
            async with rig.loader(workers=2) as loader:
                await loader.start(on_meta(), path)
                gate.wait_reached()
            assert rig.clock.now() == pytest.approx(0.5 + 0.4)
            assert rig.disk.num_open == rig.ring.num_written_off == 0

    async def test_says_what_is_stuck(
        self, stuck: tuple[Rig, Gate], path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        rig, gate = stuck
        with leaves_nothing():
            async with rig.loader(workers=2) as loader:
                await loader.start(on_meta(), path)
                gate.wait_reached()
            assert rig.clock.now() > 0.5 + 0.4  # both graces, less what is rounded away
            assert "closed, but reads or files of 1 loads have not come back" in caplog.text
            gate.open()

    async def test_is_in_haste_when_the_program_is(self, stuck: tuple[Rig, Gate], path: Path) -> None:
        rig, gate = stuck

        class Interrupt(BaseException):
            pass

        with leaves_nothing():
            with pytest.raises(Interrupt):  # noqa: PT012 (how it is left is the point)
                async with rig.loader(workers=2) as loader:
                    await loader.start(on_meta(), path)
                    gate.wait_reached()
                    raise Interrupt
            assert rig.clock.now() <= 0.5 + 0.5
            gate.open()

    async def test_is_in_haste_once_it_is_cancelled(
        self, stuck: tuple[Rig, Gate], path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rig, gate = stuck
        closing_began = asyncio.Event()
        loop = asyncio.get_running_loop()
        was_hurried = asyncio.Event()
        wait, hurry = Stragglers.wait, Stragglers.hurry

        def tell(self: Stragglers, grace_s: float) -> int:
            loop.call_soon_threadsafe(closing_began.set)
            return wait(self, grace_s)

        def tell_haste(self: Stragglers) -> None:
            hurry(self)
            was_hurried.set()

        monkeypatch.setattr(Stragglers, "wait", tell)
        monkeypatch.setattr(Stragglers, "hurry", tell_haste)
        with leaves_nothing():
            loader = rig.loader(workers=2)
            await loader.__aenter__()
            handle = await loader.start(on_meta(), path)
            gate.wait_reached()
            await handle.cancel()
            now = rig.clock.now()
            with rig.clock.participate():  # it stands still: nothing but haste ends the wait
                task = asyncio.create_task(loader.__aexit__(None, None, None))
                await closing_began.wait()
                task.cancel()
                await was_hurried.wait()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert rig.clock.now() <= now + 0.5
            gate.open()

    async def test_waits_for_the_loads_however_often_it_is_cancelled(
        self, stuck: tuple[Rig, Gate], path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rig, gate = stuck
        complaints: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        with leaves_nothing():
            loader = rig.loader(workers=2)
            await loader.__aenter__()
            handle = await loader.start(on_meta(), path)
            gate.wait_reached()
            was_done: list[bool] = []
            close = Engine.close

            def note(self: Engine, *, ended_by: type[BaseException] | None = None) -> None:
                was_done.append(handle._job.finished.done())
                close(self, ended_by=ended_by)

            monkeypatch.setattr(Engine, "close", note)
            with rig.clock.participate():  # it stands still, so the load does not give up its read
                task = asyncio.create_task(loader.__aexit__(None, None, None))
                for _ in range(10):
                    await asyncio.sleep(0)
                    task.cancel()
                for _ in range(100):
                    await asyncio.sleep(0)
                assert not was_done
            with pytest.raises(asyncio.CancelledError):
                await task
            assert was_done == [True]
            gate.open()
        assert complaints == []


# Before and after the reads


class TestFileThatDoesNotOpen:
    @pytest.fixture(name="gate")
    def fixture_gate(self, make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> tuple[Rig, Gate]:
        rig = make_rig("host")
        gate, real = Gate(rig.clock), open_checkpoint

        def hang(*args: object, **options: object) -> Checkpoint:
            found = real(*args, **options)  # type: ignore[arg-type]  # as it was called
            gate.pass_through()
            return found

        monkeypatch.setattr(job, "open_checkpoint", hang)
        return rig, gate

    @pytest.mark.parametrize("limit", ["stall", "timeout"])
    async def test_ends_the_load(self, gate: tuple[Rig, Gate], path: Path, limit: str) -> None:
        rig, held = gate
        model = on_meta()
        with leaves_nothing():
            scheduler = {"timeout_s": 5.0} if limit == "timeout" else {}
            async with rig.loader(stall_s=5.0 if limit == "stall" else None, scheduler=scheduler) as loader:
                with pytest.raises(LoadTimeoutError, match="did not answer in time: expected at most 5 s") as caught:
                    await loader.start(model, path)
                assert rig.clock.now() == 5.0
                assert caught.value.file is not None
                assert_on_meta(model)
                held.open()  # it opens after all, and everything is closed
                with rig.clock.participate():
                    rig.clock.sleep(1.0)
                assert files_of(path) == []

    async def test_does_not_hold_up_who_cancels(self, gate: tuple[Rig, Gate], path: Path) -> None:
        rig, held = gate
        with leaves_nothing():
            async with rig.loader() as loader:
                task = asyncio.create_task(loader.load(on_meta(), path))
                await asyncio.sleep(0)
                held.wait_reached()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert rig.clock.now() == 0.5
                held.open()
                with rig.clock.participate():
                    rig.clock.sleep(1.0)

    async def test_does_not_hold_up_the_end_of_the_loader(self, gate: tuple[Rig, Gate], path: Path) -> None:
        rig, held = gate
        with leaves_nothing():
            async with rig.loader() as loader:
                stream = loader.stream(path)
                held.wait_reached()
            with pytest.raises(LoadCancelledError):
                await anext(stream)
            held.open()
            with rig.clock.participate():
                rig.clock.sleep(1.0)


async def test_comparison_that_hangs_rolls_the_load_back(rig: Rig, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(rig.clock)
    monkeypatch.setattr(Checkpoint, "check_unchanged", lambda self: gate.pass_through())
    model = on_meta()
    async with rig.loader(stall_s=5.0) as loader:
        with pytest.raises(LoadTimeoutError, match="did not answer in time"):
            await loader.load(model, path)
        assert_on_meta(model)
        assert rig.ring.num_free == rig.ring.num_slots
        gate.open()


async def test_file_system_that_does_not_say_what_it_is_ends_the_load(
    rig: Rig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(rig.clock)
    collects: list[bool] = []

    def hang(_: int) -> None:
        collects.append(gc.isenabled())
        gate.pass_through()

    monkeypatch.setattr(survey, "file_system_of", hang)
    async with rig.loader(stall_s=5.0) as loader:
        with pytest.raises(LoadTimeoutError, match="did not answer in time"):
            await loader.start(on_meta(), path)
        assert rig.clock.now() == 5.0
        assert collects == [True]  # the program's collector is not off while that hangs
        gate.open()


async def test_page_cache_that_does_not_answer_ends_the_load(
    make_rig: MakeRig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig("host")
    gate = Gate(rig.clock)
    monkeypatch.setattr(survey, "file_system_of", lambda _: FileSystem("local", "ext4"))
    monkeypatch.setattr(survey, "_resident_share", lambda *_: gate.pass_through())
    async with rig.loader(stall_s=5.0) as loader:
        with pytest.raises(LoadTimeoutError, match="did not answer in time"):
            await loader.start(on_meta(), path)
        assert rig.clock.now() == 5.0
        gate.open()


async def test_page_cache_that_is_not_emptied_is_not_waited_for(
    make_rig: MakeRig, path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig("host")
    gate = Gate(rig.clock)
    monkeypatch.setattr(Eviction, "finish", lambda self: gate.pass_through())
    model = on_meta()
    with leaves_nothing():
        async with rig.loader(page_cache="drop") as loader:
            await loader.load(model, path)
            assert rig.clock.now() == 0.5
            assert_loaded(model, tensors)
            gate.open()
            with rig.clock.participate():
                rig.clock.sleep(1.0)


async def test_closing_that_hangs_is_not_waited_for(
    make_rig: MakeRig, path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig("host")
    gate, close = Gate(rig.clock), Checkpoint.close

    def hang(self: Checkpoint) -> None:
        gate.pass_through()
        close(self)

    monkeypatch.setattr(Checkpoint, "close", hang)
    model = on_meta()
    with leaves_nothing():
        async with rig.loader() as loader:
            await loader.load(model, path)
            assert rig.clock.now() == 0.5
            assert_loaded(model, tensors)
            gate.open()
            with rig.clock.participate():
                rig.clock.sleep(1.0)


async def test_closing_that_fails_fails_no_load_and_keeps_nobody_waiting(
    make_rig: MakeRig,
    path: Path,
    tensors: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """close(2) may say that it could not write, or that a server is gone; the descriptor is closed all the same."""
    rig = make_rig("host")
    close = Checkpoint.close

    def fail(self: Checkpoint) -> None:
        close(self)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Checkpoint, "close", fail)
    model = on_meta()
    with leaves_nothing():
        async with rig.loader() as loader:
            await loader.load(model, path)
        assert rig.clock.now() == 0.0
    assert_loaded(model, tensors)
    assert "complained when files were closed" in caplog.text


# With the kernel in between


def config(**prefetch: object) -> ws.LoaderConfig:
    sections = {"prefetch": {"io": "buffered", "workers": 2} | prefetch, "device": {"target": "cpu"}}
    return ws.LoaderConfig.model_validate(sections)


@requires_fuse
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=["EIO", "ESTALE"])
def test_header_that_cannot_be_read_once_is_read_again(tmp_path: Path, number: int) -> None:
    tensors = random_tensors({"a": (30, 30)})
    write_checkpoint(tmp_path, tensors)
    faults = (Fault(SINGLE, "error", request=0, number=number),)
    with mounted(tmp_path, Behaviour(faults=faults, is_cached=False)) as mount, leaves_nothing():
        model = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.empty(30, 30, device="meta"))})
        report = ws.load_sync(model, mount.path, config=config())
        assert mount.statistics().num_faults == (1,)
    assert report.num_retries == 1
    assert_same(model["a"].detach(), tensors["a"])


@requires_fuse
@pytest.mark.parametrize("retries", [0, 1])
def test_manifest_that_cannot_be_read_once_is_read_again(tmp_path: Path, retries: int) -> None:
    tensors = random_tensors({"a": (30, 30)})
    write_checkpoint(tmp_path, tensors)
    sha256 = hashlib.sha256((tmp_path / SINGLE).read_bytes()).hexdigest()
    write_manifest(tmp_path, [(SINGLE, sha256)])
    faults = (Fault(MANIFEST_NAME, "error"),)
    with mounted(tmp_path, Behaviour(faults=faults, is_cached=False)) as mount, leaves_nothing():
        model = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.empty(30, 30, device="meta"))})
        if not retries:
            with pytest.raises(ReadError, match="cannot read the manifest"):
                ws.load_sync(model, mount.path, config=config(verify="sha256", retries=0))
            return
        report = ws.load_sync(model, mount.path, config=config(verify="sha256", retries=retries))
    assert report.num_retries == 1
    assert_same(model["a"].detach(), tensors["a"])


@requires_fuse
def test_header_that_can_never_be_read_is_a_read_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_tensors({"a": (30, 30)}))
    faults = (Fault(SINGLE, "error", times=None),)
    with mounted(tmp_path, Behaviour(faults=faults, is_cached=False)) as mount, leaves_nothing():
        with pytest.raises(ReadError, match="cannot read the header at offset 0: Input/output error"):
            list(ws.iter_tensors(mount.path, config(retries=2)))
        assert mount.statistics().num_faults == (3,)


@requires_fuse
@pytest.mark.parametrize("what", ["header", "data"])
async def test_file_system_that_hangs_is_given_up(tmp_path: Path, what: str) -> None:
    tensors = random_tensors({"a": (30, 30), "b": (2**20,)})
    write_checkpoint(tmp_path, tensors)
    fault = Fault(SINGLE, "stall", offset=0 if what == "header" else 4 * 2**20)
    with mounted(tmp_path, Behaviour(faults=(fault,), is_cached=False)) as mount, leaves_nothing():
        async with Loader(config(stall_s=0.2)) as loader:
            with pytest.raises(LoadTimeoutError, match=r"at most 0\.2 s") as caught:
                _ = [name async for name, _ in loader.stream(mount.path)]
            assert caught.value.file == str(mount.path / SINGLE)
            if what == "data":
                assert "offset" in str(caught.value)
            found = {name: tensor async for name, tensor in loader.stream(mount.path)}  # the fault was for once
            mount.release()
    for name, tensor in found.items():
        assert_same(tensor, tensors[name])
