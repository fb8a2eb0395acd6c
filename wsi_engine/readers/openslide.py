"""Reads SVS, NDPI, MRXS, SCN, BIF, DICOM and tiled TIFF slides through the OpenSlide library."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
from numpy.typing import NDArray
from openslide import OpenSlideError, OpenSlideUnsupportedFormatError, lowlevel

from wsi_engine.clock import StageClock
from wsi_engine.errors import SlideError
from wsi_engine.readers.base import Level, Metadata, RGBImage, level_downsample
from wsi_engine.readers.window import check_window, white_image

BLOCK = 4096
"""Side of the squares in which large rectangles are read, so that intermediate arrays stay small."""

CACHE_BYTES = 128 << 20
"""Decoded tiles that OpenSlide keeps per slide (its own default, 32 MiB, is less than a row of a large slide)."""


class OpenSlideReader:
    """Reads a slide with OpenSlide.

    Where the size of a level is no whole fraction of level 0, OpenSlide can only be asked for the
    nearest level-0 pixel: pixels are then shifted by at most half a level-0 pixel.

    An OpenSlide handle that met an error stays unusable: every later read raises SlideError.

    Args:
        source: path of a local file.
        clock: where the seconds of reading go, all under "decode" (OpenSlide reads and decodes in one call).

    Raises:
        SlideError: OpenSlide cannot read the file.
    """

    name = "openslide"

    def __init__(self, source: str | os.PathLike[str], clock: StageClock | None = None) -> None:
        self.clock = StageClock() if clock is None else clock
        self._path = os.fspath(source)
        self._handle = _open_handle(self._path)
        self._open = True
        self._reads = 0
        self._idle = threading.Condition()
        try:
            self._levels, self._scales = _list_levels(self._handle)
            self._metadata = _read_metadata(self._handle)
        except OpenSlideError as error:
            self.close()
            raise SlideError(f"cannot read {self._path}: OpenSlide says: {_one_line(error)}") from error

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels from the finest (level 0) to the coarsest."""
        return self._levels

    @property
    def metadata(self) -> Metadata:
        """What the file says about itself; ``properties`` are OpenSlide's."""
        return self._metadata

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGBImage:
        """Pixels of a rectangle of one level: uint8 (height, width, 3), white outside the level.

        Raises:
            SlideError: the reader is closed, there is no such level, or OpenSlide cannot decode the data.
            SettingsError: width or height is less than 1.
        """
        inside = check_window(self._levels, level, x, y, width, height)
        with self._in_use(), self.clock.measure("decode"):
            if (inside.right - inside.left, inside.bottom - inside.top) == (width, height):
                image = np.empty((height, width, 3), np.uint8)
            else:
                image = white_image(width, height)
            for top in range(inside.top, inside.bottom, BLOCK):
                rows = min(BLOCK, inside.bottom - top)
                for left in range(inside.left, inside.right, BLOCK):
                    columns = min(BLOCK, inside.right - left)
                    target = image[top - y : top - y + rows, left - x : left - x + columns]
                    self._read_block(level, left, top, target)
            return image

    def _read_block(self, level: int, left: int, top: int, target: RGBImage) -> None:
        """Fill ``target`` with the pixels from column ``left`` and row ``top`` of ``level``."""
        rows, columns = target.shape[:2]
        scale = self._scales[level]
        pixels: NDArray[np.uint8] = np.empty((rows, columns, 4), np.uint8)
        pointer = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
        try:
            # The library's own call, not read_region of the Python package: that one divides by alpha
            # and builds a PIL image, which costs a third of the time of a 256-px tile.
            lowlevel._read_region(self._handle, pointer, round(left * scale), round(top * scale), level, columns, rows)
        except OpenSlideError as error:
            raise SlideError(
                f"cannot read {self._path} at level {level}, x {left}, y {top}: OpenSlide says: {_one_line(error)}"
            ) from error
        _composite(pixels, target)

    def expect(self, level: int, boxes: NDArray[np.int64]) -> AbstractContextManager[None]:
        """Do nothing: OpenSlide has a cache of its own."""
        return nullcontext()

    def close(self) -> None:
        """Wait for the reads under way, then give the handle back; later reads raise SlideError."""
        with self._idle:
            if not self._open:
                return
            self._open = False
            self._idle.wait_for(lambda: self._reads == 0)
            lowlevel.close(self._handle)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keep the handle open meanwhile: closing it under a read would crash the process."""
        with self._idle:
            if not self._open:
                raise SlideError(f"cannot read {self._path}: it was closed; open it again")
            self._reads += 1
        try:
            yield
        finally:
            with self._idle:
                self._reads -= 1
                self._idle.notify_all()


def _composite(pixels: NDArray[np.uint8], target: RGBImage) -> None:
    """Put premultiplied BGRA ``pixels`` (H, W, 4) on white into ``target`` (H, W, 3)."""
    alpha = pixels[..., 3]
    if alpha.min() == 255:
        for channel in range(3):
            target[..., channel] = pixels[..., 2 - channel]
        return
    white = 255 - alpha
    for channel in range(3):
        target[..., channel] = np.minimum(pixels[..., 2 - channel], alpha) + white


def _open_handle(path: str) -> lowlevel._OpenSlide:
    try:
        handle = lowlevel.open(path)
    except OpenSlideUnsupportedFormatError as error:
        raise SlideError(f"cannot read {path}: OpenSlide does not know this kind of file") from error
    except OpenSlideError as error:
        raise SlideError(f"cannot read {path}: OpenSlide says: {_one_line(error)}") from error
    if lowlevel.cache_create.available:
        lowlevel.set_cache(handle, lowlevel.cache_create(CACHE_BYTES))
    return handle


def _list_levels(handle: lowlevel._OpenSlide) -> tuple[tuple[Level, ...], tuple[float, ...]]:
    """Return the levels, and OpenSlide's own downsamples, by which its coordinates are converted."""
    count = lowlevel.get_level_count(handle)
    sizes = [lowlevel.get_level_dimensions(handle, level) for level in range(count)]
    levels = tuple(Level(width, height, level_downsample(sizes[0], (width, height))) for width, height in sizes)
    return levels, tuple(lowlevel.get_level_downsample(handle, level) for level in range(count))


def _read_metadata(handle: lowlevel._OpenSlide) -> Metadata:
    properties = {name: lowlevel.get_property_value(handle, name) for name in lowlevel.get_property_names(handle)}
    vendor = properties.get("openslide.vendor", "unknown")
    across = _number(properties.get("openslide.mpp-x"))
    down = _number(properties.get("openslide.mpp-y"))
    mpp = None if across is None or down is None else (across, down)
    source = None
    if mpp is not None:
        # For a TIFF of no known scanner OpenSlide takes the resolution tags, which any program may have written.
        source = "TIFF resolution" if vendor == "generic-tiff" else "openslide.mpp-x"
    objective = _number(properties.get("openslide.objective-power"))
    return Metadata(vendor=vendor, mpp=mpp, mpp_source=source, objective=objective, properties=properties)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
