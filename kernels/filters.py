"""Small image filters of the tissue detector: saturation, median blur, summed areas."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled


@compiled
def _saturation_loop(rgb: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Fill ``out`` (H, W) with the saturation of ``rgb`` (H, W, 3)."""
    reciprocal = np.zeros(256, np.int64)
    for v in range(1, 256):
        reciprocal[v] = (2 * 255 * 4096 + v) // (2 * v)  # 255 / v with 12 fractional bits, to nearest
    for y in range(rgb.shape[0]):
        for x in range(rgb.shape[1]):
            r, g, b = np.int64(rgb[y, x, 0]), np.int64(rgb[y, x, 1]), np.int64(rgb[y, x, 2])
            high = max(r, g, b)
            out[y, x] = ((high - min(r, g, b)) * reciprocal[high] + 2048) >> 12


def rgb_saturation(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """HSV saturation, 255 · (max − min) / max, rounded to nearest; 0 where the pixel is black.

    The rounding is done in 12-bit fixed point, as OpenCV does for 8-bit pictures, so that a threshold means the same
    here as in tools built on it.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        uint8 (H, W).

    Raises:
        TypeError: ``rgb`` is not uint8.
        ValueError: ``rgb`` is not (H, W, 3).

    Source: A. R. Smith, "Color gamut transform pairs", SIGGRAPH 1978 (hexcone model).
    """
    rgb = np.asarray(rgb)
    if rgb.dtype != np.uint8:
        raise TypeError(f"rgb_saturation takes uint8 pixels, not {rgb.dtype}")
    if rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"rgb_saturation takes an array of shape (H, W, 3), not {rgb.shape}")
    out = np.empty(rgb.shape[:2], np.uint8)
    _saturation_loop(np.ascontiguousarray(rgb), out)
    return out


@compiled
def _median_loop(padded: NDArray[np.uint8], size: int, out: NDArray[np.uint8]) -> None:
    """Fill ``out`` (H, W) with the medians of the size × size windows of ``padded`` (H + size − 1, W + size − 1)."""
    height, width = out.shape
    half = size * size // 2
    counts = np.empty(256, np.int32)
    for y in range(height):
        counts[:] = 0
        for dy in range(size):
            for x in range(size):
                counts[padded[y + dy, x]] += 1
        # Invariant: `below` pixels of the window are < median, and below <= half < below + counts[median].
        median, below = 0, 0
        while below + counts[median] <= half:
            below += counts[median]
            median += 1
        out[y, 0] = median
        for x in range(1, width):
            for dy in range(size):
                leaves = padded[y + dy, x - 1]
                enters = padded[y + dy, x + size - 1]
                if leaves == enters:  # common on background, and a chain of updates of one count is slow
                    continue
                counts[leaves] -= 1
                counts[enters] += 1
                below += (enters < median) - (leaves < median)
            while below > half:
                median -= 1
                below -= counts[median]
            while below + counts[median] <= half:
                below += counts[median]
                median += 1
            out[y, x] = median


def median_blur(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Median of the ``size`` × ``size`` window around each pixel; the image is continued by its border pixels.

    The histogram of the window slides along each row, so the work per pixel grows with ``size`` and not its square.

    Args:
        image: uint8 (H, W).
        size: side of the window in pixels, odd; 1 copies the image.

    Returns:
        uint8 (H, W).

    Raises:
        TypeError: ``image`` is not uint8.
        ValueError: ``image`` is not (H, W), or ``size`` is even or below 1.

    Source: T. Huang et al., "A fast two-dimensional median filtering algorithm", IEEE Trans. ASSP 27 (1979).
    """
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise TypeError(f"median_blur takes a uint8 image, not {image.dtype}")
    if image.ndim != 2:
        raise ValueError(f"median_blur takes an array of shape (H, W), not {image.shape}")
    if size < 1 or size % 2 == 0:
        raise ValueError(f"median_blur needs an odd window size of at least 1, not {size}")
    if size == 1 or image.size == 0:
        return image.copy()
    out = np.empty(image.shape, np.uint8)
    _median_loop(np.pad(image, size // 2, mode="edge"), int(size), out)
    return out


@compiled
def _summed_area_loop(mask: NDArray[Any], out: NDArray[np.int64]) -> None:
    """Fill rows and columns 1… of ``out`` (H + 1, W + 1), whose row 0 and column 0 are zero."""
    for y in range(mask.shape[0]):
        row = np.int64(0)
        for x in range(mask.shape[1]):
            row += np.int64(mask[y, x])
            out[y + 1, x + 1] = out[y, x + 1] + row


def summed_area(mask: NDArray[Any]) -> NDArray[np.int64]:
    """Integral image: ``out[y, x]`` is the sum of ``mask[:y, :x]``.

    The sum over rows y0…y1 − 1 and columns x0…x1 − 1 is ``out[y1, x1] − out[y0, x1] − out[y1, x0] + out[y0, x0]``.

    Args:
        mask: bool or uint8 (H, W).

    Returns:
        int64 (H + 1, W + 1).

    Raises:
        TypeError: ``mask`` is neither bool nor uint8.
        ValueError: ``mask`` is not (H, W).

    Source: F. Crow, "Summed-area tables for texture mapping", SIGGRAPH 1984.
    """
    mask = np.asarray(mask)
    if mask.dtype not in (np.bool_, np.uint8):
        raise TypeError(f"summed_area takes a bool or uint8 mask, not {mask.dtype}")
    if mask.ndim != 2:
        raise ValueError(f"summed_area takes an array of shape (H, W), not {mask.shape}")
    out = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    _summed_area_loop(np.ascontiguousarray(mask), out)
    return out
