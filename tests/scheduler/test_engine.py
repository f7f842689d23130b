"""The engine: where it runs, and the devices it names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import leaves_nothing, write_checkpoint
from weightstream.prefetch.mapping import Prefault
from weightstream.prefetch.readers import Thread
from weightstream.prefetch.source import ByteRange
from weightstream.scheduler.clock import SystemClock
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.machine import Machine


def test_closed_engine_holds_no_mapped_file() -> None:
    class Idle(SystemClock):
        """Its threads do nothing."""

        def spawn(self, target: Callable[[], None], name: str) -> Thread:
            return super().spawn(lambda: None, name)

    engine = Engine(ws.LoaderConfig(), Machine(clock=Idle()))
    work = Prefault([memoryview(bytearray(100))], [ByteRange(0, 0, 100)])
    engine.prefault(work)
    assert not work.is_done
    engine.close()
    assert work.is_done


def test_engine_that_nobody_holds_yet_has_no_thread() -> None:
    """Ctrl-C may come before whoever makes it can close it."""
    with leaves_nothing():
        Engine(ws.LoaderConfig())


def test_another_platform_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="runs on Linux alone, and this is darwin"):
        Engine(ws.LoaderConfig())


@pytest.mark.parametrize("target", ["cpu", "cpu:0"])
def test_target_that_names_a_device_is_that_device(target: str) -> None:
    engine = Engine(ws.LoaderConfig(device={"target": target}))  # type: ignore[arg-type]  # pydantic makes the section
    try:
        assert engine.default_device() == torch.device("cpu")
    finally:
        engine.close()


@pytest.mark.parametrize("target", ["bogus", "meta", "cuda:99"])
def test_load_onto_a_device_that_is_not_there_changes_nothing(target: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    model = nn.Linear(2, 2, device="meta")
    config = ws.LoaderConfig(device={"target": target})  # type: ignore[arg-type]  # see above
    with pytest.raises(ws.PlacementError, match=f"device.target: there is no {target} here"):
        ws.load_sync(model, path, config=config)
    assert model.weight.is_meta
