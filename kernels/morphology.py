"""Binary morphology with disks: erosion, dilation, opening, closing.

The disk of radius r holds the pixels whose centre is at most r from its own: x² + y² ≤ r², an odd square of side
2 r + 1 as ``skimage.morphology.disk`` draws it. Small disks work on 64 pixels at a time, packed into one word; large
ones compare the exact squared distance with r².
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels._threads import run_parallel, split_rows
from wsi_engine.kernels.distance import as_mask, distance_transform

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_LARGEST_SHIFT = 63  # a shift reaches into the next word, not beyond


@compiled
def _widen(row: NDArray[np.uint64], reach: int, wide: NDArray[np.uint64]) -> None:
    """Add ``row`` (n + 2 words), shifted by ``reach`` pixels (1 … 63) to both sides, to ``wide`` (n words)."""
    up, down = np.uint64(reach), np.uint64(64 - reach)
    for i in range(wide.size):
        left = (row[i + 1] << up) | (row[i] >> down)
        right = (row[i + 1] >> up) | (row[i + 2] << down)
        wide[i] |= left | right


@compiled
def _spread_loop(
    bits: NDArray[np.uint64], widths: NDArray[np.int64], outside: np.uint64, last: np.uint64, out: NDArray[np.uint64]
) -> None:
    """Fill ``out`` (H, n words) with the dilation of ``bits`` by a disk if ``outside`` is 0, its erosion if all ones.

    Erosion is the dilation of the complement, whose outside is set. Each row is widened step by step and laid over
    the rows dy above and below it once it is as wide as the disk is there.

    Args:
        bits: packed rows, zero behind the last pixel.
        widths: half the width of the disk at dy = 0 … r.
        outside: what is xor-ed with all bits, and so also what lies outside.
        last: the bits of the last word of a row that are pixels.
        out: packed rows, zero behind the last pixel.
    """
    height, words = bits.shape
    radius = widths.size - 1
    row = np.full(words + 2, outside, np.uint64)  # a word of the outside on both sides
    wide = np.empty(words, np.uint64)
    for y in range(height):
        near_edge = y < radius or y + radius >= height
        for i in range(words):
            out[y, i] = outside if near_edge else np.uint64(0)
    for y in range(height):
        for i in range(words):
            row[i + 1] = bits[y, i] ^ outside
            wide[i] = row[i + 1]
        reach = 0
        for dy in range(radius, -1, -1):
            while reach < widths[dy]:
                reach += 1
                _widen(row, reach, wide)
            if y >= dy:
                for i in range(words):
                    out[y - dy, i] |= wide[i]
            if y + dy < height:
                for i in range(words):
                    out[y + dy, i] |= wide[i]
    for y in range(height):
        for i in range(words):
            out[y, i] ^= outside
        out[y, words - 1] &= last


def _pack(mask: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """(H, W) pixels as (H, ⌈W / 64⌉) words, the first pixel in the lowest bit, zero behind the last pixel."""
    packed = np.packbits(mask, axis=1, bitorder="little")
    words = np.zeros((mask.shape[0], -(-mask.shape[1] // 64)), np.uint64)
    words.view(np.uint8)[:, : packed.shape[1]] = packed
    return words


@compiled
def _unpack_loop(bits: NDArray[np.uint64], out: NDArray[np.bool_]) -> None:
    """Undo :func:`_pack` for the rows of ``out`` (H, W)."""
    height, width = out.shape
    one = np.uint64(1)
    for y in range(height):
        for i in range(width // 64):
            word = bits[y, i]
            for k in range(64):  # of known length, so that it becomes vector instructions
                out[y, 64 * i + k] = (word >> np.uint64(k)) & one
        for x in range(width // 64 * 64, width):
            out[y, x] = (bits[y, x // 64] >> np.uint64(x % 64)) & one


def _spread_band(
    mask: NDArray[np.bool_],
    widths: NDArray[np.int64],
    outsides: tuple[np.uint64, ...],
    first: int,
    stop: int,
    out: NDArray[np.bool_],
) -> None:
    """Fill rows first … stop − 1 of ``out`` from these rows and as many around them as the operations can reach."""
    halo = (widths.size - 1) * len(outsides)
    above = min(first, halo)
    bits = _pack(mask[first - above : stop + halo])
    spread = np.empty_like(bits)
    last = _ALL >> np.uint64(-mask.shape[1] % 64)
    for outside in outsides:
        _spread_loop(bits, widths, outside, last, spread)
        bits, spread = spread, bits
    _unpack_loop(bits[above:], out[first:stop])


def _threshold(mask: NDArray[np.bool_], radius: int, outside: np.uint64) -> NDArray[np.bool_]:
    """Dilation (``outside`` 0) or erosion by a disk of any radius: the pixels near True, or far from all False."""
    height, width = mask.shape
    square = min(radius**2, height**2 + width**2)  # as good as any larger one, and below the distance from nothing
    squares = distance_transform(mask if outside else ~mask, squared=True)
    out: NDArray[np.bool_] = squares > square if outside else squares <= square
    if not outside:
        return out
    for lines in (out, out.T):
        lines[:radius] = False
        lines[max(len(lines) - radius, 0) :] = False
    return out


def _apply(mask: NDArray[Any], radius: int, outsides: tuple[np.uint64, ...], caller: str) -> NDArray[np.bool_]:
    """Erode (all ones) and dilate (0) in the order of ``outsides``."""
    mask = as_mask(mask, caller)
    try:
        radius = operator.index(radius)
    except TypeError:
        raise TypeError(f"{caller} takes a radius of whole pixels, not {radius!r}") from None
    if radius < 0:
        raise ValueError(f"{caller} takes a radius of at least 0, not {radius}")
    if radius == 0 or mask.size == 0:
        return mask.copy()
    if radius > _LARGEST_SHIFT:
        for outside in outsides:
            mask = _threshold(mask, radius, outside)
        return mask
    widths = np.array([math.isqrt(radius**2 - dy**2) for dy in range(radius + 1)], np.int64)
    out = np.empty(mask.shape, np.bool_)
    bands = split_rows(mask.shape[0], 512)  # short: fewer rows cost less than their hand-over
    run_parallel(_spread_band, [(mask, widths, outsides, first, stop, out) for first, stop in bands])
    return out


def erode(mask: NDArray[Any], radius: int) -> NDArray[np.bool_]:
    """Erosion: the pixels whose whole disk is True.

    Border: the outside of the array is False, so True pixels closer to it than the disk go. Equal to
    ``scipy.ndimage.binary_erosion`` with ``skimage.morphology.disk(radius)`` (whose ``border_value`` is 0).
    O(H · W · r / 64) up to radius 63, O(H · W) above; shared by threads.

    Args:
        mask: bool or integer (H, W), non-zero is True; may be empty.
        radius: of the disk in pixels; 0 copies the mask.

    Returns:
        bool (H, W).

    Raises:
        TypeError: ``mask`` is neither bool nor integer, or ``radius`` is not a whole number.
        ValueError: ``mask`` is not (H, W), or ``radius`` is negative.

    Source: J. Serra, "Image analysis and mathematical morphology", 1982, chapter II; words of pixels: R. van den
    Boomgaard and R. van Balen, "Methods for fast morphological image transforms using bitmapped binary images",
    CVGIP 54 (1992).
    """
    return _apply(mask, radius, (_ALL,), "erode")


def dilate(mask: NDArray[Any], radius: int) -> NDArray[np.bool_]:
    """Dilation: the pixels whose disk holds a True pixel.

    Border: the outside of the array is False. Equal to ``scipy.ndimage.binary_dilation`` with
    ``skimage.morphology.disk(radius)``. Arguments, cost, errors and source as :func:`erode`.
    """
    return _apply(mask, radius, (np.uint64(0),), "dilate")


def open_disk(mask: NDArray[Any], radius: int) -> NDArray[np.bool_]:
    """Opening, erosion and then dilation: the pixels covered by disks that lie wholly in the mask and the array.

    Border: False outside in both steps. Equal to ``scipy.ndimage.binary_opening`` with
    ``skimage.morphology.disk(radius)``. Arguments, cost, errors and source as :func:`erode`.
    """
    return _apply(mask, radius, (_ALL, np.uint64(0)), "open_disk")


def close_disk(mask: NDArray[Any], radius: int) -> NDArray[np.bool_]:
    """Closing, dilation and then erosion: fills what no disk outside the mask can reach.

    Border: False outside in both steps, so nothing stays True within ``radius`` of the border: for this reason the
    result need not contain the mask there. Equal to ``scipy.ndimage.binary_closing`` with
    ``skimage.morphology.disk(radius)``; scikit-image's closing differs there, as its erosion ignores the outside.
    Arguments, cost, errors and source as :func:`erode`.
    """
    return _apply(mask, radius, (np.uint64(0), _ALL), "close_disk")
