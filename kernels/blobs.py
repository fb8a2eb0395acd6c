"""Nuclei of one tile, found quickly and roughly: connected regions of much haematoxylin, and its local maxima.

This counts and measures for texture features; it does not part nuclei that touch.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels.otsu import best_split

FLOOR = 64
"""Least haematoxylin of a nucleus, in 1/256 of an optical density: 0.25, so that tiles without nuclei have none."""

SMALLEST_AREA = 16
"""Regions of fewer pixels are no nuclei."""

PEAK_RADIUS = 3
"""A peak is the maximum of the square of 2·3 + 1 px around it."""


@compiled
def _smooth_loop(padded: NDArray[np.int16], out: NDArray[np.int32]) -> None:
    """Fill ``out`` (H, W) with ``padded`` (H + 4, W + 4) weighted by the binomials 1 4 6 4 1 along both axes."""
    rows = np.empty((padded.shape[0], out.shape[1]), np.int32)
    for y in range(rows.shape[0]):
        line = padded[y]
        for x in range(rows.shape[1]):
            ends, sides = np.int32(line[x]) + line[x + 4], np.int32(line[x + 1]) + line[x + 3]
            rows[y, x] = ends + 4 * sides + 6 * np.int32(line[x + 2])
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            ends, sides = rows[y, x] + rows[y + 4, x], rows[y + 1, x] + rows[y + 3, x]
            out[y, x] = ends + 4 * sides + 6 * rows[y + 2, x]


def smooth_binomial(image: NDArray[np.int16]) -> NDArray[np.int32]:
    """Blur by the 5 × 5 binomial filter (a Gaussian of σ = 1 px), times 256; the border pixels continue the image.

    Args:
        image: int16 (H, W).

    Returns:
        int32 (H, W), exact: 256 times the weighted mean.
    """
    out = np.empty(image.shape, np.int32)
    _smooth_loop(np.pad(image, 2, mode="edge"), out)
    return out


@compiled
def _count_levels(image: NDArray[np.int32], bins: int) -> NDArray[np.int64]:
    """Histogram of ``image`` / 256, rounded down and clipped to 0 … bins − 1: int64 (bins,)."""
    counts = np.zeros(bins, np.int64)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            counts[min(max(image[y, x] >> 8, 0), bins - 1)] += 1
    return counts


@compiled
def _join(parents: NDArray[np.int32], a: int, b: int) -> int:
    """Join the sets of labels a and b; the smaller root stays, and is returned."""
    while parents[a] != a:
        parents[a] = parents[parents[a]]
        a = parents[a]
    while parents[b] != b:
        parents[b] = parents[parents[b]]
        b = parents[b]
    low, high = min(a, b), max(a, b)
    parents[high] = low
    return low


@compiled
def _sum_regions(smooth: NDArray[np.int32], cut: int) -> NDArray[np.float64]:
    """Area and first and second moments of the 4-connected regions where ``smooth`` >= cut.

    Returns:
        float64 (R, 6): per region the sums of 1, x, y, x², y², x·y over its pixels; rows of merged labels are zero.
    """
    height, width = smooth.shape
    labels = np.zeros((height, width), np.int32)
    parents = np.zeros(height * width // 2 + 2, np.int32)
    made = 0
    for y in range(height):
        for x in range(width):
            if smooth[y, x] < cut:
                continue
            left = labels[y, x - 1] if x > 0 else 0
            above = labels[y - 1, x] if y > 0 else 0
            if left > 0 and above > 0 and left != above:
                labels[y, x] = _join(parents, left, above)
            elif left > 0 or above > 0:
                labels[y, x] = max(left, above)
            else:
                made += 1
                parents[made] = made
                labels[y, x] = made
    for label in range(1, made + 1):  # roots come before what hangs on them
        parents[label] = parents[parents[label]]
    sums = np.zeros((made + 1, 6))
    for y in range(height):
        for x in range(width):
            if labels[y, x] > 0:
                row = sums[parents[labels[y, x]]]
                row[0] += 1
                row[1] += x
                row[2] += y
                row[3] += x * x
                row[4] += y * y
                row[5] += x * y
    return sums


@compiled
def _measure_shapes(sums: NDArray[np.float64], smallest: int, out: NDArray[np.float64]) -> int:
    """Fill ``out`` (4,) with mean and deviation of the diameters, variation of the areas and mean eccentricity.

    Returns:
        The number of regions of at least ``smallest`` pixels; ``out`` is zero where there is none.
    """
    count = 0
    area_sum = area_squares = diameter_sum = eccentricity_sum = 0.0
    for r in range(sums.shape[0]):
        area = sums[r, 0]
        if area < smallest:
            continue
        count += 1
        area_sum += area
        area_squares += area * area
        diameter_sum += math.sqrt(4 * area / math.pi)
        mean_x, mean_y = sums[r, 1] / area, sums[r, 2] / area
        xx = sums[r, 3] / area - mean_x * mean_x
        yy = sums[r, 4] / area - mean_y * mean_y
        xy = sums[r, 5] / area - mean_x * mean_y
        spread = math.sqrt((xx - yy) ** 2 + 4 * xy * xy)
        major, minor = (xx + yy + spread) / 2, max(0.0, (xx + yy - spread) / 2)
        eccentricity_sum += math.sqrt(1 - minor / major)
    if count > 0:
        mean_area, mean_diameter = area_sum / count, diameter_sum / count
        out[0] = mean_diameter
        out[1] = math.sqrt(max(0.0, 4 * mean_area / math.pi - mean_diameter**2))
        out[2] = math.sqrt(max(0.0, area_squares / count - mean_area**2)) / mean_area
        out[3] = eccentricity_sum / count
    return count


@compiled
def _is_peak(smooth: NDArray[np.int32], y: int, x: int, radius: int) -> bool:
    """Whether no pixel of the square around (y, x) is higher, and none before it in raster order as high."""
    value = smooth[y, x]
    for v in range(max(y - radius, 0), min(y + radius + 1, smooth.shape[0])):
        for u in range(max(x - radius, 0), min(x + radius + 1, smooth.shape[1])):
            earlier = v < y or (v == y and u < x)
            if smooth[v, u] > value or (earlier and smooth[v, u] == value):
                return False
    return True


@compiled
def _count_peaks(smooth: NDArray[np.int32], cut: int, radius: int) -> int:
    """Number of peaks where ``smooth`` >= cut."""
    height, width = smooth.shape
    count = 0
    for y in range(height):
        for x in range(width):
            value = smooth[y, x]
            if value < cut:
                continue
            # Most pixels fail against a direct neighbour already.
            if (x > 0 and smooth[y, x - 1] >= value) or (x + 1 < width and smooth[y, x + 1] > value):
                continue
            if (y > 0 and smooth[y - 1, x] >= value) or (y + 1 < height and smooth[y + 1, x] > value):
                continue
            count += _is_peak(smooth, y, x, radius)
    return count


@compiled
def _mean_beside(image: NDArray[np.int32], cut: int) -> tuple[float, float, float]:
    """Share of pixels where ``image`` >= cut, mean of the image there, and mean elsewhere (0 where none)."""
    inside, inside_sum, total = 0, 0, 0
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            value = image[y, x]
            total += value
            if value >= cut:
                inside += 1
                inside_sum += value
    outside = image.size - inside
    mean_in = inside_sum / inside if inside > 0 else 0.0
    mean_out = (total - inside_sum) / outside if outside > 0 else 0.0
    return inside / image.size, mean_in, mean_out


def measure_nuclei(haematoxylin: NDArray[np.int16]) -> NDArray[np.float64]:
    """Nine numbers on the nuclei of a tile.

    The concentration is blurred (5 × 5 binomial) and cut at Otsu's threshold over steps of 1/256, but never below
    ``FLOOR``. Nuclei are the 4-connected regions of at least ``SMALLEST_AREA`` pixels; those cut by the border count.

    Args:
        haematoxylin: int16 (H, W), concentration in 1/256 of an optical density.

    Returns:
        float64 (9,): nuclei per 1,000 px; peaks per 1,000 px; share of pixels above the cut; mean and standard
        deviation of the nuclei's diameters in 10 px (of the disk of equal area); standard deviation of their areas over
        the mean; mean eccentricity (0 disk … 1 line); mean haematoxylin above the cut; the same less the mean below it.
    """
    smooth = smooth_binomial(haematoxylin)
    counts = _count_levels(smooth, 1536)
    cut = (max(best_split(counts, np.arange(1536, dtype=np.float64)), FLOOR) + 1) << 8
    out = np.zeros(9)
    thousands = haematoxylin.size / 1000
    out[0] = _measure_shapes(_sum_regions(smooth, cut), SMALLEST_AREA, out[3:7]) / thousands
    out[1] = _count_peaks(smooth, cut, PEAK_RADIUS) / thousands
    out[2], inside, outside = _mean_beside(smooth, cut)
    out[3:5] /= 10
    if out[2] > 0:
        out[7] = inside / 65536
        out[8] = (inside - outside) / 65536 if out[2] < 1 else 0.0
    return out
