"""Resampling by an exact area filter: the mean of what each output pixel covers."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled


def resample_area(
    source: NDArray[np.uint8],
    left: float,
    top: float,
    scale_x: float,
    scale_y: float,
    width: int,
    height: int,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Resample a rectangle of an image so that output pixel (i, j) covers exactly its share of the source.

    Along each axis with ``scale`` ≥ 1, output pixel i is the mean of the source over
    [start + i·scale, start + (i+1)·scale), pixels cut by the ends counting by the part covered. With
    ``scale`` < 1 there is no area to average and the value at the output pixel's centre is interpolated
    linearly. Positions beyond the source take its nearest pixel.

    Args:
        source: uint8, (h, w, 3).
        left: x of the output's left edge in source pixels (pixel k spans k to k + 1).
        top: y of the output's top edge in source pixels.
        scale_x: source pixels per output pixel along x, > 0.
        scale_y: the same along y.
        width: output pixels along x.
        height: output pixels along y.
        out: uint8, (height, width, 3), C-contiguous: takes the result instead of fresh memory.

    Returns:
        uint8, (height, width, 3), rounded to nearest; ``out`` where given.

    Raises:
        ValueError: the source is not uint8 (h, w, 3) or a number is out of range.

    Complexity: O(h·w) + O(width·height·scale_x).
    """
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
        raise ValueError(f"source must be a non-empty uint8 (h, w, 3) image, not {source.dtype} {source.shape}")
    if not (scale_x > 0 and scale_y > 0 and math.isfinite(left + top + scale_x + scale_y)):
        raise ValueError(f"scales must be positive and positions finite, not {(left, top, scale_x, scale_y)}")
    if width < 1 or height < 1:
        raise ValueError(f"the output must have at least one pixel, not {width} × {height}")
    if out is None:
        out = np.empty((height, width, 3), np.uint8)
    elif out.dtype != np.uint8 or out.shape != (height, width, 3) or not out.flags.c_contiguous:
        raise ValueError(f"out must be a contiguous uint8 ({height}, {width}, 3) array, not {out.dtype} {out.shape}")
    first_x, weights_x = _axis_weights(width, left, scale_x)
    first_y, weights_y = _axis_weights(height, top, scale_y)
    _resample(np.ascontiguousarray(source), first_x, weights_x, first_y, weights_y, out)
    return out


@compiled
def _axis_weights(n: int, start: float, scale: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """First source pixel and the weights of the following ones, for each of n output pixels."""
    taps = int(np.ceil(scale)) + 1 if scale >= 1.0 else 2
    first = np.empty(n, np.int64)
    weights = np.zeros((n, taps), np.float32)
    for i in range(n):
        if scale >= 1.0:
            low = start + i * scale
            high = low + scale
            first[i] = int(np.floor(low))
            for t in range(taps):
                covered = min(high, first[i] + t + 1.0) - max(low, float(first[i] + t))
                weights[i, t] = max(covered, 0.0) / scale
        else:
            centre = start + (i + 0.5) * scale - 0.5
            first[i] = int(np.floor(centre))
            weights[i, 1] = centre - first[i]
            weights[i, 0] = 1.0 - weights[i, 1]
    return first, weights


@compiled
def _resample(
    source: NDArray[np.uint8],
    first_x: NDArray[np.int64],
    weights_x: NDArray[np.float32],
    first_y: NDArray[np.int64],
    weights_y: NDArray[np.float32],
    out: NDArray[np.uint8],
) -> None:
    """Rows are averaged first, since neighbours along a row lie side by side in memory."""
    h, w, _ = source.shape
    flat = source.reshape(h, w * 3)
    row = np.empty(w * 3, np.float32)
    for j in range(out.shape[0]):
        row[:] = 0.0
        for t in range(weights_y.shape[1]):
            weight = weights_y[j, t]
            if weight > 0.0:
                y = min(max(first_y[j] + t, 0), h - 1)
                for k in range(w * 3):
                    row[k] += weight * flat[y, k]
        for i in range(out.shape[1]):
            red = np.float32(0.5)
            green = np.float32(0.5)
            blue = np.float32(0.5)
            for t in range(weights_x.shape[1]):
                weight = weights_x[i, t]
                if weight > 0.0:
                    x = 3 * min(max(first_x[i] + t, 0), w - 1)
                    red += weight * row[x]
                    green += weight * row[x + 1]
                    blue += weight * row[x + 2]
            out[j, i, 0] = min(int(red), 255)
            out[j, i, 1] = min(int(green), 255)
            out[j, i, 2] = min(int(blue), 255)
