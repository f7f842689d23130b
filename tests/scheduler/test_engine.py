"""The engine: where it runs, and the devices it names."""

from __future__ import annotations

import sys

import pytest
import torch

import weightstream as ws
from weightstream.scheduler.engine import Engine


def test_another_platform_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="runs on Linux alone, and this is darwin"):
        Engine(ws.LoaderConfig())


@pytest.mark.parametrize(("target", "expected"), [("cpu", "cpu"), ("cuda:3", "cuda:3"), ("meta", "meta")])
def test_target_that_names_a_device_is_that_device(target: str, expected: str) -> None:
    engine = Engine(ws.LoaderConfig(device={"target": target}))  # type: ignore[arg-type]  # pydantic makes the section
    try:
        assert engine.default_device() == torch.device(expected)
    finally:
        engine.close()
