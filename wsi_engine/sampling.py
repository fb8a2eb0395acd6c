"""Which level to read, and which of its pixels, for a rectangle at a given scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_engine.readers.base import Level

FINER_BY = 1.02
"""A level may be up to 2 % coarser than asked for: scanners' levels of nominal scale are off by that much,
and reading the level below instead would cost four to sixteen times the pixels for no visible gain."""

_ROUNDING = 1e-6
"""Positions closer than this to a pixel's edge, in pixels, lie on it."""


@dataclass(frozen=True)
class Sampling:
    """How pixels at one scale are taken from one level.

    The reader may shrink the level by ``reduce`` while it decodes; "read pixels" are the level's after that.
    ``to_level`` is level-0 pixels per read pixel; ``scale`` is read pixels per output pixel along x and y (1.0: the
    read pixels themselves; below 1: they are coarser than asked for).
    """

    level: int
    to_level: float
    scale: tuple[float, float]
    reduce: int = 1

    @property
    def size_level0(self) -> tuple[float, float]:
        """Level-0 pixels along one output pixel, x and y."""
        return self.scale[0] * self.to_level, self.scale[1] * self.to_level

    def corner(self, x: float, y: float) -> tuple[float, float]:
        """The (fractional) position, in read pixels, of a level-0 position."""
        return x / self.to_level, y / self.to_level

    def boxes(self, origins: NDArray[np.int64], width: int, height: int) -> NDArray[np.int64]:
        """Rectangles of read pixels that hold everything ``width`` × ``height`` output pixels need.

        Args:
            origins: int64, (N, 2), level-0 top-left corners.
            width: output pixels along x.
            height: output pixels along y.

        Returns:
            int64, (N, 4): x, y, width, height in read pixels.
        """
        columns = []
        for axis, size in ((0, width), (1, height)):
            scale = self.scale[axis]
            margin = 1.0 if scale < 1 else 0.0  # linear interpolation looks at the neighbours
            start = origins[:, axis] / self.to_level
            low = np.floor(start - margin + _ROUNDING)
            high = np.ceil(start + size * scale + margin - _ROUNDING)
            columns.append((low, high - low))
        (x, w), (y, h) = columns
        return np.stack([x, y, w, h], axis=1).astype(np.int64)

    def box(self, x: int, y: int, width: int, height: int) -> tuple[int, int, int, int]:
        """:meth:`boxes` of one rectangle, as plain numbers: thousands a second pass here."""
        left, w = self._span(x, width, self.scale[0])
        top, h = self._span(y, height, self.scale[1])
        return left, top, w, h

    def _span(self, start: int, size: int, scale: float) -> tuple[int, int]:
        margin = 1.0 if scale < 1 else 0.0
        begin = start / self.to_level
        low = math.floor(begin - margin + _ROUNDING)
        return low, math.ceil(begin + size * scale + margin - _ROUNDING) - low


def choose_sampling(
    levels: Sequence[Level], slide_mpp: tuple[float, float], mpp: float, reductions: Sequence[int] = (1,)
) -> Sampling:
    """The coarsest level that is still as fine as ``mpp`` (within :data:`FINER_BY`), and the scale left to do.

    From that level on the strongest reduction is taken that is still as fine.

    Args:
        levels: levels of the slide, finest first.
        slide_mpp: micrometres per level-0 pixel, x and y.
        mpp: micrometres per output pixel asked for.
        reductions: factors by which the reader can shrink a level while decoding, ascending from 1.
    """
    wanted = mpp / slide_mpp[0], mpp / slide_mpp[1]  # level-0 px per output px
    finest = min(wanted) * FINER_BY
    level = max((i for i, one in enumerate(levels) if one.downsample <= finest), default=0)
    reduce = max((r for r in reductions if levels[level].downsample * r <= finest), default=1)
    to_level = levels[level].downsample * reduce
    return Sampling(level, to_level, (_snap(wanted[0] / to_level), _snap(wanted[1] / to_level)), reduce)


def _snap(scale: float) -> float:
    """An exact integer where only rounding of the division kept the scale from it."""
    return float(round(scale)) if abs(scale - round(scale)) < 1e-9 and round(scale) >= 1 else scale
