"""Checks that a TIFF holds the tiles which its tables promise, so that a cut-off file is refused at opening."""

from __future__ import annotations

import struct

import numpy as np
from tifffile import TiffFile, TiffPage

from wsi_engine.readers.base import DamagedError

_PAGES_CHECKED = 64
"""More images than a slide has; stacks of thousands are not walked to their end."""

_SMALL = 1 << 24
"""Pixels up to which a tiled TIFF is taken into memory as a picture."""

_MAX_TILE = 1 << 28
"""Pixels of the largest tile that is believed: a library that makes room for more ends the whole process."""


def check_tables(path: str) -> None:
    """Refuse a local TIFF whose directory or tile tables cannot be true.

    What is no TIFF, or a TIFF that tifffile cannot parse, passes: its reader will say why it fails.

    Raises:
        DamagedError: tiles or directories lie past the end of the file, a table is too short for the
            size of its image, or no tile of the first image has any data.
    """
    try:
        with TiffFile(path) as tiff:
            check_tiff(tiff, path)
    except DamagedError:
        raise
    except Exception:  # tifffile raises errors of many kinds on broken files
        return


def order_readers(path: str) -> tuple[str, ...]:
    """Names of the readers for a TIFF, the one to try first in front.

    OpenSlide sees no levels in SubIFDs, so tiffslide goes before it there; a TIFF in strips, or a small one,
    is a picture before it is a slide of tiffslide's.
    """
    try:
        with TiffFile(path) as tiff:
            page = tiff.pages.first
            if page.subifds:
                return ("turbo", "tiffslide", "openslide", "image")
            if not page.is_tiled or page.imagewidth * page.imagelength <= _SMALL:
                return ("turbo", "openslide", "image", "tiffslide")
    except Exception:  # as in check_tables: the readers will say why they refuse it
        pass
    return ("turbo", "openslide", "tiffslide", "image")


def check_tiff(tiff: TiffFile, path: str) -> None:
    """:func:`check_tables` for a TIFF that is already open; errors of tifffile pass through."""
    pages = [page for page in tiff.pages[:_PAGES_CHECKED] if isinstance(page, TiffPage)]
    for number, page in enumerate(pages):
        _check_page(page, tiff.filehandle.size, f"{path}: image {number}")
        for part, level in enumerate(page.pages or ()):
            if isinstance(level, TiffPage):
                _check_page(level, tiff.filehandle.size, f"{path}: image {number}, reduced copy {part + 1}")
    if pages and not np.any(pages[0].databytecounts):
        raise DamagedError(f"{path} has no pixels: every tile of its first image is empty; copy the file again")
    if len(tiff.pages) <= _PAGES_CHECKED and _next_directory(tiff, pages[-1]) >= tiff.filehandle.size:
        raise DamagedError(f"{path} ends early: its next directory lies past the end of the file; copy the file again")


def _check_page(page: TiffPage, file_size: int, where: str) -> None:
    offsets = np.asarray(page.dataoffsets, np.uint64)
    counts = np.asarray(page.databytecounts, np.uint64)
    expected = int(np.prod([int(n) for n in page.chunked], dtype=object)) if page.chunked else 0
    if len(offsets) < expected or len(counts) < len(offsets):
        raise DamagedError(
            f"{where} is {page.imagewidth} x {page.imagelength} pixels by its header, which takes {expected} tiles, "
            f"but its table lists {min(len(offsets), len(counts))}; the file is damaged, copy it again"
        )
    if page.is_tiled and page.tilewidth * page.tilelength > _MAX_TILE:
        raise DamagedError(
            f"{where} has tiles of {page.tilewidth} x {page.tilelength} pixels by its header; the file is damaged, "
            "copy it again"
        )
    counts = counts[: len(offsets)]
    # Compared without adding first: the sum of two wild 64-bit numbers wraps around.
    past = (counts > 0) & ((offsets > file_size) | (counts > file_size - np.minimum(offsets, file_size)))
    if past.any():
        raise DamagedError(
            f"{where} ends early: {int(past.sum())} of {len(offsets)} tiles lie past the end of the file "
            f"({file_size} bytes); copy the file again"
        )


def _next_directory(tiff: TiffFile, last: TiffPage) -> int:
    """Return the file position that the last directory gives for another one; 0 where it ends the chain."""
    layout, file = tiff.tiff, tiff.filehandle
    file.seek(last.offset)
    (tags,) = struct.unpack(layout.tagnoformat, file.read(layout.tagnosize))
    file.seek(last.offset + layout.tagnosize + tags * layout.tagsize)
    return int(struct.unpack(layout.offsetformat, file.read(layout.offsetsize))[0])
