"""Gaussian blur and windowed thresholds.

Border rule of this module: the image is continued by its mirror image, border pixels repeated (d c b a | a b c d |
d c b a), as often as the window asks for. SciPy calls that "reflect".

Both filters work on columns and then on rows. Sums are kept in float64, the result of each step is rounded to float32.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels._threads import run_parallel, split_rows
from wsi_engine.kernels.grey import as_grey

_WIDEST = 1 << 20
"""Greatest reach of a window in pixels, beyond any sensible one: larger ones come from a slip in units."""

_MEAN_BAND = 256
"""Rows after which the running sums of columns start afresh; fixed, so that threads do not change the rounding."""


@compiled
def _mirror(place: int, size: int) -> int:
    """Where a pixel of the continued image lies in the image."""
    place %= 2 * size
    return min(place, 2 * size - 1 - place)


@compiled
def _extend_line(line: NDArray[np.float64], reach: int, width: int) -> None:
    """Fill ``reach`` places before and after the ``width`` values in the middle of ``line`` with their mirror image."""
    for k in range(reach):
        line[reach - 1 - k] = line[reach + _mirror(-1 - k, width)]
        line[reach + width + k] = line[reach + _mirror(width + k, width)]


@compiled
def _add_two_pairs(
    a: NDArray[Any],
    b: NDArray[Any],
    first: float,
    c: NDArray[Any],
    d: NDArray[Any],
    second: float,
    total: NDArray[np.float64],
) -> None:
    """Add ``(a + b) · first`` and then ``(c + d) · second`` to ``total``: two pairs save half the loads and stores."""
    for x in range(total.size):
        part = total[x] + (np.float64(a[x]) + np.float64(b[x])) * first
        total[x] = part + (np.float64(c[x]) + np.float64(d[x])) * second


@compiled
def _gaussian_loop(
    image: NDArray[np.float32], weights: NDArray[np.float64], first: int, stop: int, out: NDArray[np.float32]
) -> None:
    """Fill rows first … stop − 1 of ``out``; weights (reach + 1,) from the centre outwards, the last may be 0.

    Terms are added from the outermost pair inwards, after the centre, as SciPy does: the sums are then the same.
    """
    height, width = image.shape
    reach = weights.size - 1  # even
    total = np.empty(width, np.float64)
    line = np.empty(width + 2 * reach, np.float64)
    for y in range(first, stop):
        row, target = image[y], out[y]
        for x in range(width):
            total[x] = np.float64(row[x]) * weights[0]
        for k in range(reach, 0, -2):
            upper, lower = image[_mirror(y - k, height)], image[_mirror(y + k, height)]
            above, below = image[_mirror(y - k + 1, height)], image[_mirror(y + k - 1, height)]
            _add_two_pairs(upper, lower, weights[k], above, below, weights[k - 1], total)
        middle = line[reach : reach + width]
        for x in range(width):
            middle[x] = np.float64(np.float32(total[x]))
        _extend_line(line, reach, width)
        for x in range(width):
            total[x] = middle[x] * weights[0]
        for k in range(reach, 0, -2):
            left, right = line[reach - k : reach - k + width], line[reach + k : reach + k + width]
            west, east = line[reach - k + 1 : reach - k + 1 + width], line[reach + k - 1 : reach + k - 1 + width]
            _add_two_pairs(left, right, weights[k], west, east, weights[k - 1], total)
        for x in range(width):
            target[x] = np.float32(total[x])


@compiled
def _mean_loop(image: NDArray[np.float32], reach: int, first: int, stop: int, out: NDArray[np.float32]) -> None:
    """Fill rows first … stop − 1 of ``out`` with the means of windows that reach ``reach`` pixels each way."""
    height, width = image.shape
    side = np.float64(2 * reach + 1)
    total = np.zeros(width, np.float64)
    line = np.empty(width + 2 * reach, np.float64)
    for k in range(-reach, reach + 1):
        row = image[_mirror(first + k, height)]
        for x in range(width):
            total[x] += np.float64(row[x])
    for y in range(first, stop):
        middle, target = line[reach : reach + width], out[y]
        for x in range(width):
            middle[x] = np.float64(np.float32(total[x] / side))
        _extend_line(line, reach, width)
        running = 0.0
        for x in range(2 * reach + 1):
            running += line[x]
        target[0] = np.float32(running / side)
        for x in range(1, width):
            running += line[x + 2 * reach] - line[x - 1]
            target[x] = np.float32(running / side)
        enters, leaves = image[_mirror(y + reach + 1, height)], image[_mirror(y - reach, height)]
        for x in range(width):
            total[x] += np.float64(enters[x]) - np.float64(leaves[x])


def _as_float32(image: NDArray[Any], caller: str) -> NDArray[np.float32]:
    """``image`` checked and rounded to float32, which must hold it."""
    grey = as_grey(image, caller, finite=True)
    if grey.dtype == np.float32:
        return grey
    if grey.size and max(-grey.min(), grey.max()) > np.finfo(np.float32).max:
        raise ValueError(f"{caller} takes values that float32 can hold")
    return grey.astype(np.float32)


def gaussian(image: NDArray[Any], sigma: float, *, truncate: float = 4.0) -> NDArray[np.float32]:
    """Gaussian blur; the image is continued by its mirror image, border pixels repeated.

    The same sums in the same order as ``scipy.ndimage.gaussian_filter(image, sigma, mode="reflect")`` on float32.

    Args:
        image: bool, integers of up to 32 bits, float32 or float64 (H, W), finite; rounded to float32 first.
        sigma: standard deviation in pixels, 0 or more; 0 copies the image.
        truncate: the window reaches ``int(truncate · sigma + 0.5)`` pixels each way.

    Returns:
        float32 (H, W); empty for an empty image.

    Raises:
        TypeError: ``image`` has another dtype.
        ValueError: ``image`` is not (H, W) or not finite, ``sigma`` is negative or not finite, ``truncate`` is not
            above 0, or the window would reach further than 2²⁰ pixels.

    Time grows with H · W · ``sigma``. Source: R. Haralick and L. Shapiro, "Computer and Robot Vision" I (1992), 7.2.
    """
    values = _as_float32(image, "gaussian")
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"gaussian needs a sigma of 0 pixels or more, not {sigma}")
    if not (math.isfinite(truncate) and truncate > 0):
        raise ValueError(f"gaussian needs a truncate above 0, not {truncate}")
    if truncate * sigma > _WIDEST:
        raise ValueError(f"gaussian would reach {truncate * sigma:.0f} pixels: at most {_WIDEST} are possible")
    reach = int(truncate * sigma + 0.5)
    if reach == 0 or values.size == 0:
        return np.array(values)
    places = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 / (sigma * sigma) * places**2)
    weights = (weights / weights.sum())[reach:]
    if reach % 2:
        weights = np.append(weights, 0.0)  # the loop takes pairs two at a time
    out = np.empty(values.shape, np.float32)
    run_parallel(_gaussian_loop, [(values, weights, *band, out) for band in split_rows(len(values))])
    return out


def local_threshold(
    image: NDArray[Any],
    window: int,
    *,
    method: Literal["gaussian", "mean"] = "gaussian",
    offset: float = 0.0,
) -> NDArray[np.float32]:
    """Threshold of each pixel from its surroundings: their mean less ``offset``; foreground is ``image > threshold``.

    The same as ``skimage.filters.threshold_local`` with its default border, which is this module's (see above), but
    for the rounding to float32.

    Args:
        image: bool, integers of up to 32 bits, float32 or float64 (H, W), finite; rounded to float32 first.
        window: side of the window in pixels, odd.
        method: ``"mean"`` weighs all pixels of the window alike, ``"gaussian"`` by a Gaussian of standard deviation
            ``(window - 1) / 6``, which is cut at four of them and so reaches beyond the window.
        offset: subtracted from the mean, in the units of ``image``.

    Returns:
        float32 (H, W); empty for an empty image.

    Raises:
        TypeError: ``image`` has another dtype, or ``window`` is not an integer.
        ValueError: ``image`` is not (H, W) or not finite, ``window`` is even, below 1 or above 2²⁰, ``method`` is
            another word, or ``offset`` is not finite.

    Time: H · W for "mean", H · W · ``window`` for "gaussian". Source: R. Gonzalez and R. Woods, "Digital Image
    Processing" (2002), 10.3.7.
    """
    values = _as_float32(image, "local_threshold")
    if not isinstance(window, int | np.integer):
        raise TypeError(f"local_threshold takes a window of whole pixels, not {window!r}")
    if window < 1 or window % 2 == 0 or window > _WIDEST:
        raise ValueError(f"local_threshold needs an odd window from 1 to {_WIDEST} pixels, not {window}")
    if method not in ("gaussian", "mean"):
        raise ValueError(f'local_threshold knows the methods "gaussian" and "mean", not {method!r}')
    if not math.isfinite(offset):
        raise ValueError(f"local_threshold needs a finite offset, not {offset}")
    if method == "gaussian":
        out = gaussian(values, (window - 1) / 6.0)
    elif values.size == 0 or window == 1:
        out = np.array(values)
    else:
        out = np.empty(values.shape, np.float32)
        starts = range(0, len(values), _MEAN_BAND)
        bands = [(start, min(start + _MEAN_BAND, len(values))) for start in starts]
        run_parallel(_mean_loop, [(values, int(window) // 2, *band, out) for band in bands])
    out -= np.float32(offset)
    return out
