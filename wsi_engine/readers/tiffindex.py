"""Where the JPEG tiles of a tiled TIFF lie: its levels, their tile tables, and what the file says of itself.

Only layouts without vendor geometry are taken: Aperio SVS, generic tiled TIFF and OME-TIFF, all of them
JPEG with 8-bit samples. Everything else is refused by name, so that a more general reader takes it.
"""

from __future__ import annotations

import itertools
import logging
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from wsi_engine.errors import SlideError
from wsi_engine.readers.base import DamagedError, Level, Metadata, level_downsample
from wsi_engine.readers.jpeg import Colour, JpegError, TileHeaders, table_segments
from wsi_engine.readers.tiffmeta import read_metadata

MAX_PAGES = 1024
"""Directories looked at in one file; a longer chain is taken for a loop."""

MAX_TILE_PIXELS = 1 << 26
"""Pixels of the largest tile that is decoded (192 MiB of RGB)."""

ADVICE = "the file may be truncated: copy it again"
"""What to do about a damaged file."""

_JPEG = 7
_COMPRESSIONS = {1: "uncompressed", 5: "LZW", 6: "old-style JPEG", 8: "Deflate", 33003: "JPEG 2000", 33005: "JPEG 2000"}
_VENDORS = {
    "ndpi": "Hamamatsu NDPI",
    "bif": "Ventana BIF",
    "scn": "Leica SCN",
    "philips": "Philips TIFF",
    "qpi": "PerkinElmer QPTIFF",
    "indica": "Indica Labs TIFF",
    "avs": "Argos AVS",
    "sis": "Olympus SIS",
    "lsm": "Zeiss LSM",
    "volumetric": "volume TIFF",
}


