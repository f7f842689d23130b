"""Machines for loads."""

from __future__ import annotations

from tests.fakes.fixtures import device, make_rig, rig

__all__ = ["device", "make_rig", "rig"]
