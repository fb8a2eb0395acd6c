"""Grow the levels of a pyramid while level 0 streams past, in bounded memory.

Every coarser level is the box average of the one before; its tiles are compressed as soon as a band is full and
wait in a temporary file until level 0 is done. Memory holds one band of tiles per level, so it grows with the
width of the slide and not with its area.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np

from wsi_engine.errors import SettingsError
from wsi_engine.readers.base import RGBImage
from wsi_engine.tilecodec import TileCodec

Paint: TypeAlias = Callable[[int, int, int, int], RGBImage]
"""``paint(x, y, width, height)``: level-0 pixels of a rectangle, uint8 (height, width, 3)."""

_THUMBNAIL_SIDE = 1024
_CHUNK_PX = 2048


def average_boxes(image: RGBImage, step: int) -> RGBImage:
    """Mean of each ``step`` x ``step`` box, rounded to nearest (halves up); incomplete boxes are dropped.

    ``step`` is a power of two up to 16; (H, W, 3) → (H // step, W // step, 3).
    """
    rows, columns = image.shape[0] // step * step, image.shape[1] // step * step
    total = np.full((rows // step, columns // step, 3), step * step // 2, np.uint16)
    for dy in range(step):
        for dx in range(step):
            total += image[dy:rows:step, dx:columns:step]
    total >>= 2 * (step.bit_length() - 1)
    return total.astype(np.uint8)


@dataclass
class _Level:
    """A coarse level while it grows: the band being filled, and the compressed tiles that wait."""

    width: int
    height: int
    band: RGBImage
    spool: IO[bytes] | None
    filled: int = 0
    done: int = 0
    sizes: list[int] = field(default_factory=list)

    def tiles(self) -> Iterator[bytes]:
        """Read back the compressed tiles in order."""
        assert self.spool is not None
        self.spool.seek(0)
        for size in self.sizes:
            yield self.spool.read(size)


class Pyramid:
    """Streams level-0 tiles in row order and builds the coarser levels beside them."""

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        paint: Paint,
        *,
        codec: TileCodec,
        tile_px: int,
        step: int,
        workers: int,
        temp: Path,
    ) -> None:
        """``sizes``: (width, height) of every level, each 1/``step`` of the one before; ``temp``: folder for spools."""
        self.codec = codec
        self.sizes = sizes
        self._width, self._height = sizes[0]
        self._paint, self._tile, self._step, self._window = paint, tile_px, step, workers + 1
        self._averaged = [_Level(w, h, self._new_band(w), self._spool(temp)) for w, h in sizes[1:]]
        self.levels = tuple(self._averaged)
        # Levels that are not written go on until one is small enough to be kept whole as the thumbnail.
        width, height = sizes[-1]
        while max(width, height) > _THUMBNAIL_SIDE and min(width, height) >= step:
            width, height = width // step, height // step
            self._averaged.append(_Level(width, height, self._new_band(width), None))
        self.thumbnail = np.empty((height, width, 3), np.uint8)
        self._pool = ThreadPoolExecutor(workers)

    def _spool(self, folder: Path) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=folder)

    def _new_band(self, width: int) -> RGBImage:
        return np.empty((self._tile, width, 3), np.uint8)

    def close(self) -> None:
        """Stop the threads and remove the temporary files."""
        self._pool.shutdown(cancel_futures=True)
        for level in self.levels:
            if level.spool is not None:
                level.spool.close()

    def level0_tiles(self) -> Iterator[bytes]:
        """Compressed tiles of level 0, row by row; the coarser levels are complete when it ends."""
        waiting: deque[tuple[int, int, Future[tuple[list[bytes], RGBImage | None, RGBImage]]]] = deque()
        for box in self._boxes():
            waiting.append((box[0], box[1], self._pool.submit(self._make_chunk, *box)))
            if len(waiting) > self._window:
                yield from self._take_chunk(*waiting.popleft())
        while waiting:
            yield from self._take_chunk(*waiting.popleft())

    def _boxes(self) -> Iterator[tuple[int, int, int, int]]:
        tile = self._tile
        chunk = max(1, _CHUNK_PX // tile) * tile
        for y in range(0, self._height, tile):
            for x in range(0, self._width, chunk):
                yield x, y, min(chunk, self._width - x), min(tile, self._height - y)

    def _make_chunk(self, x: int, y: int, width: int, height: int) -> tuple[list[bytes], RGBImage | None, RGBImage]:
        pixels = self._paint(x, y, width, height)
        if pixels.shape != (height, width, 3) or pixels.dtype != np.uint8:
            raise SettingsError(
                f"paint({x}, {y}, {width}, {height}) gave {pixels.dtype} {pixels.shape}: "
                f"return uint8 ({height}, {width}, 3)"
            )
        half = average_boxes(pixels, self._step) if self._averaged else None
        return [self.codec.encode(tile) for tile in self._cut(pixels)], half, pixels

    def _take_chunk(self, x: int, y: int, future: Future[tuple[list[bytes], RGBImage | None, RGBImage]]) -> list[bytes]:
        tiles, half, pixels = future.result()
        if half is None:
            self.thumbnail[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
            return tiles
        first = self._averaged[0]
        column = x // self._step
        first.band[first.filled : first.filled + half.shape[0], column : column + half.shape[1]] = half
        if x + pixels.shape[1] == self._width:
            self._grow(0, half.shape[0])
        return tiles

    def _grow(self, index: int, rows: int) -> None:
        """Note that ``rows`` more rows stand in the band of a level; when it is full, pass it on."""
        level = self._averaged[index]
        level.filled += rows
        if level.filled == 0 or (level.filled < len(level.band) and level.done + level.filled < level.height):
            return
        band = level.band[: level.filled]
        if level.spool is not None:
            for tile in self._pool.map(self.codec.encode, self._cut(band)):
                level.sizes.append(level.spool.write(tile))
        if index + 1 < len(self._averaged):
            following = self._averaged[index + 1]
            half = average_boxes(band, self._step)[:, : following.width]
            following.band[following.filled : following.filled + len(half)] = half
            self._grow(index + 1, len(half))
        else:
            self.thumbnail[level.done : level.done + level.filled] = band
        level.done += level.filled
        level.filled = 0

    def _cut(self, band: RGBImage) -> Iterator[RGBImage]:
        """Whole tiles of one band; what lies past the edge repeats the last row and column."""
        tile = self._tile
        for x in range(0, band.shape[1], tile):
            part = band[:, x : x + tile]
            missing = tile - part.shape[0], tile - part.shape[1]
            yield np.pad(part, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge") if any(missing) else part
