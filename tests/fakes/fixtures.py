"""Machines for loads, as fixtures; the conftest.py of a folder that wants them imports them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from tests.fakes.fuse import why_not
from tests.fakes.rig import Rig

__all__ = ["device", "make_rig", "requires_fuse", "rig"]

#: For tests that mount `filesystem.mounted`.
requires_fuse = pytest.mark.skipif(why_not() is not None, reason=f"no simulated file system: {why_not()}")


@pytest.fixture
def make_rig() -> Generator[Callable[..., Rig], None, None]:
    """Make rigs that are closed, and checked for hazards, at the end of the test."""
    rigs: list[Rig] = []

    def make(*args: Any, **options: Any) -> Rig:
        rigs.append(Rig(*args, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture(params=["host", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The real host, the fake accelerator, and CUDA where there is one."""
    return str(request.param)


@pytest.fixture(params=["buffered", "direct"])
def rig(request: pytest.FixtureRequest, device: str, make_rig: Callable[..., Rig]) -> Rig:
    """Both devices with both layouts of chunks."""
    return make_rig(device, io=request.param)
