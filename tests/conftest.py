"""What every test has: an environment without our variables, and a reason when there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

#: The same examples in every run; `make soak` chooses others, by a seed that it prints, and 25 times as many.
settings.register_profile("test", deadline=None, derandomize=True)
settings.register_profile("soak", deadline=None, max_examples=2500, print_blob=True)
settings.load_profile("test")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("WEIGHTSTREAM_")]:
        monkeypatch.delenv(name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
