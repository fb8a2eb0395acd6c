"""Reads TIFF slides by path or URL (``s3://``, ``https://``, ``memory://``, …) through tiffslide and fsspec."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tifffile import PHOTOMETRIC, TiffPage
from tiffslide import TiffSlide

from wsi_engine.clock import StageClock
from wsi_engine.errors import SlideError
from wsi_engine.places import explain_missing, open_file_system
from wsi_engine.readers.base import BACKGROUND, Level, Metadata, RGBImage, level_downsample
from wsi_engine.readers.image import to_rgb
from wsi_engine.readers.tables import check_tiff
from wsi_engine.readers.window import Window, check_window, white_image

BLOCK_BYTES = 1 << 20
"""Bytes fetched at once from a remote file: many tiles, and few enough not to fetch what is not asked for."""

T = TypeVar("T")

RETRY_SECONDS = (0.5, 2.0)
"""Pauses before a server is asked again."""

GIVEN_UP_SECONDS = 10.0
"""After a block could not be fetched, time for which no other one of the file is asked for."""

MAX_BLOCKS = 64
"""Fetched blocks that are kept per slide."""

_COLOURS = (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR, PHOTOMETRIC.MINISBLACK)


class TiffSlideReader:
    """Reads a TIFF slide wherever fsspec can open it.

    Credentials and addresses come from the environment, as for any program that uses fsspec:
    ``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, … and ``FSSPEC_S3_ANON=true`` for public buckets.
    Tiles are fetched through a cache of 64 blocks of 1 MiB.

    Args:
        source: path or URL.
        clock: where the seconds of reading go, all under "decode" (fetching and decoding are interleaved).

    Raises:
        SlideError: the file cannot be reached, is no TIFF slide, is cut off, or holds no 8-bit colours.
    """

    name = "tiffslide"

    def __init__(self, source: str | os.PathLike[str], clock: StageClock | None = None) -> None:
        self.clock = StageClock() if clock is None else clock
        self._where = os.fspath(source).split("?", 1)[0]  # a signed URL carries its secret after the "?"
        self._file: Any = None
        self._slide: TiffSlide | None = None
        try:
            with self.clock.measure("decode"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tiffslide warns where it knows little of a vendor
                self._file = _open_source(os.fspath(source))
                self._slide = TiffSlide(self._file)
                check_tiff(self._slide.ts_tifffile, self._where)
                _check_colours(self._slide, self._where)
                self._levels = _list_levels(self._slide)
                self._metadata = _read_metadata(self._slide)
                self._missing = [_missing_tiles(self._slide, level) for level in range(len(self._levels))]
        except SlideError:
            self.close()
            raise
        except Exception as error:  # every file system and tifffile raise errors of their own
            self.close()
            raise SlideError(f"cannot read {self._where}: {_explain(error, self._where)}") from error

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels from the finest (level 0) to the coarsest."""
        return self._levels

    @property
    def metadata(self) -> Metadata:
        """What the file says about itself; ``properties`` are tiffslide's."""
        return self._metadata

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGBImage:
        """Pixels of a rectangle of one level: uint8 (height, width, 3), white outside the level.

        Raises:
            SlideError: the reader is closed, there is no such level, or the data cannot be fetched or decoded.
            SettingsError: width or height is less than 1.
        """
        slide = self._slide
        if slide is None:
            raise SlideError(f"cannot read {self._where}: it was closed; open it again")
        inside = check_window(self._levels, level, x, y, width, height)
        if inside.empty:
            return white_image(width, height)
        with self.clock.measure("decode"):
            try:
                pixels = self._read_inside(slide, level, inside)
            except Exception as error:  # as at opening
                raise SlideError(
                    f"cannot read {self._where} at level {level}, x {x}, y {y}: {_explain(error, self._where)}"
                ) from error
            if pixels.shape[:2] == (height, width):
                return pixels
            image = white_image(width, height)
            image[inside.top - y : inside.bottom - y, inside.left - x : inside.right - x] = pixels
            return image

    def _read_inside(self, slide: TiffSlide, level: int, inside: Window) -> RGBImage:
        """Pixels of a window that lies inside the level."""
        scale = slide.level_downsamples[level]
        corner = _level0_position(inside.left, scale), _level0_position(inside.top, scale)
        size = inside.right - inside.left, inside.bottom - inside.top
        pixels: NDArray[np.uint8] = slide.read_region(corner, level, size, as_array=True)  # type: ignore[assignment]
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in {1, 3, 4}:
            raise ValueError(f"level {level} holds {pixels.dtype} of shape {pixels.shape[2:]}, unlike level 0")
        image = to_rgb(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        missing = self._missing[level]
        if missing is not None:
            tile_width, tile_height, empty = missing
            columns = np.arange(inside.left, inside.right) // tile_width
            rows = np.arange(inside.top, inside.bottom) // tile_height
            image[empty[np.ix_(rows, columns)]] = BACKGROUND
        return image

    def expect(self, level: int, boxes: NDArray[np.int64]) -> AbstractContextManager[None]:
        """Do nothing: tiles are not shared between reads."""
        return nullcontext()

    def close(self) -> None:
        """Close the file; later reads raise SlideError."""
        slide, self._slide = self._slide, None
        if slide is not None:
            slide.close()
        if hasattr(self._file, "close"):
            self._file.close()


def _open_source(source: str) -> Any:
    """Return what tiffslide opens: a path, or a file object that fetches a remote file in blocks."""
    if "://" not in source:
        return source
    system, path = open_file_system(source, attempts=1)
    cache = {"cache_type": "blockcache", "cache_options": {"maxblocks": MAX_BLOCKS}}
    file = _ask(lambda: system.open(path, "rb", block_size=BLOCK_BYTES, **cache))
    if hasattr(getattr(file, "cache", None), "fetcher"):
        file.cache.fetcher = _PersistentFetch(file.cache.fetcher)
    return file


class _PersistentFetch:
    """Fetches a range of bytes, more than once where the server stumbles.

    When it has given up, it fails at once for a while: a read asks for many blocks, and would wait for each.
    """

    def __init__(self, fetch: Callable[[int, int], bytes]) -> None:
        self._fetch = fetch
        self._gave_up = -math.inf

    def __call__(self, start: int, end: int) -> bytes:
        if time.monotonic() - self._gave_up < GIVEN_UP_SECONDS:
            raise OSError("its server did not answer a moment ago")
        try:
            return _ask(lambda: self._fetch(start, end))
        except Exception:
            self._gave_up = time.monotonic()
            raise


def _ask(action: Callable[[], T]) -> T:
    """What an action returns, which is tried again after each of the pauses."""
    for pause in RETRY_SECONDS:
        try:
            return action()
        except (FileNotFoundError, PermissionError, ImportError):
            raise
        except Exception:  # every file system has errors of its own
            time.sleep(pause)
    return action()


def _level0_position(position: int, scale: float) -> int:
    """Smallest level-0 position that tiffslide, which cuts ``position / scale`` to an integer, maps to ``position``."""
    base = math.ceil(position * scale)
    while int(base / scale) < position:  # the product may be rounded down
        base += 1
    return base


def _check_colours(slide: TiffSlide, where: str) -> None:
    page = slide.ts_tifffile.pages.first
    if page.dtype != np.uint8:
        raise SlideError(f"cannot read {where}: it stores {page.dtype} values; convert it to 8 bits per channel")
    if page.photometric not in _COLOURS or page.samplesperpixel not in {1, 3, 4}:
        kind = getattr(page.photometric, "name", page.photometric)
        raise SlideError(f"cannot read {where}: it stores {page.samplesperpixel} channels as {kind}; save it as RGB")


def _list_levels(slide: TiffSlide) -> tuple[Level, ...]:
    base = slide.level_dimensions[0]
    return tuple(Level(*size, level_downsample(base, size)) for size in slide.level_dimensions)


def _missing_tiles(slide: TiffSlide, level: int) -> tuple[int, int, NDArray[np.bool_]] | None:
    """Tile width, tile height and which tiles (rows, columns) a level has no data for; None where it has all.

    tiffslide fills such tiles with black.
    """
    if "tiffslide.series-composition" in slide.properties:
        return None
    page = slide.ts_tifffile.series[slide.properties["tiffslide.series-index"]].levels[level].keyframe
    counts = np.asarray(page.databytecounts)
    if not isinstance(page, TiffPage) or not page.is_tiled or len(page.chunked) < 2 or counts.all():
        return None
    rows, columns = math.ceil(page.imagelength / page.tilelength), math.ceil(page.imagewidth / page.tilewidth)
    return page.tilewidth, page.tilelength, counts[: rows * columns].reshape(rows, columns) == 0


def _read_metadata(slide: TiffSlide) -> Metadata:
    properties = {name: str(value) for name, value in slide.properties.items() if value is not None}
    across = _number(properties.get("tiffslide.mpp-x"))
    down = _number(properties.get("tiffslide.mpp-y"))
    mpp = None if across is None or down is None else (across, down)
    # tiffslide falls back to the resolution tags, and keeps them among the properties when it does.
    source = "TIFF resolution" if "tiff.XResolution" in properties else "tiffslide.mpp-x"
    return Metadata(
        vendor=properties.get("tiffslide.vendor", "generic-tiff"),
        mpp=mpp,
        mpp_source=source if mpp else None,
        objective=_number(properties.get("tiffslide.objective-power")),
        properties=properties,
    )


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _explain(error: Exception, where: str) -> str:
    """What went wrong and what to do, in one line without a full stop."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, ImportError):
        return explain_missing(where, error)
    if isinstance(error, FileNotFoundError):
        return "there is no such file" + (", or its server cannot be reached" if "://" in where else "")
    if isinstance(error, PermissionError) or "credentials" in text.lower():
        return f"access is refused ({text}); set the credentials, or FSSPEC_S3_ANON=true for a public bucket"
    if isinstance(error, OSError | TimeoutError):
        return f"it cannot be reached or ends early ({type(error).__name__}: {text})"
    return f"tiffslide cannot use it ({text or type(error).__name__})"
