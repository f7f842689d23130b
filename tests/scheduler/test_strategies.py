"""The strategies: the same results and errors from each; what memory each takes, and when it gives it back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import assert_same, leaves_nothing, write_checkpoint, write_in_order
from tests.contract import REPORT_KEYS
from tests.fakes.rig import KIB, Rig
from tests.fakes.source import PacedSource
from tests.models import SmallNet, tensors_of
from weightstream.device.layout import padded
from weightstream.prefetch.ring import Ring
from weightstream.scheduler.loader import Loader

MakeRig = Callable[..., Rig]

STRATEGIES = ["stream", "preload", "direct"]
#: Of every slot, beyond what its chunk needs: a page at either end, for direct reads.
MARGIN = 8 * KIB


@pytest.fixture(name="tensors")
def fixture_tensors() -> dict[str, torch.Tensor]:
    """Tensors of odd sizes: 330 KiB in all, the largest of them 150 KiB."""
    sizes = {"a": 1000, "b": 70_001, "c": 0, "d": 153_600, "e": 33_333, "f": 5, "g": 80_000}
    return {name: torch.randint(256, (size,), dtype=torch.uint8) for name, size in sizes.items()}


def model_for(tensors: dict[str, torch.Tensor], begins: str) -> nn.Module:
    """On meta; with storage; or every other tensor so."""
    model = nn.Module()
    for number, (name, tensor) in enumerate(tensors.items()):
        on_meta = begins == "meta" or (begins == "mixed" and number % 2 == 0)
        model.register_buffer(name, torch.empty_like(tensor, device="meta") if on_meta else torch.zeros_like(tensor))
    return model


def assert_loaded(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


@pytest.mark.parametrize("begins", ["meta", "storage", "mixed"])
@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_every_strategy_has_the_same_result_and_report(
    rig: Rig, tensors: dict[str, torch.Tensor], tmp_path: Path, strategy: str, begins: str
) -> None:
    path = write_in_order(tmp_path, tensors, num_shards=2)
    model = model_for(tensors, begins)
    with leaves_nothing():
        async with rig.loader(strategy=strategy) as loader:
            report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert (report.strategy, report.reason) == (strategy, "asked for")
    assert list(report.to_dict()) == REPORT_KEYS
    assert sum(report.phases.values()) == pytest.approx(report.wall_s)
    assert report.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_every_strategy_loads_modules_that_load_themselves_and_ties(
    rig: Rig, tmp_path: Path, strategy: str
) -> None:
    tensors = tensors_of(SmallNet())
    path = write_in_order(tmp_path / "c", tensors, num_shards=2)
    with torch.device("meta"):
        model = SmallNet()
    async with rig.loader(strategy=strategy) as loader:
        await loader.load(model, path)
    assert_loaded(model, tensors)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_every_strategy_streams_to_a_consumer(
    rig: Rig, tensors: dict[str, torch.Tensor], tmp_path: Path, strategy: str
) -> None:
    path = write_in_order(tmp_path, tensors)
    async with rig.loader(strategy=strategy, chunk=64 * KIB) as loader, loader.stream(path) as stream:
        found = [(name, tensor.clone()) async for name, tensor in stream]
        report = await stream.report()
    assert [name for name, tensor in found if tensor.nbytes] == [name for name in tensors if name != "c"]
    assert {name for name, _ in found} == tensors.keys()
    for name, tensor in found:
        assert_same(tensor, tensors[name])
    assert report.strategy == strategy


@pytest.mark.parametrize("begins", ["meta", "storage"])
@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_failed_read_leaves_everything_as_it_was_with_every_strategy(
    rig: Rig, tensors: dict[str, torch.Tensor], tmp_path: Path, strategy: str, begins: str
) -> None:
    path = write_in_order(tmp_path, tensors)
    model = model_for(tensors, begins)
    rig.disk.fail_at(4, OSError("broken"))
    with leaves_nothing():
        async with rig.loader(strategy=strategy, workers=1) as loader:
            with pytest.raises(OSError, match="broken") as caught:
                await loader.load(model, path)
            await loader.load(model, path)
    assert_loaded(model, tensors)
    assert not isinstance(caught.value, ws.WeightstreamError)


@pytest.mark.parametrize("lies", ["in-order", "scattered"])
@pytest.mark.parametrize("begins", ["meta", "cpu"])
@pytest.mark.parametrize("kind", ["batch-norm", "hooks"])
@pytest.mark.parametrize("device", ["host", "fake"])
async def test_direct_holds_one_module_that_loads_itself_beside_its_slot(
    make_rig: MakeRig, tmp_path: Path, device: str, kind: str, begins: str, lies: str
) -> None:
    """One at a time where it has storage already; on meta it is what the model keeps. To the byte."""
    modules: list[nn.Module] = []
    for number in range(4):
        modules.append(nn.Linear(64, 64 * (number + 1), bias=kind == "hooks", device=begins))
        if kind == "hooks":
            cast("Any", modules[-1]).register_load_state_dict_pre_hook(lambda *_: None)
        else:
            modules.append(nn.BatchNorm1d(64 * (number + 1), device=begins))
    model = nn.Sequential(*modules)
    tensors = tensors_of(model)
    own: dict[str, int] = {}  # what each module that loads itself is given, where everything begins on a boundary
    for name, tensor in tensors.items():
        if kind == "hooks" or isinstance(modules[int(name[0])], nn.BatchNorm1d):
            own[name[0]] = own.get(name[0], 0) + padded(tensor.nbytes)
    stored = dict(sorted(tensors.items(), key=lambda item: item[0][2:])) if lies == "scattered" else tensors
    rig, path = make_rig(device), write_in_order(tmp_path, stored)
    async with rig.loader(strategy="direct") as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    slot_bytes = 64 * KIB  # for the largest tensor
    weights_bytes = sum(padded(tensor.nbytes) for tensor in tensors.values()) if begins == "meta" else 0
    beside_bytes = weights_bytes or max(own.values())
    if device == "fake":
        assert (report.host_peak_bytes, report.device_peak_bytes) == (slot_bytes, beside_bytes)
    elif begins == "meta" or kind == "hooks":  # read to where it stays, or is staged
        assert report.host_peak_bytes == beside_bytes
    else:
        assert report.host_peak_bytes == slot_bytes + beside_bytes


@pytest.mark.parametrize("order", ["model", "file"])
@pytest.mark.parametrize("strategy", ["stream", "preload", "direct"])
async def test_hooks_see_what_is_loaded_before_whatever_the_strategy(
    make_rig: MakeRig, tmp_path: Path, device: str, strategy: str, order: str
) -> None:
    """All that loads nothing itself, wherever the file has it, and the modules with hooks that are registered before."""

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Embedding(40_000, 4)
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
            for layer in (self.a, self.b, self.c):
                cast("Any", layer).register_load_state_dict_post_hook(self._look)

        def _look(self, module: nn.Module, _: object) -> None:
            seen.append([self.last.weight.sum().item(), self.a.weight.sum().item(), self.c.weight.sum().item()])

    seen: list[list[float]] = []
    model = Looking()
    for parameter in model.parameters():
        parameter.data.zero_()
    tensors = {name: torch.ones_like(tensor) for name, tensor in sorted(model.state_dict().items())}
    rig, path = make_rig(device), write_in_order(tmp_path, tensors)
    async with rig.loader(strategy=strategy, workers=8, scheduler={"order": order}) as loader:
        await loader.load(model, path)
    assert seen == [[160_000, 16, 0], [160_000, 16, 0], [160_000, 16, 16]]


async def test_preload_changes_nothing_before_the_last_byte_is_there(
    rig: Rig, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """So a read that fails, the last one even, leaves a model with storage as it is."""
    path = write_in_order(tmp_path, tensors)
    model = model_for(tensors, "storage")
    async with rig.loader(strategy="preload", workers=1, scheduler={"adaptive": False}) as loader:
        handle = await loader.start(model_for(tensors, "storage"), path)
        await handle.wait()
        num_reads = rig.disk.num_begun
        rig.disk.fail_at(2 * num_reads - 1, ws.ReadError("broken"))
        num_copies = rig.accelerator.num_copies
        with pytest.raises(ws.ReadError, match="broken") as caught:
            await loader.load(model, path)
    assert num_reads > 3
    assert rig.accelerator.num_copies == num_copies
    assert caught.value.partly_written == ()
    assert all(not buffer.any() for buffer in model.buffers())


async def test_preload_reads_at_once_and_copies_then(make_rig: MakeRig, tmp_path: Path) -> None:
    """Ten chunks: 10 s of reading, which copies would hold up by 30 s; none of the two waits for the other."""
    rig = make_rig("fake", read_bytes_per_s=64 * KIB, copy_bytes_per_s=64 * KIB / 4)
    tensors = {f"t{i}": torch.randint(256, (64 * KIB,), dtype=torch.uint8) for i in range(10)}
    path = write_in_order(tmp_path, tensors)
    model = model_for(tensors, "meta")
    async with rig.loader(strategy="preload", workers=1, scheduler={"adaptive": False}) as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert (report.wall_s, report.phases["disk"], report.phases["copy"]) == (50, 10, 40)
    assert report.overlap == 0


@pytest.mark.parametrize("outcome", ["loaded", "failed"])
async def test_preload_holds_the_checkpoint_and_frees_it_at_the_end(
    make_rig: MakeRig, tensors: dict[str, torch.Tensor], tmp_path: Path, outcome: str
) -> None:
    rig = make_rig("fake")
    path = write_in_order(tmp_path, tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    gate = rig.disk.stop_at(5)
    if outcome == "failed":
        rig.disk.fail_at(5, OSError("broken"))
    async with rig.loader(strategy="preload") as loader:
        handle = await loader.start(model_for(tensors, "meta"), path)
        gate.wait_reached()
        assert rig.ring.num_bytes > total
        gate.open()
        if outcome == "failed":
            with pytest.raises(OSError, match="broken"):
                await handle.wait()
        else:
            report = await handle.wait()
            assert total < report.host_peak_bytes < total + 10 * (MARGIN + 64 * KIB)
            freed = [decision for decision in report.decisions if decision.startswith("preload: ")]
            assert re.fullmatch(
                r"preload: (\d+) bytes of slots were freed at the end; the process had \d+ bytes resident before,"
                r" and \d+ after that",
                freed[0],
            )
            assert report.pinned_bytes == int(freed[0].split()[1]) >= total
        assert (rig.ring.num_slots, rig.ring.num_bytes) == (0, 0)
        assert rig.accelerator.num_pins == rig.accelerator.num_unpins
        streamed = await loader.warm(path)  # another ring, of the loader's own
        assert streamed.host_peak_bytes < total + 100 * MARGIN


async def test_preload_that_does_not_fit_says_what_would_do_before_anything_moves(
    rig: Rig, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = write_in_order(tmp_path, tensors)
    model = model_for(tensors, "storage")
    async with rig.loader(strategy="preload", num_slots=3) as loader:
        with pytest.raises(ws.MemoryBudgetError, match=r"prefetch\.host_memory to \d+ bytes") as caught:
            await loader.start(model, path)
    assert rig.disk.num_begun == 0
    assert caught.value.hint is not None
    needed = int(caught.value.hint.split("host_memory to ")[1].split()[0])
    async with rig.loader(strategy="preload", host_memory=needed - 1) as loader:
        with pytest.raises(ws.MemoryBudgetError):
            await loader.load(model, path)
    async with rig.loader(strategy="preload", host_memory=needed) as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert report.host_peak_bytes <= needed


@pytest.mark.parametrize(
    ("device", "share", "num_slots"),
    [("host", 1.0, 0), ("host", 0.0, 8), ("fake", 1.0, 8), ("fake", 0.0, 8)],
    ids=["host-warm", "host-cold", "fake-warm", "fake-cold"],
)
async def test_preload_makes_no_slot_that_nothing_passes_through(
    make_rig: MakeRig,
    monkeypatch: pytest.MonkeyPatch,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
    device: str,
    share: float,
    num_slots: int,
) -> None:
    """There are 8 chunks. Onto the CPU only direct reads pass, and what is in the page cache is not read directly."""
    monkeypatch.setattr(PacedSource, "resident_shares", lambda self, wanted: [share] * len(wanted))
    rig = make_rig(device)
    sections: Any = {"prefetch": {"chunk": 64 * KIB}, "device": {"target": "cpu"}}
    path = write_in_order(tmp_path, tensors)
    model = model_for(tensors, "meta")
    made: list[int] = []
    grow = Ring.grow

    def count(ring: Ring, num_slots: int, **options: Any) -> Any:
        made.append(num_slots)
        return grow(ring, num_slots, **options)

    monkeypatch.setattr(Ring, "grow", count)
    async with Loader(ws.LoaderConfig(strategy="preload", **sections), machine=rig.machine) as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert report.strategy == "preload"
    assert sum(made) == num_slots


async def test_preload_takes_little_more_than_it_holds_where_tensors_lie_apart(
    make_rig: MakeRig, tmp_path: Path
) -> None:
    """In files of torch.save each tensor is a chunk of its own, at least, and slots are as large as the largest chunk."""
    tensors = {"large": torch.rand(6 * 2**20)} | {
        f"t{i}": torch.rand(2**20) for i in range(6)
    }  # 24 MiB, and 6 of 4 MiB
    torch.save(tensors, tmp_path / "model.bin")
    rig = make_rig("fake")
    model = model_for(tensors, "meta")
    async with rig.loader(strategy="preload", chunk=16 * 2**20, host_memory=13 * (4 * 2**20 + 64 * KIB)) as loader:
        report = await loader.load(model, tmp_path / "model.bin")
    assert_loaded(model, tensors)
    assert report.host_peak_bytes <= 13 * (4 * 2**20 + 64 * KIB)


async def test_preload_for_a_consumer_needs_room_for_everything(
    make_rig: MakeRig, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    rig = make_rig("host")
    path = write_in_order(tmp_path, tensors)
    async with rig.loader(strategy="preload", num_slots=3) as loader:
        with pytest.raises(ws.MemoryBudgetError, match="the checkpoint does not fit"):
            await anext(loader.stream(path))


async def test_two_preloads_that_fit_one_after_the_other_do_not_wait_for_each_other(
    make_rig: MakeRig, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """With a shared ring each could hold half of the slots, and wait for the rest."""
    rig = make_rig("fake")
    path = write_in_order(tmp_path, tensors)
    models = [model_for(tensors, "meta"), model_for(tensors, "meta")]
    gate = rig.disk.stop_at(3)
    async with rig.loader(strategy="preload", host_memory=600 * KIB) as loader:
        first = await loader.start(models[0], path)
        gate.wait_reached()
        with pytest.raises(ws.MemoryBudgetError, match=r"left of prefetch\.host_memory"):
            await loader.load(models[1], path)
        gate.open()
        await first.wait()
        await loader.load(models[1], path)
    for model in models:
        assert_loaded(model, tensors)


@pytest.mark.parametrize("begins", ["meta", "storage"])
@pytest.mark.parametrize("chunk", [64 * KIB, 1024 * KIB])
async def test_direct_holds_no_more_than_the_largest_tensor(
    make_rig: MakeRig, tensors: dict[str, torch.Tensor], tmp_path: Path, begins: str, chunk: int
) -> None:
    rig = make_rig("fake")
    path = write_in_order(tmp_path, tensors)
    model = model_for(tensors, begins)
    async with rig.loader(strategy="direct", chunk=chunk, host_memory=4096 * KIB) as loader:
        report = await loader.load(model, path)
        assert rig.ring.num_bytes == 0
    assert_loaded(model, tensors)
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert 0 < report.host_peak_bytes <= -(-min(largest, chunk) // 4096) * 4096


@pytest.mark.parametrize("num_slots", [2, 40])
async def test_direct_for_a_consumer_holds_no_more_than_the_largest_tensor_beside_one_slot(
    rig: Rig, tensors: dict[str, torch.Tensor], tmp_path: Path, num_slots: int
) -> None:
    path = write_checkpoint(tmp_path, tensors)
    async with (
        rig.loader(strategy="direct", host_memory=num_slots * 512 * KIB) as loader,
        loader.stream(path) as stream,
    ):
        async for name, tensor in stream:
            assert_same(tensor, tensors[name])
        report = await stream.report()
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert report.host_peak_bytes <= largest + 64 * KIB + MARGIN + 4 * KIB


@pytest.mark.parametrize(("strategy", "found"), [("preload", "stream"), ("direct", "direct"), ("map", "stream")])
async def test_warming_the_page_cache_knows_stream_and_direct_alone(
    make_rig: MakeRig, tensors: dict[str, torch.Tensor], tmp_path: Path, strategy: str, found: str
) -> None:
    path = write_in_order(tmp_path, tensors)
    async with make_rig("host").loader(strategy=strategy, num_slots=2) as loader:
        report = await loader.warm(path)
    assert (report.strategy, report.num_bytes) == (found, sum(tensor.nbytes for tensor in tensors.values()))
    assert json.loads(report.to_json())["reason"].startswith("what is only read")


@pytest.mark.parametrize("strategy", [*STRATEGIES, "map"])
@pytest.mark.parametrize("begins", ["meta", "storage"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        pytest.param({"more": torch.zeros(3)}, ws.UnexpectedKeysError, id="unexpected"),
        pytest.param({"a": torch.zeros(3, dtype=torch.uint8)}, ws.ShapeMismatchError, id="shape"),
        pytest.param({"a": torch.zeros(1000)}, ws.DtypeMismatchError, id="dtype"),
    ],
)
async def test_every_strategy_has_the_same_errors(
    rig: Rig,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
    strategy: str,
    begins: str,
    change: dict[str, torch.Tensor],
    error: Any,
) -> None:
    if strategy == "map" and rig.device != "host":
        pytest.skip("tensors in mapped files are on the host")
    path = write_checkpoint(tmp_path, tensors | change)
    model = model_for(tensors, begins)
    async with rig.loader(strategy=strategy) as loader:
        with pytest.raises(error):
            await loader.load(model, path)
    assert rig.disk.num_begun == 0
    assert all(buffer.is_meta or not buffer.any() for buffer in model.buffers())


def test_variable_chooses_the_strategy(
    monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """One command for a host with little memory, where no code is changed."""
    path = write_checkpoint(tmp_path, tensors)
    model = model_for(tensors, "storage")
    monkeypatch.setenv("WEIGHTSTREAM_STRATEGY", "direct")
    monkeypatch.setenv("WEIGHTSTREAM_DEVICE__TARGET", "cpu")
    report = ws.load_sync(model, path)
    assert_loaded(model, tensors)
    assert (report.strategy, report.reason) == ("direct", "asked for")
    assert report.host_peak_bytes <= 152 * KIB  # the largest tensor, in whole pages
    assert ws.load_sync(model, path, config=ws.LoaderConfig(strategy="stream")).strategy == "stream"
