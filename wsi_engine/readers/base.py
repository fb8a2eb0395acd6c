"""The contract of a reader: levels, metadata, and pixels of a level by rectangle."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wsi_engine.clock import StageClock
from wsi_engine.errors import SlideError

RGBImage: TypeAlias = NDArray[np.uint8]
"""An RGB image, uint8, shape (height, width, 3)."""

BACKGROUND = 255
"""Value of every channel where a slide has no pixels: the white of an empty glass slide."""


class DamagedError(SlideError):
    """The file is of a kind this reader reads, but it is broken: no other reader should be tried.

    Private to the readers: ``open_reader`` uses it to stop at a truncated slide that another reader
    would open and then fail on in the middle of a run.
    """


@dataclass(frozen=True)
class Level:
    """One resolution of a slide's pyramid.

    ``downsample`` is the number of level-0 pixels along one pixel of this level (1.0 for level 0).
    """

    width: int
    height: int
    downsample: float


@dataclass(frozen=True)
class Metadata:
    """What a file says about itself.

    ``mpp`` is micrometres per level-0 pixel (x, y) as the header gives it, unchecked, or None;
    ``mpp_source`` names the header field it was read from. ``objective`` is the power the header
    names (20, 40, …), for display only: no scale is ever derived from it.
    """

    vendor: str
    mpp: tuple[float, float] | None = None
    mpp_source: str | None = None
    objective: float | None = None
    properties: Mapping[str, str] = field(default_factory=dict)


class Reader(Protocol):
    """What every reader provides. All methods may be called from several threads at once.

    A reader is built with ``SomeReader(source, clock)`` and raises
    :class:`~wsi_engine.errors.SlideError` for a source it cannot read.
    """

    name: str
    clock: StageClock

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels from the finest (level 0) to the coarsest."""
        ...

    @property
    def metadata(self) -> Metadata:
        """What the file says about itself."""
        ...

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGBImage:
        """Pixels of a rectangle of one level, all numbers in that level's pixels.

        The rectangle may reach or lie outside the level; what lies outside is white
        (:data:`BACKGROUND`). Returns a fresh, C-contiguous uint8 array (height, width, 3).

        Raises:
            SlideError: the file ends early or its data cannot be decoded.
        """
        ...

    def expect(self, level: int, boxes: NDArray[np.int64]) -> AbstractContextManager[None]:
        """Announce the rectangles that will be read from ``level``, each once, in roughly this order.

        ``boxes`` is (N, 4): x, y, width, height. A reader may use it to share work between
        overlapping rectangles; reading others meanwhile stays allowed.
        """
        ...

    def close(self) -> None:
        """Give back file handles and caches; later reads raise SlideError."""
        ...


@runtime_checkable
class DirectReader(Reader, Protocol):
    """A reader that decodes into the caller's memory, and can shrink a level for less than decoding all of it costs.

    ``reductions`` are the factors it can shrink by, ascending from 1; rectangles are then in pixels of that size, of
    which a level holds width // reduce by height // reduce.
    """

    reductions: tuple[int, ...]

    def read_into(self, out: RGBImage, level: int, x: int, y: int, reduce: int = 1) -> None:
        """:meth:`Reader.read` of a rectangle of the size of ``out``, uint8 (height, width, 3), into it."""
        ...

    def expect(self, level: int, boxes: NDArray[np.int64], reduce: int = 1) -> AbstractContextManager[None]:
        """:meth:`Reader.expect` at a reduction."""
        ...


def level_downsample(base: tuple[int, int], size: tuple[int, int]) -> float:
    """Level-0 pixels per pixel of a level, from the (width, height) of level 0 and of that level.

    Scanners round level sizes, so the ratio of sizes is off by up to one pixel in the level's
    width: 46,000 / 11,499 is 4.0003 while the level was made by halving twice. Where an integer
    explains both sizes it is taken, else the mean of the two ratios.
    """
    ratios = base[0] / size[0], base[1] / size[1]
    nearest = round(sum(ratios) / 2)
    if nearest >= 1 and all(abs(full / nearest - part) < 1 for full, part in zip(base, size, strict=True)):
        return float(nearest)
    return sum(ratios) / 2
