"""Rectangles of a level: checked, and cut to the part that has pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.readers.base import BACKGROUND, Level, RGBImage


class Window(NamedTuple):
    """A rectangle in a level's pixels: columns ``left`` to ``right`` - 1, rows ``top`` to ``bottom`` - 1."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def empty(self) -> bool:
        """Whether the rectangle holds no pixel."""
        return self.right <= self.left or self.bottom <= self.top


def check_window(levels: Sequence[Level], level: int, x: int, y: int, width: int, height: int) -> Window:
    """Return the part of a rectangle that lies inside its level (empty where none does).

    Raises:
        SlideError: there is no such level.
        SettingsError: width or height is less than 1.
    """
    if not 0 <= level < len(levels):
        raise SlideError(f"the slide has no level {level}; its levels are 0 to {len(levels) - 1}")
    if width < 1 or height < 1:
        raise SettingsError(f"cannot read a rectangle of {width} x {height} pixels; ask for at least 1 x 1")
    size = levels[level]
    left, top = max(int(x), 0), max(int(y), 0)
    return Window(left, top, min(int(x) + int(width), size.width), min(int(y) + int(height), size.height))


def white_image(width: int, height: int) -> RGBImage:
    """Return an image without tissue or slide: all :data:`BACKGROUND`, uint8 (height, width, 3)."""
    return np.full((height, width, 3), BACKGROUND, np.uint8)
