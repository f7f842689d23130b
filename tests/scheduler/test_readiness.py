"""Who waits for a tensor or a module is told when it may be used, and not before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.builders import assert_same, random_tensors, write_in_order
from tests.fakes.rig import KIB, Rig
from weightstream.errors import ReadError
from weightstream.scheduler.readiness import Readiness

MakeRig = Callable[..., Rig]

NAMES = ["a.0.bias", "a.0.weight", "a.00.weight", "a.1.weight", "ab.weight", "b"]
PREFIXES = ["", "a.", "a.0.", "a.00.", "a.1.", "ab.", "a.empty."]


@pytest.fixture
def readiness() -> Readiness:
    made = Readiness()
    made.expect(NAMES, PREFIXES)
    return made


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("b", ["b"]),
        ("a.0.bias", ["a.0.bias"]),
        ("a.0", ["a.0.bias", "a.0.weight"]),
        ("a", ["a.0.bias", "a.0.weight", "a.00.weight", "a.1.weight"]),
        ("", NAMES),
    ],
    ids=["tensor", "tensor-in-module", "module", "module-of-modules", "model"],
)
def test_resolves_with_the_last_tensor_it_needs(readiness: Readiness, name: str, needs: list[str]) -> None:
    future = readiness.wait_for(name)
    readiness.mark([one for one in NAMES if one not in needs])
    readiness.mark(needs[1:])
    assert not future.done()
    readiness.mark(needs[:1])
    assert future.result(0) is None
    assert readiness.wait_for(name).done()
    assert readiness.num_ready == len(NAMES)


def test_module_without_tensors_is_ready_at_once(readiness: Readiness) -> None:
    assert readiness.wait_for("a.empty").done()


@pytest.mark.parametrize("name", ["c", "a.", "a.0.weigh", "a.0.weight.x", "A"])
def test_unknown_name_is_a_value_error(readiness: Readiness, name: str) -> None:
    with pytest.raises(ValueError, match="no module and the load no tensor"):
        readiness.wait_for(name)


def test_end_resolves_everybody(readiness: Readiness) -> None:
    futures = [readiness.wait_for(name) for name in ("", "b")]
    readiness.end(None)
    assert all(future.result(0) is None for future in futures)
    assert readiness.wait_for("a").done()


def test_error_reaches_who_waits_and_who_comes_later(readiness: Readiness) -> None:
    error = ReadError("broken")
    readiness.mark(["b"])
    waiting = readiness.wait_for("a")
    readiness.end(error)
    assert waiting.exception(0) is error
    assert readiness.wait_for("b").exception(0) is error


def test_waiter_cannot_cancel_it_for_the_others(readiness: Readiness) -> None:
    future = readiness.wait_for("b")
    assert not future.cancel()
    readiness.mark(["b"])
    assert future.result(0) is None


class Tower(nn.Module):
    """Layers of one chunk each, whose order in the files is the reverse of that in the model."""

    NUM_LAYERS = 6

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128, bias=False, device="meta") for _ in range(self.NUM_LAYERS))


@pytest.fixture
def reversed_tower(tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path]:
    shapes = {f"layers.{i}.weight": (128, 128) for i in reversed(range(Tower.NUM_LAYERS))}
    tensors = random_tensors(shapes)
    return tensors, write_in_order(tmp_path, tensors)


@pytest.mark.parametrize("order", ["model", "file"])
async def test_early_layers_are_ready_first_in_the_order_of_the_model(
    rig: Rig, reversed_tower: tuple[dict[str, torch.Tensor], Path], order: str
) -> None:
    tensors, path = reversed_tower
    model = Tower()
    gate = rig.disk.stop_at(2)  # two layers come in before it
    expected = [0, 1] if order == "model" else [5, 4]
    async with rig.loader(workers=1, chunk=64 * KIB, scheduler={"order": order}) as loader:
        handle = await loader.start(model, path)
        gate.wait_reached()
        for i in expected:
            await handle.ready(f"layers.{i}")
            await handle.ready(f"layers.{i}.weight")
            assert_same(model.get_parameter(f"layers.{i}.weight"), tensors[f"layers.{i}.weight"])
        rest = [asyncio.ensure_future(handle.ready(f"layers.{i}")) for i in range(6) if i not in expected]
        whole = asyncio.ensure_future(handle.ready())
        await asyncio.sleep(0)
        assert not any(one.done() for one in (*rest, whole))
        assert sum(weight.is_meta for weight in model.parameters()) == 4
        with pytest.raises(ValueError, match=r"layers\.9"):
            await handle.ready("layers.9")
        gate.open()
        await asyncio.gather(*rest, whole)
        await handle.wait()


async def test_nothing_is_ready_before_its_copy(
    make_rig: MakeRig, reversed_tower: tuple[dict[str, torch.Tensor], Path]
) -> None:
    _, path = reversed_tower
    rig = make_rig("fake")
    rig.accelerator.hold()
    model = Tower()
    async with rig.loader(workers=1, chunk=64 * KIB) as loader:
        handle = await loader.start(model, path)
        rig.clock.wait_idle()  # everything is read, nothing is copied
        assert handle.progress.bytes_read == handle.progress.total_bytes
        assert (handle.progress.tensors_ready, handle.progress.bytes_placed) == (0, 0)
        rig.accelerator.release(1)
        await handle.ready("layers.0")
        rig.clock.wait_idle()
        assert handle.progress.tensors_ready == 1
        rig.accelerator.release()
        await handle.wait()


async def test_error_comes_out_of_ready(rig: Rig, reversed_tower: tuple[dict[str, torch.Tensor], Path]) -> None:
    _, path = reversed_tower
    gate = rig.disk.stop_at(0)
    error = ReadError("broken")
    rig.disk.fail_at(1, error)
    async with rig.loader(workers=1) as loader:
        handle = await loader.start(Tower(), path)
        ready = asyncio.ensure_future(handle.ready("layers.5"))
        await asyncio.sleep(0)
        gate.open()
        with pytest.raises(ReadError) as caught:
            await ready
        assert caught.value is error


def test_marking_many_names_is_not_slowed_by_waiters_for_others() -> None:
    readiness = Readiness()
    readiness.expect([f"m.{i}" for i in range(1000)], ["", "m."])
    futures: list[Future[None]] = [readiness.wait_for("m") for _ in range(3)]
    for i in range(1000):
        assert not any(future.done() for future in futures)
        readiness.mark([f"m.{i}"])
    assert all(future.done() for future in futures)
