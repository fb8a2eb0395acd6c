"""Measurements of labelled regions: size, place, shape and the values of channels inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels._threads import run_parallel, split_rows
from wsi_engine.kernels.hulls import hull_area
from wsi_engine.kernels.perimeters import measure_perimeters
from wsi_engine.kernels.runs import LabelRuns, as_labels, find_runs


@dataclass(frozen=True, eq=False)
class RegionTable:
    """Measurements of n labels, a row per label in ascending order; lengths in pixels.

    Attributes:
        label: int64 (n,).
        area: int64 (n,), pixels.
        bbox: int64 (n, 4): first row, first column, row after the last, column after the last.
        centroid: float64 (n, 2): row, column; the centre of the first pixel is (0, 0).
        axis_major: float64 (n,), length of the long axis of the ellipse with the same second moments.
        axis_minor: float64 (n,), length of its short axis.
        eccentricity: float64 (n,), of that ellipse: 0 for a circle, to 1 for a line.
        orientation: float64 (n,), angle from the row axis to the long axis, −π/2 … π/2, positive towards the columns;
            ±π/4 where both axes are equal.
        perimeter: float64 (n,), Benkrid and Crookes' estimate from the 4-connected border.
        area_convex: int64 (n,), pixels with their centre in the convex hull of the pixels' edge midpoints.
        solidity: float64 (n,), area / area_convex.
        equivalent_diameter: float64 (n,), diameter of the circle of the same area.
        mean: float64 (n, C), mean of each channel over the label's pixels; C is 0 where no channels were given.
        std: float64 (n, C), standard deviation (of the population).
        min: float64 (n, C).
        max: float64 (n, C).
    """

    label: NDArray[np.int64]
    area: NDArray[np.int64]
    bbox: NDArray[np.int64]
    centroid: NDArray[np.float64]
    axis_major: NDArray[np.float64]
    axis_minor: NDArray[np.float64]
    eccentricity: NDArray[np.float64]
    orientation: NDArray[np.float64]
    perimeter: NDArray[np.float64]
    area_convex: NDArray[np.int64]
    solidity: NDArray[np.float64]
    equivalent_diameter: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    min: NDArray[np.float64]
    max: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.label)


@compiled
def _moments_loop(
    spans: NDArray[np.int32],
    starts: NDArray[np.int64],
    first: int,
    stop: int,
    bbox: NDArray[np.int64],
    moments: NDArray[np.int64],
    convex: NDArray[np.int64],
) -> None:
    """Fill the rows first … stop − 1 of bounding box, moments about the box's corner and convex area.

    Moments (n, 6): 1, y, x, y², x², y·x, summed over the pixels of the label's runs ``spans``.
    """
    longest = np.int64(0)
    for k in range(first, stop):
        longest = max(longest, starts[k + 1] - starts[k])
    chain = np.empty((3 * longest, 2), np.int64)
    for k in range(first, stop):
        begin, end = starts[k], starts[k + 1]
        top, bottom = np.int64(spans[begin, 0]), np.int64(spans[end - 1, 0]) + 1
        left, right = np.int64(spans[begin, 1]), np.int64(spans[begin, 2])
        for r in range(begin, end):
            left, right = min(left, np.int64(spans[r, 1])), max(right, np.int64(spans[r, 2]))
        bbox[k, 0], bbox[k, 1], bbox[k, 2], bbox[k, 3] = top, left, bottom, right
        for r in range(begin, end):
            y, a, b = np.int64(spans[r, 0]) - top, np.int64(spans[r, 1]) - left, np.int64(spans[r, 2]) - left
            n = b - a
            x = (a + b - 1) * n // 2  # Σ x over the run, and below Σ x²
            squares = ((b - 1) * b * (2 * b - 1) - (a - 1) * a * (2 * a - 1)) // 6
            moments[k, 0] += n
            moments[k, 1] += y * n
            moments[k, 2] += x
            moments[k, 3] += y * y * n
            moments[k, 4] += squares
            moments[k, 5] += y * x
        convex[k] = hull_area(spans, begin, end, chain)


@compiled
def _channels_loop(
    channels: NDArray[Any],
    spans: NDArray[np.int32],
    starts: NDArray[np.int64],
    first: int,
    stop: int,
    out: NDArray[np.float64],
) -> None:
    """Fill the rows first … stop − 1 of ``out`` (4, n, C): mean, standard deviation, least and greatest value.

    Deviations are summed about the value of the label's first pixel, which is never further from the mean than
    √area standard deviations, so little is lost where the spread is small beside the mean.
    """
    depth = channels.shape[2]
    total, squares = np.empty(depth), np.empty(depth)
    for k in range(first, stop):
        total[:] = 0
        squares[:] = 0
        anchor = channels[spans[starts[k], 0], spans[starts[k], 1]]
        for c in range(depth):
            out[2, k, c] = out[3, k, c] = np.float64(anchor[c])
        area = 0
        for r in range(starts[k], starts[k + 1]):
            y = spans[r, 0]
            area += int(spans[r, 2]) - int(spans[r, 1])
            for c in range(depth):  # channel by channel, for the sums of a run to stay in registers
                base = np.float64(anchor[c])
                some, more, low, high = 0.0, 0.0, out[2, k, c], out[3, k, c]
                for x in range(spans[r, 1], spans[r, 2]):
                    value = np.float64(channels[y, x, c])
                    some += value - base
                    more += (value - base) * (value - base)
                    low, high = min(low, value), max(high, value)
                total[c] += some
                squares[c] += more
                out[2, k, c], out[3, k, c] = low, high
        for c in range(depth):
            out[0, k, c] = np.float64(anchor[c]) + total[c] / area
            out[1, k, c] = np.sqrt(max(0.0, (squares[c] - total[c] * total[c] / area) / area))


def measure_regions(
    labels: NDArray[Any], channels: NDArray[Any] | None = None, *, runs: LabelRuns | None = None
) -> RegionTable:
    """Measure every label of an image but 0.

    Equal to scikit-image's ``regionprops_table`` of the same properties within float rounding, with two differences:
    values are averaged in float64 (scikit-image averages float32 in float32), and where both axes of the ellipse are
    equal the orientation is ±π/4 (scikit-image's is left to rounding). A label may have several pieces: they are
    measured as one region, as scikit-image does. Groups of labels are shared by threads; results do not depend on
    how many.

    Args:
        labels: bool or integer (H, W), at least 0; 0 is background. May be empty.
        channels: uint8 or float32 (H, W, C), or (H, W) for a single channel; None measures no values. Pixels outside
            the labels are not looked at.
        runs: those of ``labels``, where they are known; None finds them.

    Returns:
        ``RegionTable``, a row per label present.

    Raises:
        TypeError: ``labels`` is not bool or integer, or ``channels`` is not uint8 or float32.
        ValueError: shapes do not fit, a label is negative or above 2³¹ − 1, or ``channels`` holds NaN or infinity
            inside a label.

    Complexity: O(H·W + C · labelled pixels + heights of the regions).

    Source: B. Jähne, "Spatio-Temporal Image Processing", Springer 1993, ch. 8 (second moments); K. Benkrid and
    D. Crookes, "Design and FPGA implementation of a perimeter estimator", Queen's University of Belfast (perimeter).
    """
    labels = as_labels(labels, "measure_regions")
    planes = _as_channels(channels, labels.shape)
    found = find_runs(labels, "measure_regions") if runs is None else runs
    n = len(found.label)
    groups = split_rows(n) if n else []
    bbox, moments, convex = np.empty((n, 4), np.int64), np.zeros((n, 6), np.int64), np.empty(n, np.int64)
    run_parallel(_moments_loop, [(found.runs, found.starts, *group, bbox, moments, convex) for group in groups])
    perimeter = measure_perimeters(labels, found, groups)
    values = np.empty((4, n, planes.shape[2]))
    if planes.shape[2]:
        run_parallel(_channels_loop, [(planes, found.runs, found.starts, *group, values) for group in groups])
    if not np.isfinite(values[0]).all():
        raise ValueError("measure_regions takes channels without NaN or infinity inside the labels")
    area = moments[:, 0]
    major, minor, eccentricity, orientation = _fit_ellipses(moments.astype(np.float64))
    return RegionTable(
        label=found.label,
        area=area.copy(),
        bbox=bbox,
        centroid=bbox[:, :2] + moments[:, 1:3] / area[:, None],
        axis_major=major,
        axis_minor=minor,
        eccentricity=eccentricity,
        orientation=orientation,
        perimeter=perimeter,
        area_convex=convex,
        solidity=area / convex,
        equivalent_diameter=np.sqrt(4 * area / np.pi),
        mean=values[0],
        std=values[1],
        min=values[2],
        max=values[3],
    )


def _as_channels(channels: NDArray[Any] | None, shape: tuple[int, ...]) -> NDArray[Any]:
    """Channels as a contiguous (H, W, C), with C = 0 for None."""
    if channels is None:
        return np.empty((*shape, 0), np.uint8)
    channels = np.asarray(channels)
    if channels.dtype not in (np.uint8, np.float32):
        raise TypeError(f"measure_regions takes uint8 or float32 channels, not {channels.dtype}")
    if channels.ndim not in (2, 3) or channels.shape[:2] != shape:
        raise ValueError(f"measure_regions takes channels of shape {shape} or (*{shape}, C), not {channels.shape}")
    return np.ascontiguousarray(channels.reshape(*shape, channels.shape[2] if channels.ndim == 3 else 1))


def _fit_ellipses(moments: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Long and short axis, eccentricity and orientation from the (n, 6) sums 1, y, x, y², x², y·x.

    The differences of products are exact for any but very large regions, so equal axes compare as equal.
    """
    n, y, x, yy, xx, yx = moments.T
    square = n * n
    rows, columns, both = (n * yy - y * y) / square, (n * xx - x * x) / square, (n * yx - y * x) / square
    half, gap = (rows + columns) / 2, (rows - columns) / 2
    spread = np.sqrt(gap * gap + both * both)
    large, small = half + spread, np.maximum(half - spread, 0)
    ratio = np.divide(small, large, out=np.ones_like(large), where=large > 0)
    diagonal = np.where(both > 0, np.pi / 4, -np.pi / 4)
    orientation = np.where(gap == 0, diagonal, 0.5 * np.arctan2(2 * both, 2 * gap))
    return 4 * np.sqrt(large), 4 * np.sqrt(small), np.sqrt(1 - ratio), orientation
