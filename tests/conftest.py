"""What every test has: an environment without our variables, and a reason when there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("WEIGHTSTREAM_")]:
        monkeypatch.delenv(name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
