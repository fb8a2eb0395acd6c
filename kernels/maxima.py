"""Local maxima within a disk: candidates first, by their nearest neighbours, then the whole disk for those alone."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels._threads import run_parallel, split_rows
from wsi_engine.kernels.distance import as_mask
from wsi_engine.kernels.grey import as_grey


@compiled
def _mask_loop(image: NDArray[Any], mask: NDArray[np.bool_], first: int, stop: int, out: NDArray[Any]) -> None:
    """Fill rows first … stop − 1 of ``out`` with the image, and with −∞ outside the mask."""
    for y in range(first, stop):
        row, inside, target = image[y], mask[y], out[y]
        for x in range(row.size):
            target[x] = row[x] if inside[x] else -np.inf


@compiled
def _flag_row(
    image: NDArray[Any], y: int, threshold: float, diagonal: bool, near: NDArray[Any], flags: NDArray[np.bool_]
) -> None:
    """Flag the pixels of row y above the threshold that none of their 8 (4 if not diagonal) neighbours exceeds.

    ``near`` (2, W + 2) is working space.
    """
    row, above, below = image[y], image[max(y - 1, 0)], image[min(y + 1, image.shape[0] - 1)]
    width = row.size
    column, sides = near[0], near[1, 1 : width + 1]
    for x in range(width):
        column[x] = max(row[x], above[x], below[x])
        sides[x] = column[x] if diagonal else row[x]
    near[1, 0], near[1, width + 1] = sides[0], sides[width - 1]  # beyond the border: nothing higher
    left, right = near[1, :width], near[1, 2:]
    for x in range(width):
        value = row[x]
        flags[x] = (value > threshold) & (value >= column[x]) & (value >= left[x]) & (value >= right[x])


@compiled
def _find_higher(image: NDArray[Any], y: int, x: int, spans: NDArray[np.int64]) -> tuple[int, int]:
    """A pixel (y, x) of the disk around this pixel that is higher, the rows searched outwards; (-1, -1) if none is."""
    height, width = image.shape
    radius = spans.size - 1
    value = image[y, x]
    for step in range(2 * radius + 1):
        yy = y + (step + 1) // 2 if step % 2 else y - step // 2
        if 0 <= yy < height:
            span = spans[abs(yy - y)]
            for xx in range(max(x - span, 0), min(x + span + 1, width)):
                if image[yy, xx] > value:
                    return yy, xx
    return -1, -1


@compiled
def _higher_on_rim(image: NDArray[Any], y: int, x: int, spans: NDArray[np.int64]) -> tuple[int, int]:
    """As :func:`_find_higher`, where the disk around the pixel to the left holds nothing higher than this pixel."""
    height, width = image.shape
    radius = spans.size - 1
    for yy in range(max(y - radius, 0), min(y + radius + 1, height)):
        xx = x + spans[abs(yy - y)]
        if xx < width and image[yy, xx] > image[y, x]:
            return yy, xx
    return -1, -1


@compiled
def _maxima_loop(
    image: NDArray[Any], spans: NDArray[np.int64], threshold: float, first: int, stop: int, out: NDArray[np.bool_]
) -> None:
    """Fill rows first … stop − 1 of ``out``; ``spans`` (radius + 1,) is the half width of the disk 0 … radius rows off.

    On a plateau a pixel is told from its left neighbour where possible, so that flat images do not cost whole disks.
    """
    width = image.shape[1]
    near = np.empty((2, width + 2), image.dtype)
    for y in range(first, stop):
        flags = out[y]
        _flag_row(image, y, threshold, spans.size > 2, near, flags)
        before = -2  # the candidate last looked at, and a higher pixel in its disk
        higher_y, higher_x = -1, -1
        for x in range(width):
            if not flags[x]:
                continue
            if before != x - 1 or image[y, before] != image[y, x]:
                higher_y, higher_x = _find_higher(image, y, x, spans)
            elif higher_y < 0:
                higher_y, higher_x = _higher_on_rim(image, y, x, spans)
            elif abs(higher_x - x) > spans[abs(higher_y - y)]:
                higher_y, higher_x = _find_higher(image, y, x, spans)
            flags[x] = higher_y < 0
            before = x


def local_maxima(
    image: NDArray[Any], radius: int, *, threshold: float | None = None, mask: NDArray[Any] | None = None
) -> NDArray[np.bool_]:
    """Pixels that no other pixel of the disk around them exceeds.

    The disk holds the pixels at a distance of at most ``radius``; pixels beyond the border or outside the mask do not
    count. Every pixel of a plateau that nothing in reach exceeds is a maximum: label the result (8-connected) to get
    one marker for each.

    The same pixels as ``skimage.feature.peak_local_max(image, footprint=disk(radius), exclude_border=False)``, with
    ``labels=mask.astype(int)`` where there is a mask; but where every pixel of the mask is a maximum, that call
    drops most of them.

    Args:
        image: bool, integers of up to 32 bits, float32 or float64 (H, W), without NaN.
        radius: of the disk in pixels, at least 1.
        threshold: maxima lie above it; by default the least value of the image, so a flat image has none.
        mask: bool or integers (H, W); where it is not 0 maxima are looked for, and by default everywhere.

    Returns:
        bool (H, W); empty for an empty image.

    Raises:
        TypeError: ``image`` or ``mask`` has another dtype, or ``radius`` is not an integer.
        ValueError: ``image`` is not (H, W) or holds NaN, ``mask`` has another shape, ``radius`` is below 1, or
            ``threshold`` is NaN.

    Time: H · W, and ``radius``² for each pixel that its neighbours do not exceed, ``radius`` within plateaus.
    Source: A. Neubeck and L. Van Gool, "Efficient non-maximum suppression", ICPR 2006 (the order of the tests).
    """
    values = as_grey(image, "local_maxima")
    reach = operator.index(radius)
    if reach < 1:
        raise ValueError(f"local_maxima needs a radius of at least 1 pixel, not {reach}")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("local_maxima needs a threshold that is not NaN")
    inside = None if mask is None else as_mask(mask, "local_maxima")
    if inside is not None and inside.shape != values.shape:
        raise ValueError(f"local_maxima takes a mask of the image's shape {values.shape}, not {inside.shape}")
    out = np.empty(values.shape, np.bool_)
    if values.size == 0:
        return out
    least = float(values.min() if threshold is None else threshold)
    bands = split_rows(len(values))
    if inside is not None:
        whole, values = values, np.empty_like(values)
        run_parallel(_mask_loop, [(whole, inside, *band, values) for band in bands])
    reach = min(reach, sum(values.shape))
    spans = np.array([math.isqrt(reach * reach - k * k) for k in range(reach + 1)], np.int64)
    run_parallel(_maxima_loop, [(values, spans, least, *band, out) for band in bands])
    return out