@dataclass(frozen=True, eq=False)
class TiledLevel:
    """One level and its tile tables: ``offsets`` and ``counts`` (across × down) int64 bytes, row by row."""

    level: Level
    tile_width: int
    tile_height: int
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    headers: TileHeaders

    @property
    def across(self) -> int:
        """Tiles in a row."""
        return -(-self.level.width // self.tile_width)

    @property
    def down(self) -> int:
        """Rows of tiles."""
        return -(-self.level.height // self.tile_height)


@dataclass(frozen=True, eq=False)
class TiffIndex:
    """The levels of a file, finest first, and its metadata."""

    levels: tuple[TiledLevel, ...]
    metadata: Metadata


class _Refusal(Exception):
    """Why a file is not taken; completes "cannot read …: it …"."""


class _Damage(_Refusal):
    """A file of the right kind, but broken: no other reader could do better."""


def read_index(path: Path) -> TiffIndex:
    """Levels and tile tables of a tiled JPEG TIFF.

    Raises:
        DamagedError: such a file, but damaged or cut short.
        SlideError: not such a file, or of a vendor with its own geometry.
    """
    try:
        with _quiet_tifffile(), _open_tiff(path) as tiff:
            return _index(tiff, path.stat().st_size)
    except _Damage as damage:
        raise DamagedError(f"cannot read {path}: it {damage}; {ADVICE}") from None
    except _Refusal as refusal:
        raise SlideError(f"cannot read {path}: it {refusal}") from None
    except OSError as error:
        raise SlideError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make the parser raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SlideError(f"cannot read {path}: it is not a sound TIFF ({reason})") from error


def _open_tiff(path: Path) -> tifffile.TiffFile:
    # Without these, tifffile acts on a vendor's private tags (or on the file's name) while opening.
    return tifffile.TiffFile(path, is_ndpi=False, is_lsm=False, is_scanimage=False)


def _index(tiff: tifffile.TiffFile, size: int) -> TiffIndex:
    pages = _chain(tiff.pages)
    if not pages:
        raise _Refusal("holds no image")
    first = pages[0]
    _refuse_vendor(first)
    if not first.is_tiled:
        raise _Refusal("is not tiled")
    _check_end(tiff, pages[-1])
    chosen = [first, *_coarser(first, pages[1:])]
    levels = tuple(_level(page, number, first, size) for number, page in enumerate(chosen))
    if not levels[0].counts.any():
        raise _Damage("holds no tile data at level 0")
    if first.is_svs:
        for finer, coarser in itertools.pairwise(levels):
            _spread_gaps(finer, coarser)
    return TiffIndex(levels, read_metadata(first))


def _chain(pages: tifffile.TiffPages) -> list[tifffile.TiffPage]:
    found: list[tifffile.TiffPage] = []
    for number in range(MAX_PAGES):
        try:
            page = pages[number]
        except IndexError:
            return found
        if not isinstance(page, tifffile.TiffPage):
            raise _Refusal("has directories that are not pages of a slide")
        found.append(page)
    raise _Refusal(f"has over {MAX_PAGES} directories")


def _check_end(tiff: tifffile.TiffFile, last: tifffile.TiffPage) -> None:
    """Refuse a chain of directories that leads out of the file: tifffile ends it there and goes on."""
    layout, handle = tiff.tiff, tiff.filehandle
    handle.seek(last.offset)
    tags = struct.unpack(layout.tagnoformat, handle.read(layout.tagnosize))[0]
    handle.seek(last.offset + layout.tagnosize + tags * layout.tagsize)
    following = handle.read(layout.offsetsize)
    if len(following) < layout.offsetsize or struct.unpack(layout.offsetformat, following)[0] != 0:
        raise _Damage("has a broken chain of directories")


def _refuse_vendor(page: tifffile.TiffPage) -> None:
    for flag, name in _VENDORS.items():
        if getattr(page, f"is_{flag}", False):
            raise _Refusal(f"is {name}")
    software = page.software if isinstance(page.software, str) else ""
    xmp = page.tags.valueof(700)
    if software.startswith("MedScan"):
        raise _Refusal("is Trestle TIFF")
    if software.startswith("Philips"):
        raise _Refusal("is Philips TIFF")
    if page.tags.get(65420) is not None:
        raise _Refusal("is Hamamatsu NDPI")
    if isinstance(xmp, bytes) and b"<iScan" in xmp:
        raise _Refusal("is Ventana BIF")


def _coarser(first: tifffile.TiffPage, others: list[tifffile.TiffPage]) -> list[tifffile.TiffPage]:
    """The pages of the lower levels, finest first."""
    aperio = first.is_svs
    tiled = [page for page in others if page.is_tiled and not page.is_mask]
    if any(_size(page) == _size(first) for page in tiled):
        raise _Refusal("has several full-size images (focal planes or channels)")
    if first.subifds:
        candidates = [page for page in _sub_pages(first) if page.is_tiled]
    else:
        candidates = [page for page in tiled if aperio or page.is_reduced]
    if aperio and not all(_fits(first, page) for page in candidates):
        raise _Refusal("has a tiled image of another shape than level 0")
    chosen = sorted((page for page in candidates if _fits(first, page)), key=_size, reverse=True)
    for finer, coarser in itertools.pairwise([first, *chosen]):
        if _size(coarser) == _size(finer):
            raise _Refusal("has two levels of the same size")
    return chosen


def _sub_pages(page: tifffile.TiffPage) -> list[tifffile.TiffPage]:
    offsets = page.subifds or ()
    if len(offsets) > MAX_PAGES or page.pages is None:
        raise _Refusal(f"has over {MAX_PAGES} directories")
    found = _chain(page.pages)
    if len(found) != len(offsets):
        raise _Damage("has a broken chain of directories")
    return found


def _size(page: tifffile.TiffPage) -> tuple[int, int]:
    return page.imagewidth, page.imagelength


def _fits(first: tifffile.TiffPage, page: tifffile.TiffPage) -> bool:
    """Whether one factor explains both sides of the page to within a pixel of rounding."""
    if min(_size(page)) < 1:
        return False
    low, high = zip(
        *((full / (part + 1), full / (part - 1) if part > 1 else np.inf) for full, part in _sides(first, page)),
        strict=True,
    )
    return bool(max(low) <= min(high))


def _sides(first: tifffile.TiffPage, page: tifffile.TiffPage) -> Iterator[tuple[int, int]]:
    return zip(_size(first), _size(page), strict=True)


def _level(page: tifffile.TiffPage, number: int, first: tifffile.TiffPage, size: int) -> TiledLevel:
    where = f"level {number}"
    colour = _colour(page, where)
    width, height = _size(page)
    tile_width, tile_height = page.tilewidth, page.tilelength
    if min(width, height, tile_width, tile_height) < 1:
        raise _Damage(f"gives {where} no size")
    if tile_width * tile_height > MAX_TILE_PIXELS:
        raise _Refusal(f"has tiles of {tile_width}×{tile_height} pixels at {where}")
    tiles = -(-width // tile_width) * -(-height // tile_height)
    offsets, counts = _tile_tables(page, tiles, where, size)
    try:
        tables = table_segments(page.jpegtables)
    except JpegError as error:
        raise _Damage(f"has JPEG tables at {where} that cannot be used (the field {error})") from None
    return TiledLevel(
        level=Level(width, height, level_downsample(_size(first), (width, height))),
        tile_width=tile_width,
        tile_height=tile_height,
        offsets=offsets,
        counts=counts,
        headers=TileHeaders(tables, colour, tile_width, tile_height),
    )


def _spread_gaps(finer: TiledLevel, coarser: TiledLevel) -> None:
    """Mark the tiles of ``coarser`` that lie below a missing tile of ``finer`` as missing too.

    Where an Aperio file lacks a tile, what its lower levels show there is not to be trusted; OpenSlide makes
    those tiles again from the finer level, found by the rounded ratio of the numbers of tiles, and so do we.
    """
    rows, columns = np.divmod(np.flatnonzero(finer.counts == 0), finer.across)
    rows //= max(1, round(finer.down / coarser.down))
    columns //= max(1, round(finer.across / coarser.across))
    inside = (rows < coarser.down) & (columns < coarser.across)
    coarser.counts[rows[inside] * coarser.across + columns[inside]] = 0


def _colour(page: tifffile.TiffPage, where: str) -> Colour:
    if page.compression != _JPEG:
        name = _COMPRESSIONS.get(int(page.compression), f"compression {int(page.compression)}")
        raise _Refusal(f"is {name} at {where}, not JPEG")
    if page.bitspersample != 8 or page.sampleformat != 1:
        raise _Refusal(f"has samples other than unsigned 8-bit at {where}")
    if page.samplesperpixel > 1 and page.planarconfig != 1:
        raise _Refusal(f"keeps its colours in separate planes at {where}")
    if page.imagedepth > 1 or page.tiledepth > 1:
        raise _Refusal(f"has depth at {where}")
    for colour in Colour:
        if page.photometric == colour.value and page.samplesperpixel == colour.components:
            return colour
    raise _Refusal(f"is neither RGB, YCbCr nor grey at {where}")


def _tile_tables(
    page: tifffile.TiffPage, tiles: int, where: str, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if len(page.dataoffsets) != tiles or len(page.databytecounts) != tiles:
        raise _Damage(f"has a damaged tile table at {where}: {len(page.dataoffsets)} tiles where {tiles} are needed")
    offsets = np.array(page.dataoffsets, dtype=np.uint64)
    counts = np.array(page.databytecounts, dtype=np.uint64)
    end = np.uint64(size)
    outside = (counts > 0) & ((counts > end) | (offsets > end - np.minimum(counts, end)))  # a sum could overflow
    if outside.any():
        raise _Damage(f"has tile data that reach past the end of the file at {where} (tile {int(outside.argmax())})")
    # No encoder makes a tile several times as large as its pixels; one that claims so is not worth the memory.
    huge = counts > np.uint64(4 * 3 * page.tilewidth * page.tilelength + (1 << 20))
    if huge.any():
        raise _Damage(f"has a damaged tile table at {where}: tile {int(huge.argmax())} is larger than its pixels")
    return offsets.astype(np.int64), counts.astype(np.int64)


class _ThreadFilter(logging.Filter):
    """Drops the records of threads that are parsing a slide: what matters is raised as an error."""

    def __init__(self) -> None:
        super().__init__()
        self.parsing = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(self.parsing, "now", False)


_FILTER = _ThreadFilter()


@contextmanager
def _quiet_tifffile() -> Iterator[None]:
    logging.getLogger("tifffile").addFilter(_FILTER)  # adding it twice is adding it once
    _FILTER.parsing.now = True
    try:
        yield
    finally:
        _FILTER.parsing.now = False
