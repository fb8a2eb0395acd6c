"""From a slide to masks and maps, window by window: read ahead by threads, each window the same whatever the tiles."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.nuclei.frame import Frame, FrameReader, TissueRaster
from wsi_engine.nuclei.method import FittedMethod, NucleiMethod

_AHEAD = 3
"""Tiles that wait for the method."""

_SIDE_STEP = 64
"""Windows of small frames have sides of multiples of this, so that few shapes occur."""


@dataclass(frozen=True, eq=False)
class WindowMaps:
    """A window of the slide after the method has seen it, in pixels of the method's maps.

    Attributes:
        key: its row and column in the lattice of windows.
        x: its first column on the slide.
        y: its first row.
        mask: bool (h, w).
        maps: float32 (C, h, w).
        pixels: uint8 (h / d, w / d, 3).
        detail: pixels of the maps along one pixel, d.
    """

    key: tuple[int, int]
    x: int
    y: int
    mask: NDArray[np.bool_]
    maps: NDArray[np.float32]
    pixels: NDArray[np.uint8]
    detail: int = 1


@dataclass(frozen=True)
class _Tile:
    x: int
    y: int
    width: int
    height: int


class WindowPlan:
    """The tiles of a frame that have tissue, in rows from the top, and the windows in them.

    A window is a whole tile, or a square of the method's ``window_px`` where it asks for such, smaller on a frame that
    is smaller itself; the side of the tiles, ``tile_px``, is then rounded up to whole windows.
    """

    def __init__(self, reader: FrameReader, raster: TissueRaster, method: NucleiMethod, tile_px: int) -> None:
        frame = reader.frame
        self.side = side = _choose_side(frame, method) or tile_px
        tile_px = -(-tile_px // side) * side
        self._reader, self._raster, self._method = reader, raster, method
        corners = itertools.product(range(0, frame.height, tile_px), range(0, frame.width, tile_px))
        tiles = [_Tile(x, y, min(tile_px, frame.width - x), min(tile_px, frame.height - y)) for y, x in corners]
        self._tiles = [tile for tile in tiles if raster.any(tile.x, tile.y, tile.width, tile.height)]
        self._windows = {tile: [w for w in self._cut(tile) if raster.any(*w)] for tile in self._tiles}
        self.keys = {(y // side, x // side) for windows in self._windows.values() for x, y, _, _ in windows}
        """Row and column of every window that will come."""

    def __len__(self) -> int:
        return len(self._tiles)

    def stream(self, fitted: FittedMethod, workers: int) -> Iterator[list[WindowMaps]]:
        """The windows of each tile, tiles in rows from the top; memory does not grow with the slide.

        Raises:
            SlideError: the slide cannot be read.
        """
        waiting: deque[tuple[_Tile, Future[NDArray[np.uint8]]]] = deque()
        left = iter(self._tiles)
        with ThreadPoolExecutor(workers, "nuclei-read") as pool, self._reader.expect(self._boxes()):
            try:
                while True:
                    for tile in itertools.islice(left, _AHEAD - len(waiting)):
                        waiting.append((tile, pool.submit(self._read, tile)))
                    if not waiting:
                        return
                    tile, future = waiting.popleft()
                    yield self._apply(fitted, tile, future.result())
            finally:
                for _, future in waiting:
                    future.cancel()

    def _cut(self, tile: _Tile) -> list[tuple[int, int, int, int]]:
        """Windows of a tile: x, y, width, height, cut at the frame's edge."""
        side = self.side
        corners = itertools.product(range(0, tile.height, side), range(0, tile.width, side))
        return [(tile.x + x, tile.y + y, min(side, tile.width - x), min(side, tile.height - y)) for y, x in corners]

    @property
    def _reach(self) -> int:
        return self._method.margin_px + self._method.clean_px

    def _inner(self, tile: _Tile) -> tuple[int, int, int, int]:
        """What is read for a tile: x, y, width, height, its margin included as far as the frame goes."""
        reach, frame = self._reach, self._reader.frame
        x, y = max(0, tile.x - reach), max(0, tile.y - reach)
        right, bottom = min(frame.width, tile.x + tile.width + reach), min(frame.height, tile.y + tile.height + reach)
        return x, y, right - x, bottom - y

    def _boxes(self) -> NDArray[np.int64]:
        return np.array([self._inner(tile) for tile in self._tiles], np.int64).reshape(-1, 4)

    def _read(self, tile: _Tile) -> NDArray[np.uint8]:
        """A tile with its margin; beyond the frame goes on its mirror image.

        With windows of one shape the tile is continued to whole windows.
        """
        x, y, width, height = self._inner(tile)
        pixels = self._reader.read(x, y, width, height)
        frame = self._reader.frame
        spread_x = self._spread(tile.x, tile.width, frame.width, x, width)
        spread_y = self._spread(tile.y, tile.height, frame.height, y, height)
        if len(spread_x) == width and len(spread_y) == height:
            return pixels
        return pixels[spread_y[:, None], spread_x]  # rows stay rows in memory

    def _spread(self, start: int, size: int, extent: int, first: int, read: int) -> NDArray[np.int64]:
        """Which of the pixels read stands at each place of a tile with its margin, along one axis."""
        whole = size if self._method.window_px is None else -(-size // self.side) * self.side
        places = np.arange(start - self._reach, start + whole + self._reach) % (2 * extent)
        mirrored = np.minimum(places, 2 * extent - 1 - places)
        # Beyond the margin of what counts nothing matters but the shape.
        out: NDArray[np.int64] = np.clip(mirrored - first, 0, read - 1)
        return out

    def _apply(self, fitted: FittedMethod, tile: _Tile, pixels: NDArray[np.uint8]) -> list[WindowMaps]:
        """Maps and masks of a tile's windows."""
        reach, method = self._reach, self._method
        windows = self._windows[tile]
        cut = []
        for x, y, width, height in windows:
            wide, high = (width, height) if method.window_px is None else (self.side, self.side)
            top, left = y - tile.y, x - tile.x
            cut.append(pixels[top : top + high + 2 * reach, left : left + wide + 2 * reach])
        maps = fitted.foreground(
            np.ascontiguousarray(np.stack(cut)) if len(cut) > 1 else np.ascontiguousarray(cut[0])[None]
        )
        return [self._finish(fitted, *some) for some in zip(windows, cut, maps, strict=True)]

    def _finish(
        self,
        fitted: FittedMethod,
        window: tuple[int, int, int, int],
        pixels: NDArray[np.uint8],
        maps: NDArray[np.float32],
    ) -> WindowMaps:
        """The mask of a window from maps that reach ``clean_px`` beyond it, cut at the frame's edge."""
        x, y, width, height = window
        frame, clean, reach, detail = self._reader.frame, self._method.clean_px, self._reach, self._method.detail
        above, before = min(clean, y), min(clean, x)
        below, behind = min(clean, frame.height - y - height), min(clean, frame.width - x - width)
        inside = _cut(maps, clean - above, clean - before, above + height + below, before + width + behind, detail)
        mask = _cut(fitted.mask(np.ascontiguousarray(inside)), above, before, height, width, detail)
        tissue = self._raster.of(x, y, width, height)
        return WindowMaps(
            key=(y // self.side, x // self.side),
            x=x * detail,
            y=y * detail,
            mask=np.ascontiguousarray(mask if tissue is None else mask & _enlarge(tissue, detail)),
            maps=_cut(maps, clean, clean, height, width, detail),
            pixels=pixels[reach : reach + height, reach : reach + width],
            detail=detail,
        )


def _choose_side(frame: Frame, method: NucleiMethod) -> int | None:
    """Side of the windows of a method that wants one shape: the same for a frame, whatever the tiles."""
    if method.window_px is None:
        return None
    step = math.lcm(_SIDE_STEP, math.gcd(method.window_px, method.margin_px))  # as a network's halvings ask for
    return min(method.window_px, -(-max(frame.width, frame.height) // step) * step)


def _cut(values: NDArray[Any], top: int, left: int, height: int, width: int, detail: int) -> NDArray[Any]:
    """A part of maps (..., H, W), given in pixels of the windows."""
    rows = slice(top * detail, (top + height) * detail)
    return values[..., rows, left * detail : (left + width) * detail]


def _enlarge(values: NDArray[Any], detail: int) -> NDArray[Any]:
    """Each pixel of (H, W, ...) repeated to a square of ``detail``²."""
    return values if detail == 1 else values.repeat(detail, axis=0).repeat(detail, axis=1)
