"""Maxima that rise by at least h above their surroundings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels._threads import run_parallel, split_rows
from wsi_engine.kernels.grey import as_grey


@compiled
def _summit_loop(image: NDArray[Any], least: float, first: int, stop: int, out: NDArray[np.bool_]) -> None:
    """Flag, in rows first … stop − 1, pixels of at least ``least`` that exceed the 4 neighbours before them and are not
    exceeded by the 4 after them: the first pixel of every flat summit is one of them.
    """
    height, width = image.shape
    rows = np.full((3, width + 2), -np.inf, image.dtype)  # three rows with a margin, used in turn
    for y in range(first - 1, stop + 1):
        ring = rows[(y + 1) % 3]
        if 0 <= y < height:
            ring[1 : width + 1] = image[y]
        else:
            ring[:] = -np.inf
        if y <= first:
            continue
        above, here, below = rows[(y - 1) % 3], rows[y % 3], ring
        flags, middle, west, east = out[y - 1], here[1 : width + 1], here[:width], here[2:]
        north, north_west, north_east = above[1 : width + 1], above[:width], above[2:]
        south, south_west, south_east = below[1 : width + 1], below[:width], below[2:]
        for x in range(width):
            value = middle[x]
            before = max(north[x], north_west[x], north_east[x], west[x])
            after = max(south[x], south_west[x], south_east[x], east[x])
            flags[x] = (value >= least) & (value > before) & (value >= after)


@compiled
def _flood_loop(
    image: NDArray[Any],
    width: int,
    starts: NDArray[np.int64],
    h: float,
    visits: NDArray[np.int32],
    out: NDArray[np.bool_],
) -> None:
    """Mark the summits that are h-maxima; ``starts`` are sorted from high to low, ``visits`` is 0, arrays are flat.

    From each start the pixels less than h below it are flooded. The flood fails where it meets something higher, or
    the flood of an earlier start: that one lies as high or higher, and reached, or is itself, something higher than
    this start by a way that stays less than h below this start. So each pixel is flooded once. What a flood that does
    not fail holds at the height of its start are h-maxima; other starts at that height within it are done with it.
    """
    height = image.size // width
    queue, rows = np.empty(image.size, np.int32), np.empty(image.size, np.int32)
    for number in range(starts.size):
        start = starts[number]
        if visits[start] != 0:
            continue
        mark = np.int32(number + 1)
        top = np.float64(image[start])
        visits[start] = mark
        queue[0], rows[0] = start, start // width
        head, tail = 0, 1
        while head < tail:
            y = rows[head]
            x = queue[head] - y * width
            head += 1
            for yy in range(max(y - 1, 0), min(y + 2, height)):
                for xx in range(max(x - 1, 0), min(x + 2, width)):
                    q = yy * width + xx
                    if visits[q] == mark or top - np.float64(image[q]) >= h:
                        continue
                    if visits[q] != 0 or image[q] > top:
                        tail = -1
                        break
                    visits[q] = mark
                    queue[tail], rows[tail] = q, yy
                    tail += 1
                if tail < 0:
                    break
        for k in range(tail):
            out[queue[k]] = image[queue[k]] == top


def h_maxima(image: NDArray[Any], h: float, *, threshold: float | None = None) -> NDArray[np.bool_]:
    """Flat summits from which every way to something higher first descends by at least ``h`` (8-connected).

    The highest summits count where they rise by at least ``h`` above the lowest pixel of the image. The same pixels as
    ``skimage.morphology.h_maxima`` for integers, and for floats but for rounding: heights are compared in float64
    here, while scikit-image lowers the image by ``h`` and 2·10⁻⁶ of its values (float32), and so marks pixels that are
    that little below a summit as well.

    Args:
        image: bool, integers of up to 32 bits, float32 or float64 (H, W), finite.
        h: least height, above 0; rounded to float32 where the image is.
        threshold: summits below it, rounded as ``h`` is, are left out; None leaves out the lowest pixels alone.

    Returns:
        bool (H, W); empty for an empty image.

    Raises:
        TypeError: ``image`` has another dtype.
        ValueError: ``image`` is not (H, W), not finite or has 2³¹ pixels or more, or ``h`` is not a number above 0, or
            ``threshold`` is NaN.

    Time: H · W, and S · log S for S summits.
    Source: P. Soille, "Morphological Image Analysis" (2003), 6.3.4 (the definition).
    """
    values = as_grey(image, "h_maxima", finite=True)
    least = float(np.float32(h)) if np.asarray(image).dtype == np.float32 else float(h)
    if not least > 0 or math.isinf(least):
        raise ValueError(f"h_maxima needs an h above 0, not {h}")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("h_maxima needs a threshold that is not NaN")
    if values.size >= 2**31:
        raise ValueError(f"h_maxima takes images of fewer than 2**31 pixels, not {values.shape}")
    out = np.zeros(values.shape, np.bool_)
    if values.size == 0:
        return out
    lowest = float(values.min())
    if float(values.max()) - lowest < least:
        return out
    floor = (
        np.nextafter(values.dtype.type(lowest), values.dtype.type(np.inf))
        if threshold is None
        else values.dtype.type(threshold)
    )
    summits = np.empty(values.shape, np.bool_)
    run_parallel(_summit_loop, [(values, float(floor), *band, summits) for band in split_rows(len(values))])
    flat = values.reshape(-1)
    starts = np.flatnonzero(summits)
    starts = starts[np.argsort(-flat[starts], kind="stable")]
    visits = np.zeros(values.size, np.int32)
    _flood_loop(flat, values.shape[1], starts, least, visits, out.reshape(-1))
    return out
