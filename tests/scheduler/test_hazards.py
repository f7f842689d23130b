"""No slot is reused before its last copy; and if one were, the fake accelerator would see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import assert_same, bytes_of, write_in_order
from tests.fakes.accelerator import FRESH, FakeAccelerator
from tests.fakes.rig import KIB, Rig
from tests.fakes.ring import STALE
from tests.models import SmallNet, tensors_of
from weightstream.device.backend import Event
from weightstream.scheduler import pipeline
from weightstream.scheduler.course import Filled
from weightstream.scheduler.flow import Flow

MakeRig = Callable[..., Rig]


@pytest.mark.parametrize("num_slots", [2, 5], ids=["2-slots", "5-slots"])
@pytest.mark.parametrize("copy_bytes_per_s", [100 * KIB, 10_000 * KIB], ids=["slow-copies", "fast-copies"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["same-dtype", "cast"])
@pytest.mark.parametrize("where", ["meta", "cpu"], ids=["adopt", "in-place"])
@pytest.mark.parametrize("io", ["buffered", "direct"])
async def test_ordinary_load_has_no_hazard(
    make_rig: MakeRig,
    tmp_path: Path,
    io: str,
    where: str,
    stored: torch.dtype,
    copy_bytes_per_s: float,
    num_slots: int,
) -> None:
    rig = make_rig(io=io, read_bytes_per_s=1000 * KIB, copy_bytes_per_s=copy_bytes_per_s)
    with torch.device(where):
        model = SmallNet()
    tensors = tensors_of(model, dtype=stored)
    path = write_in_order(tmp_path, tensors, num_shards=2)
    async with rig.loader(num_slots=num_slots, workers=3) as loader:
        report = await loader.load(model, path)
    assert rig.accelerator.hazards == []
    assert rig.accelerator.num_copies + rig.accelerator.num_spreads == report.num_copies > num_slots
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name].to(tensor.dtype))


def bytes_in(tensor: torch.Tensor) -> set[int]:
    return set(bytes_of(tensor))


class ForgetfulAccelerator(FakeAccelerator):
    """Says of every copy that it has happened already."""

    def record(self) -> Event | None:
        return None


class HastyEvent:
    def synchronize(self) -> None:
        """Wait for nothing."""

    def query(self) -> bool:
        return True


class HastyAccelerator(FakeAccelerator):
    """Has events that are complete before the copies are."""

    def record(self) -> Event | None:
        return HastyEvent()


class HastyFlow(Flow):
    """Gives a slot back as soon as its copies have been submitted."""

    def submitted(self, filled: Sequence[Filled], events: Sequence[Event | None]) -> None:
        super().submitted(filled, [None] * len(events))


@pytest.mark.parametrize(
    ("accelerator", "flow"),
    [(ForgetfulAccelerator, Flow), (HastyAccelerator, Flow), (FakeAccelerator, HastyFlow)],
    ids=["no-event", "event-complete-at-once", "slot-released-at-once"],
)
@pytest.mark.parametrize("io", ["buffered", "direct"])
async def test_slot_that_is_reused_too_early_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, io: Any, accelerator: type[FakeAccelerator], flow: type[Flow]
) -> None:
    """The stage is broken on purpose: what the tests above rely on is that this would show."""
    monkeypatch.setattr(pipeline, "Flow", flow)
    rig = Rig(io=io, accelerator=accelerator)
    with torch.device("meta"):
        model = SmallNet()
    tensors = tensors_of(model)
    path = write_in_order(tmp_path, tensors)
    rig.accelerator.hold()
    async with rig.loader(num_slots=2) as loader:
        await loader.load(model, path)  # "done", though nothing has been copied yet
        assert bytes_in(model.large.weight) == {FRESH}
    rig.accelerator.close()
    assert len(rig.accelerator.hazards) == rig.accelerator.num_done > 2
    assert bytes_in(model.large.weight) == {STALE}
    with pytest.raises(AssertionError):
        rig.close()
