"""The fast reader: tiled JPEG TIFF and SVS, raw bytes by offset, libjpeg-turbo, no lock around either."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from wsi_engine.clock import StageClock
from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.readers.base import BACKGROUND, Level, Metadata, RGBImage
from wsi_engine.readers.jpeg import JpegError
from wsi_engine.readers.tiffindex import ADVICE, TiledLevel, read_index
from wsi_engine.readers.tilecache import Layer, TileCache, count_uses
from wsi_engine.readers.window import check_window, white_image

_MAX_FILL_PIXELS = 1 << 26
"""Pixels of the finer level from which a missing tile is made, at most (192 MiB)."""


class _File:
    """A file descriptor that is given back when the last thread that reads from it lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class TurboReader:
    """Reads the JPEG tiles of Aperio SVS, generic tiled TIFF and OME-TIFF.

    Pixels are those of OpenSlide at the same level: the same decoder settings (accurate DCT, smooth chroma
    upsampling), colours by the TIFF's photometric field. Levels inside SubIFDs, of which OpenSlide shows
    none, are read too.

    Args:
        source: path of a local file.
        clock: where the seconds of reading go: "read" for fetching bytes, "decode" for the JPEG tiles.

    Raises:
        SlideError: not a tiled JPEG TIFF of the kinds above; DamagedError where it is one but is cut short.
    """

    name = "turbo"

    def __init__(self, source: str | os.PathLike[str], clock: StageClock | None = None) -> None:
        self.clock = StageClock() if clock is None else clock
        self._path = Path(source)
        if not hasattr(os, "pread"):
            raise SlideError(f"cannot read {self._path}: this system cannot read by offset, which turbo needs")
        index = read_index(self._path)
        self._tiled = index.levels
        self._levels = tuple(tiled.level for tiled in index.levels)
        self._metadata = index.metadata
        self._fills_gaps = index.metadata.vendor == "aperio"
        self.reductions = _reductions(index.levels)
        """Factors by which :meth:`read` can shrink a level while decoding, ascending from 1."""
        self._by_reduction = {reduce: tuple(_shrink(lv, reduce) for lv in self._levels) for reduce in self.reductions}
        self._headers: list[tuple[bytes, bytes] | None] = [None] * len(self._tiled)
        self._cache = TileCache()
        self._memory = threading.local()
        self._count_lock = threading.Lock()
        self.tiles_decoded = 0
        """Compressed tiles decoded so far, by all threads."""
        try:
            self._file: _File | None = _File(self._path)
        except OSError as error:
            raise SlideError(f"cannot read {self._path}: {error.strerror}") from error

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels from the finest (level 0) to the coarsest."""
        return self._levels

    @property
    def metadata(self) -> Metadata:
        """What the file says about itself."""
        return self._metadata

    def read(self, level: int, x: int, y: int, width: int, height: int, reduce: int = 1) -> RGBImage:
        """Pixels of a rectangle of one level: uint8 (height, width, 3), white outside the level.

        With ``reduce`` 2, 4 or 8 (one of :attr:`reductions`) libjpeg-turbo decodes straight to a half, a quarter or an
        eighth of the level's size, by fewer coefficients of the cosine transform. The rectangle is then in pixels of
        that size, of which a level holds width // reduce by height // reduce.

        Raises:
            SlideError: a tile cannot be read or decoded, there is no such level, or the reader is closed.
            SettingsError: width or height is less than 1, or there is no such reduction.
        """
        out = np.empty((max(height, 0), max(width, 0), 3), np.uint8)
        self.read_into(out, level, x, y, reduce)
        return out

    def read_into(self, out: RGBImage, level: int, x: int, y: int, reduce: int = 1) -> None:
        """:meth:`read` of a rectangle of the size of ``out``, uint8 (height, width, 3), into it."""
        height, width = out.shape[:2]
        inside = check_window(self._reduced(reduce), level, x, y, width, height)
        self._open_file()
        layer, tiled = (level, reduce), self._tiled[level]
        tile_width, tile_height, across = tiled.tile_width // reduce, tiled.tile_height // reduce, tiled.across
        whole = inside.right - inside.left == width and inside.bottom - inside.top == height
        if whole and (width, height) == (tile_width, tile_height) and not (x % tile_width or y % tile_height):
            number = y // tile_height * across + x // tile_width
            if self._cache.take_alone((layer, number), otherwise=True):
                if out.flags.c_contiguous:
                    self._decode(layer, number, out)
                else:
                    out[...] = self._decode(layer, number, self._scratch(layer))
                return
        if not whole:
            out[...] = BACKGROUND
        if inside.empty:
            return
        left, top, right, bottom = inside
        for row in range(top // tile_height, -(-bottom // tile_height)):
            tile_top = row * tile_height
            y0, y1 = max(top, tile_top), min(bottom, tile_top + tile_height)
            for column in range(left // tile_width, -(-right // tile_width)):
                tile_left = column * tile_width
                x0, x1 = max(left, tile_left), min(right, tile_left + tile_width)
                pixels = self._tile(layer, row * across + column)
                part = pixels[y0 - tile_top : y1 - tile_top, x0 - tile_left : x1 - tile_left]
                out[y0 - y : y1 - y, x0 - x : x1 - x] = part

    @contextmanager
    def expect(self, level: int, boxes: NDArray[np.int64], reduce: int = 1) -> Iterator[None]:
        """Announce rectangles (N, 4) of ``level``: within the context each compressed tile is decoded once.

        ``reduce`` and the rectangles' pixels are as in :meth:`read`.

        Decoded tiles are kept until their last announced use, so memory follows the spread of the
        boxes being read (a row of tiles when they come row by row), not the slide. Should the order of
        reading make them more than :data:`~wsi_engine.readers.tilecache.PLANNED_BYTES`, the oldest
        are dropped and decoded again.

        Raises:
            SlideError: there is no such level.
        """
        check_window(self._reduced(reduce), level, 0, 0, 1, 1)
        tiled = self._tiled[level]
        tile = tiled.tile_width // reduce, tiled.tile_height // reduce
        with self._cache.plan((level, reduce), count_uses(boxes, tile, (tiled.across, tiled.down))):
            yield

    def touched_tiles(self, level: int, boxes: NDArray[np.int64], reduce: int = 1) -> NDArray[np.int64]:
        """Numbers of the compressed tiles that rectangles (N, 4) touch, as in :meth:`expect`, ascending."""
        check_window(self._reduced(reduce), level, 0, 0, 1, 1)
        tiled = self._tiled[level]
        tile = tiled.tile_width // reduce, tiled.tile_height // reduce
        return np.flatnonzero(count_uses(boxes, tile, (tiled.across, tiled.down)))

    def read_jpeg(self, level: int, number: int) -> bytes:
        """A compressed tile as a JPEG file of its own; empty where the slide leaves it out.

        Raises:
            SlideError: the tile cannot be read.
        """
        tiled = self._tiled[level]
        return self._complete(level, self._fetch(tiled, level, number)) if tiled.counts[number] else b""

    def close(self) -> None:
        """Give back the file and the decoded tiles; reads under way still end well."""
        self._file = None
        self._cache.clear()

    def _reduced(self, reduce: int) -> tuple[Level, ...]:
        """The levels at a reduction."""
        if reduce not in self._by_reduction:
            raise SettingsError(f"a reduction must be one of {', '.join(map(str, self.reductions))}, not {reduce}")
        return self._by_reduction[reduce]

    def _tile(self, layer: Layer, number: int) -> RGBImage:
        """A tile's pixels, to be copied from before this thread asks for the next."""
        if self._cache.take_alone((layer, number), otherwise=False):
            return self._decode(layer, number, self._scratch(layer))
        return self._cache.tile((layer, number), lambda: self._decode(layer, number))

    def _scratch(self, layer: Layer) -> RGBImage:
        """Memory of this thread for a tile that nobody else wants: fresh memory costs a page fault every 4 KiB."""
        shape = self._tile_shape(layer)
        pixels: RGBImage | None = getattr(self._memory, "pixels", None)
        if pixels is None or pixels.shape != shape:
            pixels = self._memory.pixels = np.empty(shape, np.uint8)
        return pixels

    def _tile_shape(self, layer: Layer) -> tuple[int, int, int]:
        level, reduce = layer
        return self._tiled[level].tile_height // reduce, self._tiled[level].tile_width // reduce, 3

    def _decode(self, layer: Layer, number: int, out: RGBImage | None = None) -> RGBImage:
        """A whole tile, uint8 (tile height, tile width, 3) over the reduction: in ``out``, or fresh."""
        level, reduce = layer
        tiled = self._tiled[level]
        pixels = np.empty(self._tile_shape(layer), np.uint8) if out is None else out
        if not tiled.counts[number]:
            pixels[...] = self._missing(level, number, reduce)
            return pixels
        start = time.perf_counter()
        stream = self._fetch(tiled, level, number)
        fetched = time.perf_counter()
        try:
            _decompress(self._complete(level, stream), pixels)
        except JpegError as error:
            raise self._damage(level, number, f"it {error}") from error
        except ValueError as error:
            raise self._damage(level, number, str(error)) from error
        self.clock.add_read(fetched - start, time.perf_counter() - fetched)
        with self._count_lock:
            self.tiles_decoded += 1
        return pixels

    def _open_file(self) -> _File:
        file = self._file
        if file is None:
            raise SlideError(f"cannot read {self._path}: it was closed; open it again")
        return file

    def _fetch(self, tiled: TiledLevel, level: int, number: int) -> bytes:
        file = self._open_file()  # held until the bytes are there: close() must not pull it away
        count, offset = int(tiled.counts[number]), int(tiled.offsets[number])
        try:
            stream = os.pread(file.descriptor, count, offset)
        except OSError as error:
            raise self._damage(level, number, error.strerror or str(error)) from error
        if len(stream) < count:
            raise self._damage(level, number, "it reaches past the end of the file")
        return stream

    def _complete(self, level: int, stream: bytes) -> bytes:
        """The stream with a header that stands alone; tiles of a level mostly have the same header."""
        known = self._headers[level]
        if known is None or not stream.startswith(known[0]):
            known = self._headers[level] = self._tiled[level].headers.rewrite(stream)
        return known[1] + stream[len(known[0]) :]

    def _missing(self, level: int, number: int, reduce: int) -> RGBImage:
        """A tile that the file leaves out: white, but made from the next finer level in Aperio's lower levels.

        OpenSlide does the same: some Aperio scanners left tiles out of lower levels by mistake.
        """
        tiled = self._tiled[level]
        width, height = tiled.tile_width // reduce, tiled.tile_height // reduce
        if level == 0 or not self._fills_gaps:
            return white_image(width, height)
        row, column = divmod(number, tiled.across)
        ratio = tiled.level.downsample / self._levels[level - 1].downsample * reduce
        left, top = column * width * ratio, row * height * ratio
        x, y = math.floor(left), math.floor(top)
        across, down = math.ceil(left + width * ratio) - x, math.ceil(top + height * ratio) - y
        if across * down > _MAX_FILL_PIXELS:
            return white_image(width, height)
        from wsi_engine.kernels.resample import resample_area  # noqa: PLC0415 - Numba, for a rare case

        finer = self.read(level - 1, x, y, across, down)
        return resample_area(finer, left - x, top - y, ratio, ratio, width, height)

    def _damage(self, level: int, number: int, reason: str) -> SlideError:
        row, column = divmod(number, self._tiled[level].across)
        return SlideError(
            f"cannot read {self._path} at level {level}, tile in column {column} of row {row}: {reason}; {ADVICE}"
        )


def _reductions(levels: Sequence[TiledLevel]) -> tuple[int, ...]:
    """Reductions at which a tile keeps a whole number of pixels."""
    sides = [side for tiled in levels for side in (tiled.tile_width, tiled.tile_height)]
    return tuple(reduce for reduce in (1, 2, 4, 8) if all(side % reduce == 0 for side in sides))


def _shrink(level: Level, reduce: int) -> Level:
    """A level at a reduction. A pixel that lies only partly inside the level is left out."""
    return Level(level.width // reduce, level.height // reduce, level.downsample * reduce)


def _decompress(stream: bytes, pixels: RGBImage) -> None:
    """Decode a complete JPEG stream into ``pixels``, whose size is the stream's over 1, 2, 4 or 8."""
    height, width = pixels.shape[:2]
    try:
        simplejpeg.decode_jpeg(stream, "RGB", False, False, height, width, buffer=pixels)
    except ValueError as error:
        # Stray bytes before a marker harm no pixel, and some scanners write them.
        if "extraneous bytes" not in str(error):
            raise
        simplejpeg.decode_jpeg(stream, "RGB", False, False, height, width, buffer=pixels, strict=False)
