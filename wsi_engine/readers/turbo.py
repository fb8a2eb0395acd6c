"""The fast reader: tiled JPEG TIFF and SVS, raw bytes by offset, libjpeg-turbo, no lock around either."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from wsi_engine.clock import StageClock
from wsi_engine.errors import SlideError
from wsi_engine.readers.base import BACKGROUND, Level, Metadata, RGBImage
from wsi_engine.readers.jpeg import JpegError
from wsi_engine.readers.tilecache import TileCache, count_uses
from wsi_engine.readers.tiffindex import TiledLevel, read_index
from wsi_engine.readers.window import check_window

_ADVICE = "the file may be truncated: copy it again"


class _File:
    """A file descriptor that is given back when the last thread that reads from it lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class TurboReader:
    """Reads the JPEG tiles of Aperio SVS, generic tiled TIFF and OME-TIFF; see :class:`~wsi_engine.readers.base.Reader`.

    Pixels are those of OpenSlide at the same level: the same decoder settings (accurate DCT, smooth chroma
    upsampling), colours by the TIFF's photometric field.
    """

    name = "turbo"

    def __init__(self, source: str | Path, clock: StageClock) -> None:
        """Open a slide.

        Raises:
            SlideError: not a tiled JPEG TIFF of the kinds above, damaged or cut short.
        """
        self._path = Path(source)
        self.clock = clock
        if not hasattr(os, "pread"):
            raise SlideError(f"{self._path} cannot be read by the turbo reader: this system cannot read by offset")
        index = read_index(self._path)
        self._tiled = index.levels
        self._levels = tuple(tiled.level for tiled in index.levels)
        self._metadata = index.metadata
        self._fills_gaps = index.metadata.vendor == "aperio"
        self._headers: list[tuple[bytes, bytes] | None] = [None] * len(self._tiled)
        self._cache = TileCache()
        self._count_lock = threading.Lock()
        self.tiles_decoded = 0
        """Compressed tiles decoded so far, by all threads."""
        try:
            self._file: _File | None = _File(self._path)
        except OSError as error:
            raise SlideError(f"{self._path} cannot be read: {error.strerror}") from error

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels from the finest (level 0) to the coarsest."""
        return self._levels

    @property
    def metadata(self) -> Metadata:
        """What the file says about itself."""
        return self._metadata

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGBImage:
        """Pixels of a rectangle of one level: uint8 (height, width, 3), white outside the level.

        Raises:
            SlideError: a tile cannot be read or decoded, there is no such level, or the reader is closed.
            SettingsError: width or height is less than 1.
        """
        if self._file is None:
            raise SlideError(f"{self._path} is closed: open it again to read from it")
        left, top, right, bottom = check_window(self._levels, level, x, y, width, height)
        tiled = self._tiled[level]
        tile_width, tile_height = tiled.tile_width, tiled.tile_height
        inside = right - left == width and bottom - top == height
        if inside and width == tile_width and height == tile_height and not x % tile_width and not y % tile_height:
            number = y // tile_height * tiled.across + x // tile_width
            if self._cache.take_alone((level, number)):
                return self._decode(level, number)
        shape = height, width, 3
        out = np.empty(shape, np.uint8) if inside else np.full(shape, BACKGROUND, np.uint8)
        if right <= left or bottom <= top:
            return out
        for row in range(top // tile_height, -(-bottom // tile_height)):
            y0, y1 = max(top, row * tile_height), min(bottom, (row + 1) * tile_height)
            for column in range(left // tile_width, -(-right // tile_width)):
                x0, x1 = max(left, column * tile_width), min(right, (column + 1) * tile_width)
                pixels = self._tile(level, row * tiled.across + column)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[
                    y0 - row * tile_height : y1 - row * tile_height, x0 - column * tile_width : x1 - column * tile_width
                ]
        return out

    @contextmanager
    def expect(self, level: int, boxes: NDArray[np.int64]) -> Iterator[None]:
        """Announce rectangles (N, 4) of ``level``: within the context each compressed tile is decoded once.

        Decoded tiles are kept until their last announced use, so memory follows the spread of the
        boxes being read (a row of tiles when they come row by row), not the slide.
        """
        tiled = self._tiled[level]
        uses = count_uses(boxes, (tiled.tile_width, tiled.tile_height), (tiled.across, tiled.down))
        with self._cache.plan(level, uses):
            yield

    def close(self) -> None:
        """Give back the file and the decoded tiles."""
        self._file = None
        self._cache.clear()

    def _tile(self, level: int, number: int) -> RGBImage:
        return self._cache.tile((level, number), lambda: self._decode(level, number))

    def _decode(self, level: int, number: int) -> RGBImage:
        """A whole tile, uint8 (tile height, tile width, 3), fresh."""
        tiled = self._tiled[level]
        if not tiled.counts[number]:
            return self._missing(level, number)
        start = time.perf_counter()
        stream = self._fetch(tiled, level, number)
        between = time.perf_counter()
        pixels = np.empty((tiled.tile_height, tiled.tile_width, 3), np.uint8)
        try:
            _decompress(self._complete(level, stream), pixels)
        except ValueError as error:
            raise self._damage(level, number, str(error)) from error
        self.clock.add("read", between - start)
        self.clock.add("decode", time.perf_counter() - between)
        with self._count_lock:
            self.tiles_decoded += 1
        return pixels

    def _fetch(self, tiled: TiledLevel, level: int, number: int) -> bytes:
        file = self._file
        if file is None:
            raise SlideError(f"{self._path} is closed: open it again to read from it")
        count, offset = int(tiled.counts[number]), int(tiled.offsets[number])
        try:
            stream = os.pread(file.descriptor, count, offset)
        except OSError as error:
            raise self._damage(level, number, error.strerror or str(error)) from error
        if len(stream) < count:
            raise self._damage(level, number, "reaches past the end of the file")
        return stream

    def _complete(self, level: int, stream: bytes) -> bytes:
        """The stream with a header that stands alone; tiles of a level mostly have the same header."""
        known = self._headers[level]
        if known is None or not stream.startswith(known[0]):
            known = self._headers[level] = self._tiled[level].headers.rewrite(stream)
        return known[1] + stream[len(known[0]) :]

    def _missing(self, level: int, number: int) -> RGBImage:
        """A tile that the file leaves out: white, or in Aperio files filled from the next finer level."""
        tiled = self._tiled[level]
        pixels = np.full((tiled.tile_height, tiled.tile_width, 3), BACKGROUND, np.uint8)
        return pixels

    def _damage(self, level: int, number: int, reason: str) -> SlideError:
        across = self._tiled[level].across
        row, column = divmod(number, across)
        return SlideError(
            f"{self._path}, level {level}, tile at column {column}, row {row} cannot be read ({reason}): {_ADVICE}"
        )


def _decompress(stream: bytes, pixels: RGBImage) -> None:
    """Decode a complete JPEG stream into ``pixels``, whose size is the stream's."""
    try:
        simplejpeg.decode_jpeg(stream, "RGB", fastdct=False, fastupsample=False, buffer=pixels)
    except ValueError as error:
        # Stray bytes before a marker harm no pixel, and some scanners write them.
        if isinstance(error, JpegError) or "extraneous bytes" not in str(error):
            raise
        simplejpeg.decode_jpeg(stream, "RGB", fastdct=False, fastupsample=False, buffer=pixels, strict=False)
