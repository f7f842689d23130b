"""Which colours a picture has, and how much of each kind of bar is in it."""

from __future__ import annotations

from typing import Any

import pytest

from weightstream.drawing.chart import COLORS

__all__ = ["pixels_like"]


def pixels_like(picture: Any, kind: str, box: tuple[int, int, int, int] | None = None) -> float:
    """The share of a picture's pixels, or of a box in it, that have a kind's colour. Bars are translucent, and lie on white."""
    with pytest.importorskip("PIL.Image").open(picture) as opened:
        pixels = opened.convert("RGB").crop(box or (0, 0, *opened.size))
        colors = pixels.getcolors(maxcolors=pixels.width * pixels.height)
    wanted = bytes.fromhex(COLORS[kind][1:])
    like = [
        count
        for count, color in colors
        if all(full - 8 <= found <= full + 0.25 * (255 - full) for found, full in zip(color, wanted, strict=True))
    ]
    share: float = sum(like) / (pixels.width * pixels.height)
    return share
