"""The machines of these tests."""

from __future__ import annotations

from tests.fakes.fixtures import make_rig

__all__ = ["make_rig"]
