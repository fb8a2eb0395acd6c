"""Grey-level patterns of one image: co-occurrence, local binary patterns, edges."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled

GREY_LEVELS = 32
"""Levels of the co-occurrence matrices: grey values 0 … 255 divided by 8."""

EDGE_THRESHOLD = 0.1
"""Sobel magnitude, as a share of the full grey range, above which a pixel counts as an edge."""


def _uniform_classes() -> NDArray[np.uint8]:
    """Class 0 … 9 of each 8-bit pattern: its number of ones if it has at most two changes around the ring, else 9."""
    classes = np.empty(256, np.uint8)
    for code in range(256):
        turned = (code >> 1) | ((code & 1) << 7)
        classes[code] = code.bit_count() if (code ^ turned).bit_count() <= 2 else 9
    return classes


UNIFORM_CLASSES = _uniform_classes()


@compiled
def count_binary_patterns(grey: NDArray[np.uint8], classes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Histogram of the rotation-invariant uniform local binary patterns with 8 neighbours at radius 1.

    The diagonal neighbours lie at (±0.70711, ±0.70711) and are interpolated linearly; a neighbour sets its bit where
    it is at least as bright as the centre. The comparison is done in whole numbers, so ties are exact. Pixels of
    the border have no full ring and are left out.

    Args:
        grey: uint8 (H, W), both at least 3.
        classes: uint8 (256,), the class of each pattern (``UNIFORM_CLASSES``).

    Returns:
        int64 (10,), its sum (H − 2)·(W − 2).

    Source: T. Ojala et al., "Multiresolution gray-scale and rotation invariant texture classification with local
    binary patterns", IEEE TPAMI 24 (2002), sections 2.1–2.4.
    """
    height, width = grey.shape
    counts = np.zeros(10, np.int64)
    codes = np.empty(width, np.uint8)
    near, far = np.int32(29289), np.int32(70711)  # 1 − 0.70711 and 0.70711, times 100,000
    for y in range(1, height - 1):
        above, here, below = grey[y - 1], grey[y], grey[y + 1]
        for x in range(1, width - 1):
            centre = np.int32(here[x])
            east, west = np.int32(here[x + 1]) - centre, np.int32(here[x - 1]) - centre
            north, south = np.int32(above[x]) - centre, np.int32(below[x]) - centre
            north_east = near * (north + east) + far * (np.int32(above[x + 1]) - centre)
            north_west = near * (north + west) + far * (np.int32(above[x - 1]) - centre)
            south_west = near * (south + west) + far * (np.int32(below[x - 1]) - centre)
            south_east = near * (south + east) + far * (np.int32(below[x + 1]) - centre)
            code = np.int32(east >= 0) | np.int32(north_east >= 0) << 1 | np.int32(north >= 0) << 2
            code |= np.int32(north_west >= 0) << 3 | np.int32(west >= 0) << 4 | np.int32(south_west >= 0) << 5
            codes[x] = code | np.int32(south >= 0) << 6 | np.int32(south_east >= 0) << 7
        for x in range(1, width - 1):
            counts[classes[codes[x]]] += 1
    return counts


@compiled
def count_cooccurrence(grey: NDArray[np.uint8], distance: int) -> NDArray[np.int64]:
    """How often grey levels a and b meet at an offset, for four directions (0°, 45°, 90°, 135°).

    Diagonal offsets are ``distance``/√2 along each axis, rounded to whole pixels: (1, 1) for 1, (3, 3) for 4.

    Args:
        grey: uint8 (H, W), both larger than ``distance``.
        distance: in pixels.

    Returns:
        int64 (4, 32, 32): a pair counts once, with a at the first pixel in raster order.
    """
    height, width = grey.shape
    step = math.floor(distance * math.sqrt(0.5) + 0.5)
    levels = grey >> 3
    counts = np.zeros((4, GREY_LEVELS, GREY_LEVELS), np.int64)
    for y in range(height):
        for x in range(width - distance):
            counts[0, levels[y, x], levels[y, x + distance]] += 1
    for y in range(height - step):
        for x in range(width - step):
            counts[1, levels[y, x], levels[y + step, x + step]] += 1
            counts[3, levels[y, x + step], levels[y + step, x]] += 1
    for y in range(height - distance):
        for x in range(width):
            counts[2, levels[y, x], levels[y + distance, x]] += 1
    return counts


