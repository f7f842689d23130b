"""Fixtures for the folder: machines made of fakes; a seed for what is chosen at random."""

from __future__ import annotations

import os
import random

import pytest

from tests.fakes.fixtures import device, make_rig, rig

__all__ = ["device", "make_rig", "rig"]


@pytest.fixture(name="choose")
def fixture_choose(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers: the same in every ordinary run; by SEED, or any, where the marker is `soak`. The seed is printed."""
    seed = os.environ.get("SEED", "0")
    if request.node.get_closest_marker("soak") and "SEED" not in os.environ:
        seed = str(random.SystemRandom().randrange(2**24))
    print(f"SEED={seed}")  # noqa: T201 - pytest shows it with a failure, and `make soak` always
    return random.Random(int(seed))
