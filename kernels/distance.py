"""Exact Euclidean distance to the background, and the check of masks that its users share."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels._threads import run_parallel, split_rows

LONGEST_SIDE = 1 << 20
"""Greatest side of a mask: up to here every product of the row scan fits 64 bits."""

_SHORT = 64
"""Runs up to this length are searched outwards from each pixel: faster than an envelope, and still bounded."""

_COLUMNS = 128
"""Columns that are scanned down and up at a time, so that they stay in the cache."""


def as_mask(mask: NDArray[Any], caller: str) -> NDArray[np.bool_]:
    """``mask`` as a C-contiguous bool array (H, W), without a copy where it is one; non-zero integers are True.

    Raises:
        TypeError: ``mask`` is neither bool nor integer.
        ValueError: ``mask`` is not (H, W).
    """
    mask = np.asarray(mask)
    if mask.dtype.kind not in "bui":
        raise TypeError(f"{caller} takes a mask of bool or integers, not {mask.dtype}; compare with a threshold first")
    if mask.ndim != 2:
        raise ValueError(f"{caller} takes a mask of shape (H, W), not {mask.shape}")
    return np.ascontiguousarray(mask if mask.dtype == np.bool_ else mask != 0)


@compiled
def _column_loop(mask: NDArray[np.bool_], first: int, stop: int, far: int, steps: NDArray[np.int32]) -> None:
    """Fill columns first … stop − 1 of ``steps`` with the distance to the nearest False of the column, else ≥ far.

    Both passes run along rows, so that neighbouring columns share vector instructions.
    """
    height = mask.shape[0]
    here, inside = steps[0, first:stop], mask[0, first:stop]
    for x in range(here.size):
        here[x] = far * inside[x]
    for y in range(1, height):
        before, here, inside = steps[y - 1, first:stop], steps[y, first:stop], mask[y, first:stop]
        for x in range(here.size):
            here[x] = (before[x] + np.int32(1)) * np.int32(inside[x])
    for y in range(height - 2, -1, -1):
        after, here = steps[y + 1, first:stop], steps[y, first:stop]
        for x in range(here.size):
            here[x] = min(here[x], after[x] + np.int32(1))


@compiled
def _search_run(heights: NDArray[np.int64], count: int) -> None:
    """Replace ``heights[:count]`` by their lower envelope, searching outwards from each place (heights (2, W))."""
    for u in range(count):
        best = heights[0, u]
        k = 1
        while k < count and k * k < best:  # no place further away can be nearer
            if u >= k:
                best = min(best, heights[0, u - k] + k * k)
            if u + k < count:
                best = min(best, heights[0, u + k] + k * k)
            k += 1
        heights[1, u] = best


@compiled
def _search_between(steps: NDArray[np.int32], count: int, heights: NDArray[np.int32]) -> None:
    """As :func:`_search_run` for a run of up to _SHORT pixels between two False ones, all places at once.

    The pixels at the ends are at most half the run away, so no column needs to tell more than that. ``heights``
    (2, 3 · _SHORT) has room on both sides, of which no parabola comes.
    """
    half = (count - 1) // 2
    line, best = heights[0], heights[1, _SHORT : _SHORT + count]
    line[_SHORT - half : _SHORT + count + half] = half * half
    middle = line[_SHORT : _SHORT + count]
    most = np.int32(0)
    for u in range(count):
        step = min(steps[u], np.int32(half))
        middle[u] = best[u] = step * step
        most = max(most, step)
    for k in range(1, most):  # no place further away can be nearer
        left, right = line[_SHORT - k : _SHORT - k + count], line[_SHORT + k : _SHORT + k + count]
        square = np.int32(k * k)
        for u in range(count):
            best[u] = min(best[u], min(left[u], right[u]) + square)


@compiled
def _envelope_run(heights: NDArray[np.int64], count: int, sites: NDArray[np.int64]) -> None:
    """As :func:`_search_run`, in linear time: keep the parabolas of the lower envelope, then walk along them.

    Of three neighbours on the stack the middle one goes if it is nowhere lowest, which is told without a division.
    """
    kept = 0
    for x in range(count):
        while kept >= 2:
            u, v = sites[kept - 2], sites[kept - 1]
            a, b = v - u, x - v
            if (a + b) * heights[0, v] - b * heights[0, u] - a * heights[0, x] < a * b * (a + b):
                break
            kept -= 1
        sites[kept] = x
        kept += 1
    k = 0
    for x in range(count):
        best = heights[0, sites[k]] + (x - sites[k]) ** 2
        while k + 1 < kept:
            following = heights[0, sites[k + 1]] + (x - sites[k + 1]) ** 2
            if following > best:
                break
            best = following
            k += 1
        heights[1, x] = best


@compiled
def _row_loop(steps: NDArray[np.int32], first: int, stop: int, short: int, root: bool, out: NDArray[Any]) -> None:
    """Fill rows first … stop − 1 of ``out``, which may share its memory with ``steps``.

    A run of True pixels needs only its own columns and the False pixels at its ends: whatever lies behind them is
    further away.
    """
    width = steps.shape[1]
    heights, near = np.empty((2, width), np.int64), np.empty((2, 3 * _SHORT), np.int32)
    sites = np.empty(width, np.int64)
    for y in range(first, stop):
        line, target = steps[y], out[y]
        x = 0
        while x < width:
            if line[x] == 0:
                target[x] = 0
                x += 1
                continue
            left = max(x - 1, 0)
            while x < width and line[x] != 0:
                x += 1
            count = min(x + 1, width) - left
            if count <= short and line[left] == 0 and line[left + count - 1] == 0:
                _search_between(line[left : left + count], count, near)
                best, run = near[1, _SHORT : _SHORT + count], target[left : left + count]
                for u in range(count):  # so near, both hold the square exactly
                    run[u] = np.sqrt(np.float32(best[u])) if root else best[u]
                continue
            for u in range(count):
                heights[0, u] = np.int64(steps[y, left + u]) ** 2
            if count <= short:
                _search_run(heights, count)
            else:
                _envelope_run(heights, count, sites)
            for u in range(count):
                out[y, left + u] = math.sqrt(heights[1, u]) if root else heights[1, u]


@overload
def distance_transform(mask: NDArray[Any], *, squared: Literal[False] = False) -> NDArray[np.float32]: ...
@overload
def distance_transform(mask: NDArray[Any], *, squared: Literal[True]) -> NDArray[np.int32] | NDArray[np.int64]: ...
def distance_transform(mask: NDArray[Any], *, squared: bool = False) -> NDArray[Any]:
    """Exact Euclidean distance of each pixel to the nearest False pixel, between pixel centres; 0 where False.

    Border: the outside of the array is no background, as in ``scipy.ndimage.distance_transform_edt``, whose float64
    result rounded to float32 this equals bit for bit. An array without any False pixel has no distance: all pixels
    become infinity, or the greatest value of the dtype when squared (SciPy measures to a pixel above the first one).

    The distance within each column is found first, then the rows are scanned: O(H · W), both shared by threads.

    Args:
        mask: bool or integer (H, W), non-zero is True; may be empty; sides up to 2²⁰.
        squared: give the squared distance, which is a whole number.

    Returns:
        float32 (H, W); when squared int32 (H, W), or int64 where H² + W² does not fit int32.

    Raises:
        TypeError: ``mask`` is neither bool nor integer.
        ValueError: ``mask`` is not (H, W), or a side is longer than 2²⁰.

    Source: A. Meijster et al., "A general algorithm for computing distance transforms in linear time", ISMM 2000
    (the two phases); C. Maurer et al., "A linear time algorithm for computing exact Euclidean distance transforms",
    IEEE Trans. PAMI 25 (2003), section 3 (the test without a division).
    """
    mask = as_mask(mask, "distance_transform")
    height, width = mask.shape
    if max(height, width) > LONGEST_SIDE:
        raise ValueError(f"distance_transform takes sides of at most {LONGEST_SIDE} pixels, not {mask.shape}")
    whole = np.int32 if height**2 + width**2 < np.iinfo(np.int32).max else np.int64
    out: NDArray[Any] = np.empty(mask.shape, whole if squared else np.float32)
    if mask.all():
        out.fill(np.iinfo(whole).max if squared else np.inf)
        return out
    steps = out.view(np.int32) if out.itemsize == 4 else np.empty(mask.shape, np.int32)  # fresh memory costs time
    far = height + width  # longer than any distance
    columns = [(first, min(first + _COLUMNS, width)) for first in range(0, width, _COLUMNS)]
    run_parallel(_column_loop, [(mask, first, stop, far, steps) for first, stop in columns])
    run_parallel(_row_loop, [(steps, first, stop, _SHORT, not squared, out) for first, stop in split_rows(height)])
    return out
