"""Otsu's threshold: the cut of a histogram that leaves the most variance between its two sides."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled


@compiled
def count_bytes(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Histogram of bytes: int64 (256,)."""
    counts = np.zeros(256, np.int64)
    for i in range(values.size):
        counts[values[i]] += 1
    return counts


@compiled
def _count_between(values: NDArray[Any], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """Histogram over bins ``edges[i] <= value < edges[i + 1]``, the last one closed; every value lies inside."""
    bins = edges.size - 1
    low, high = edges[0], edges[bins]
    scale = 1.0 / (high - low)
    counts = np.zeros(bins, np.int64)
    for i in range(values.size):
        value = np.float64(values[i])
        at = min(int((value - low) * scale * bins), bins - 1)
        # The division may land one bin off; the edges themselves decide.
        if value < edges[at]:
            at -= 1
        elif at < bins - 1 and value >= edges[at + 1]:
            at += 1
        counts[at] += 1
    return counts


@compiled
def best_split(counts: NDArray[np.int64], levels: NDArray[np.float64]) -> int:
    """Index of the last bin of the lower class where the variance between the two classes is largest.

    Args:
        counts: int64 (K,), values per bin.
        levels: float64 (K,), the value that each bin stands for.

    Returns:
        The first such index; 0 where all values share one bin.
    """
    total, total_sum = 0, 0.0
    for k in range(counts.size):
        total += counts[k]
        total_sum += counts[k] * levels[k]
    best, best_variance = 0, -1.0
    lower, lower_sum = 0, 0.0
    for k in range(counts.size - 1):
        if counts[k] == 0:
            continue
        lower += counts[k]
        lower_sum += counts[k] * levels[k]
        upper = total - lower
        if upper == 0:
            break
        gap = lower_sum / lower - (total_sum - lower_sum) / upper
        variance = float(lower) * float(upper) * gap * gap
        if variance > best_variance:
            best, best_variance = k, variance
    return best


@compiled
def best_split_of_bytes(counts: NDArray[np.int64]) -> int:
    """Otsu's threshold of a byte histogram (256,); the value itself where only one value occurs."""
    occupied, last = 0, 0
    for k in range(256):
        if counts[k] > 0:
            occupied += 1
            last = k
    if occupied <= 1:
        return last
    return best_split(counts, np.arange(256).astype(np.float64))


def otsu_threshold(values: NDArray[Any], bins: int = 256) -> float:
    """Threshold that best separates the values into two classes; the upper class is ``values > threshold``.

    Bytes are cut exactly, one bin per value. Floats are cut at the centre of one of ``bins`` equal bins between their
    least and greatest value. An array that holds one value alone returns that value.

    Args:
        values: uint8, float32 or float64, any shape, not empty, finite.
        bins: histogram bins for floats, at least 2; ignored for bytes.

    Returns:
        The threshold, in the units of ``values``.

    Raises:
        TypeError: ``values`` has another dtype.
        ValueError: ``values`` is empty or holds NaN or infinity, or ``bins`` is below 2.

    Source: N. Otsu, "A threshold selection method from gray-level histograms", IEEE Trans. SMC 9 (1979), eq. 12–18.
    """
    values = np.asarray(values)
    if values.dtype not in (np.uint8, np.float32, np.float64):
        raise TypeError(f"otsu_threshold takes uint8, float32 or float64 values, not {values.dtype}")
    if values.size == 0:
        raise ValueError("otsu_threshold needs at least one value, and the array is empty")
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype == np.uint8:
        return float(best_split_of_bytes(count_bytes(flat)))
    if bins < 2:
        raise ValueError(f"otsu_threshold needs at least 2 bins, not {bins}")
    low, high = flat.min(), flat.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("otsu_threshold needs finite values, and the array holds NaN or infinity")
    edges = np.linspace(low, high, bins + 1, dtype=flat.dtype)
    if low == high or edges[0] == edges[1]:
        return float(low)
    centres = (edges[:-1] + edges[1:]) / 2
    return float(centres[best_split(_count_between(flat, edges.astype(np.float64)), centres.astype(np.float64))])
