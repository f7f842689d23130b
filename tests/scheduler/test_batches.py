"""What many chunks cost that come at once: they are submitted, seen to end and given back together, and wake no crowd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from tests.builders import assert_same, write_in_order
from tests.fakes.accelerator import FakeAccelerator
from tests.fakes.clock import VirtualClock
from tests.fakes.rig import KIB, Rig
from weightstream.scheduler import flow
from weightstream.scheduler.copying import Copying
from weightstream.scheduler.course import Filled
from weightstream.scheduler.filling import Filling
from weightstream.scheduler.flow import Flow
from weightstream.scheduler.report import Progress

MakeRig = Callable[..., Rig]

NUM_CHUNKS = 40
TENSORS = {f"t{i:02d}": torch.full((64 * KIB,), i, dtype=torch.uint8) for i in range(NUM_CHUNKS)}


@pytest.fixture(name="path")
def fixture_path(tmp_path: Path) -> Path:
    return write_in_order(tmp_path, TENSORS)


def on_meta() -> nn.Module:
    model = nn.Module()
    for name, tensor in TENSORS.items():
        model.register_buffer(name, torch.empty_like(tensor, device="meta"))
    return model


async def test_filled_chunks_are_submitted_several_at_a_time(
    make_rig: MakeRig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `preload` all are filled when the first is submitted."""
    sizes: list[int] = []
    submitted = Flow.submitted

    def note(self: Flow, filled: Sequence[Filled], events: Any) -> None:
        sizes.append(len(filled))
        submitted(self, filled, events)

    monkeypatch.setattr(Flow, "submitted", note)
    model = on_meta()
    async with make_rig("fake").loader(strategy="preload") as loader:
        await loader.load(model, path)
    assert sizes == [flow._AT_ONCE] * (NUM_CHUNKS // flow._AT_ONCE)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, TENSORS[name])


async def test_copy_that_cannot_be_submitted_ends_the_load_and_those_before_it_are_waited_for(
    make_rig: MakeRig, path: Path
) -> None:
    rig = make_rig("fake")
    copy, count = rig.accelerator.copy, 0

    def fail_at_the_fifth(destination: torch.Tensor, source: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise RuntimeError("no more")
        copy(destination, source)

    rig.accelerator.copy = fail_at_the_fifth  # type: ignore[method-assign]
    model = on_meta()
    async with rig.loader(strategy="preload") as loader:
        with pytest.raises(RuntimeError, match="no more"):
            await loader.load(model, path)
        assert rig.accelerator.num_done == 4
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        rig.accelerator.copy = copy  # type: ignore[method-assign]
        await loader.load(model, path)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, TENSORS[name])


async def test_slots_that_come_back_do_not_wake_readers_in_vain(
    make_rig: MakeRig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader looks for a chunk when it was woken for a slot, and when it has read one; not whenever others have."""
    looks = 0
    take = Filling.take

    def count(self: Filling) -> Callable[[], None] | None:
        nonlocal looks
        looks += 1
        return take(self)

    monkeypatch.setattr(Filling, "take", count)
    async with make_rig("fake", copy_bytes_per_s=1000 * KIB).loader(workers=16, num_slots=2) as loader:
        await loader.load(on_meta(), path)
    assert looks <= 3 * NUM_CHUNKS + 2 * 16


class Slow(FakeAccelerator):
    """Takes a second for each copy and makes its caller wait, as a cast on the CPU does."""

    progress: Callable[[], Progress] | None = None

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        assert isinstance(self._clock, VirtualClock)
        if self.progress is not None:
            placed.append(self.progress().bytes_placed)
        self._clock.sleep(1.0)
        super().copy(destination, source)


placed: list[int] = []


async def test_what_is_there_is_placed_though_more_waits_to_be_submitted(make_rig: MakeRig, path: Path) -> None:
    """Readers are far ahead all the time; who waits for the first module does not wait for the last."""
    rig = make_rig(accelerator=Slow)
    assert isinstance(rig.accelerator, Slow)
    rig.accelerator.refuses_pinning = True
    placed.clear()
    async with rig.loader() as loader:
        with rig.clock.participate():
            handle = await loader.start(on_meta(), path)
            rig.accelerator.progress = lambda: handle.progress
        await handle.wait()
    assert len(placed) >= NUM_CHUNKS - 2
    assert placed[-1] >= (NUM_CHUNKS - 4) * 64 * KIB
    assert placed == sorted(placed)


class Ended:
    """An event, and whether it has happened."""

    def __init__(self, *, has_happened: bool) -> None:
        self.has_happened = has_happened
        self.was_waited_for = False

    def synchronize(self) -> None:
        self.was_waited_for = True

    def query(self) -> bool:
        return self.has_happened


@pytest.mark.parametrize(
    ("happened", "num_done"), [((False,), 1), ((False, True, True, False, True), 3), ((True, False), 1)]
)
def test_copies_that_have_ended_meanwhile_are_noted_with_the_first(happened: tuple[bool, ...], num_done: int) -> None:
    copying = Copying(cast("Any", SimpleNamespace(recorder=None)), cast("Any", None))
    events = [Ended(has_happened=one) for one in happened]
    chunks = [cast("Filled", number) for number in range(len(happened))]
    done, error = copying._wait(list(zip(chunks, events, strict=True)))
    assert (done, error) == (chunks[:num_done], None)
    assert [event.was_waited_for for event in events] == [True] + [False] * (len(events) - 1)