@compiled
def measure_cooccurrence(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Six properties of co-occurrence matrices, each the mean over the matrices.

    Every matrix is made symmetric and scaled to sum 1 first: p(a, b).

    Args:
        counts: int64 (M, L, L), none of them empty.

    Returns:
        float64 (6,): contrast Σ p·(a−b)² / (L − 1), dissimilarity Σ p·|a−b|, homogeneity Σ p/(1 + (a−b)²),
        energy √Σ p², correlation (1 where there is one grey level alone), entropy −Σ p·log₂ p in bits.

    Source: R. M. Haralick et al., "Textural features for image classification", IEEE Trans. SMC 3 (1973), appendix I.
    """
    total = np.zeros(6)
    levels = counts.shape[1]
    for m in range(counts.shape[0]):
        pairs = 2.0 * counts[m].sum()
        contrast = dissimilarity = homogeneity = squares = entropy = mean = 0.0
        for a in range(levels):
            for b in range(levels):
                p = (counts[m, a, b] + counts[m, b, a]) / pairs
                if p > 0:
                    gap = a - b
                    contrast += p * gap * gap
                    dissimilarity += p * abs(gap)
                    homogeneity += p / (1 + gap * gap)
                    squares += p * p
                    entropy -= p * math.log2(p)
                    mean += p * a
        variance = covariance = 0.0
        for a in range(levels):
            for b in range(levels):
                p = (counts[m, a, b] + counts[m, b, a]) / pairs
                variance += p * (a - mean) ** 2
                covariance += p * (a - mean) * (b - mean)
        total[0] += contrast / (levels - 1)
        total[1] += dissimilarity
        total[2] += homogeneity
        total[3] += math.sqrt(squares)
        total[4] += covariance / variance if variance > 1e-12 else 1.0
        total[5] += entropy
    total /= counts.shape[0]
    return total


@compiled
def measure_edges(grey: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Five numbers on the edges of a grey image; its border pixels are left out.

    Args:
        grey: uint8 (H, W), both at least 3.

    Returns:
        float64 (5,): mean and standard deviation of the Sobel magnitude √((gx² + gy²)/2), 0 … 1; share of pixels
        whose magnitude is above ``EDGE_THRESHOLD``; coherence of the gradient directions, 0 (all ways) … 1 (one way);
        standard deviation of the 4-neighbour Laplacian in grey ranges, low where the image is blurred.

    Source: coherence after J. Bigün and G. H. Granlund, "Optimal orientation detection of linear symmetry", ICCV 1987.
    """
    height, width = grey.shape
    pixels = float((height - 2) * (width - 2))
    scale = 1.0 / (4.0 * 255.0 * math.sqrt(2.0))  # Sobel weights sum to 4 a side
    threshold = (EDGE_THRESHOLD / scale) ** 2
    magnitude = 0.0
    xx = yy = xy = laplace = laplace_squares = np.int64(0)
    above = 0
    for y in range(1, height - 1):
        up, here, down = grey[y - 1], grey[y], grey[y + 1]
        for x in range(1, width - 1):
            nw, n, ne = np.int64(up[x - 1]), np.int64(up[x]), np.int64(up[x + 1])
            w, e = np.int64(here[x - 1]), np.int64(here[x + 1])
            sw, s, se = np.int64(down[x - 1]), np.int64(down[x]), np.int64(down[x + 1])
            gx, gy = (ne + 2 * e + se) - (nw + 2 * w + sw), (sw + 2 * s + se) - (nw + 2 * n + ne)
            squares = gx * gx + gy * gy
            magnitude += math.sqrt(squares)
            if squares > threshold:
                above += 1
            xx += gx * gx
            yy += gy * gy
            xy += gx * gy
            curve = n + s + w + e - 4 * np.int64(here[x])
            laplace += curve
            laplace_squares += curve * curve
    out = np.zeros(5)
    out[0] = magnitude / pixels * scale
    out[1] = math.sqrt(max(0.0, (xx + yy) / pixels * scale**2 - out[0] ** 2))
    out[2] = above / pixels
    if xx + yy > 0:
        out[3] = math.sqrt(float(xx - yy) ** 2 + 4.0 * float(xy) ** 2) / float(xx + yy)
    out[4] = math.sqrt(max(0.0, laplace_squares / pixels - (laplace / pixels) ** 2)) / 255.0
    return out
