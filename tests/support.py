"""What several test modules use: a picture to paint slides from, and short cuts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_engine.readers.base import Reader

Pixels = NDArray[np.uint8]

WIDTH, HEIGHT = 1100, 700
"""Size of level 0 of the generated slide."""


@dataclass(frozen=True)
class Files:
    """The generated slide, and level 0 of it as a picture without loss."""

    slide: Path
    picture: Path


def paint(x: int, y: int, width: int, height: int) -> Pixels:
    """A picture that has no two equal places, no symmetry, and three different channels."""
    rows, columns = np.mgrid[y : y + height, x : x + width].astype(np.float64)
    red = 130 + 90 * np.sin(columns / 37) * np.cos(rows / 53)
    green = 255 * (columns + 1) / (WIDTH + 1)
    blue = 255 * (rows + 1) / (HEIGHT + 1)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def read_level(reader: Reader, level: int) -> Pixels:
    """A whole level."""
    size = reader.levels[level]
    return reader.read(level, 0, 0, size.width, size.height)
