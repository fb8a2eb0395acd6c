"""Each label of an image opened by a disk of its own size: thin tails go, and small objects keep their shape."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled

_FAR = 1 << 14
"""More steps than any column has, whose square is still an int32."""

LARGEST_BOX = 1024
"""Side in pixels up to which the box of a label is looked at: larger labels stay as they are."""


def open_labels(labels: NDArray[np.int32], runs: NDArray[np.int32], share: float) -> None:
    """Open each label by a disk whose radius is a share of the radius of the largest disk that fits into it.

    Of what is deeper than that radius, the 4-connected part around the deepest pixel (the first in raster order) is
    kept, with all of the label that lies within the radius of it; the rest becomes background. So a label stays in one
    piece, and none vanishes. Outside of a label is whatever is not of it: other labels and beyond the image too.

    Args:
        labels: int32 (H, W), at least 0, C-contiguous; changed in place.
        runs: int32 (R, 3): row, first column, column after the last, which hold all the labels.
        share: 0 … 1 of the inscribed radius; a disk smaller than a pixel changes nothing.

    Complexity: O(area of the labels' boxes × inscribed radius).

    Source: J. Serra, "Image Analysis and Mathematical Morphology", 1982, chapter II, for the opening.
    """
    count = int(labels.max(initial=0))
    boxes = np.empty((count + 1, 4), np.int32)
    boxes[:] = labels.shape[0], labels.shape[1], 0, 0
    _box_loop(labels, runs, boxes)
    sides = (boxes[1:, 2:] - boxes[1:, :2])[(boxes[1:, 2:] - boxes[1:, :2]).max(axis=1) <= LARGEST_BOX]
    high, wide = sides.max(axis=0, initial=0)
    _open_loop(
        labels, boxes, share**2, np.empty((high + 2, wide + 2), np.int32), np.empty((high + 2, wide + 2), np.int32)
    )


@compiled
def _box_loop(labels: NDArray[np.int32], runs: NDArray[np.int32], boxes: NDArray[np.int32]) -> None:
    """Widen ``boxes`` (n + 1, 4), first row and column, row and column after the last, by the pixels of each label."""
    for r in range(runs.shape[0]):
        y, x, end = runs[r, 0], runs[r, 1], runs[r, 2]
        while x < end:
            label, begin = labels[y, x], x
            while x < end and labels[y, x] == label:
                x += 1
            box = boxes[label]
            box[0], box[1] = min(box[0], y), min(box[1], begin)
            box[2], box[3] = max(box[2], y + 1), max(box[3], x)


@compiled
def _open_loop(
    labels: NDArray[np.int32],
    boxes: NDArray[np.int32],
    share: float,
    squares: NDArray[np.int32],
    steps: NDArray[np.int32],
) -> None:
    """Open labels 1 … n by the root of ``share`` times their squared inscribed radius; two planes of working space."""
    lines = np.empty((2, squares.shape[0] + 2 * squares.shape[1]), np.int32)
    stack = np.empty((squares.size, 2), np.int32)
    for k in range(1, boxes.shape[0]):
        top, left, bottom, right = boxes[k]
        height, width = bottom - top, right - left
        if height <= 0 or max(height, width) > LARGEST_BOX:
            continue
        window = labels[top:bottom, left:right]
        depth, core = squares[: height + 2, : width + 2], steps[: height + 2, : width + 2]
        y, x = _measure_depth(window, np.int32(k), depth, lines)
        radius = share * depth[y, x]  # squared
        if radius >= 1:
            _flood(depth, radius, y, x, core, stack)
            _keep_near(window, np.int32(k), core, radius, lines)


@compiled
def _measure_depth(
    window: NDArray[np.int32], label: np.int32, depth: NDArray[np.int32], lines: NDArray[np.int32]
) -> tuple[int, int]:
    """Fill ``depth`` (h + 2, w + 2) with squared distances to the outside of a label; the place of the greatest."""
    height, width = window.shape
    depth[0], depth[height + 1] = 0, 0
    for y in range(1, height + 1):  # along columns first
        before, here, row = depth[y - 1], depth[y], window[y - 1]
        here[0], here[width + 1] = 0, 0
        for x in range(width):
            here[x + 1] = (before[x + 1] + np.int32(1)) * np.int32(row[x] == label)
    for y in range(height, 0, -1):
        after, here = depth[y + 1], depth[y]
        for x in range(1, width + 1):
            here[x] = min(here[x], after[x] + np.int32(1))
    best_y, best_x = 1, 1
    for y in range(1, height + 1):
        here = depth[y]
        _lower_envelope(here, here.max(), 0, lines)
        for x in range(width + 2):
            here[x] = lines[1, x]
            if here[x] > depth[best_y, best_x]:
                best_y, best_x = y, x
    return best_y, best_x


@compiled
def _lower_envelope(steps: NDArray[np.int32], reach: int, beyond: int, lines: NDArray[np.int32]) -> None:
    """Squared distances of a row's pixels, from steps along the columns, into ``lines[1]``, all pixels at once.

    Args:
        steps: int32 (w,).
        reach: columns on either side that are looked at.
        beyond: squared distance of what lies beyond the row.
        lines: int32 (2, at least w + 2 · reach), working space.
    """
    width = steps.size
    line, best = lines[0, : width + 2 * reach], lines[1, :width]
    line[:reach], line[reach + width :] = beyond, beyond
    for x in range(width):
        line[reach + x] = best[x] = steps[x] * steps[x]
    for step in range(1, reach + 1):
        left, right, square = line[reach - step :], line[reach + step :], np.int32(step * step)
        for x in range(width):
            best[x] = min(best[x], min(left[x], right[x]) + square)


@compiled
def _flood(
    depth: NDArray[np.int32], radius: float, y: int, x: int, core: NDArray[np.int32], stack: NDArray[np.int32]
) -> None:
    """Set ``core`` to 0 in the 4-connected part around (y, x) of what is deeper than ``radius``, squared, else far."""
    core[:] = _FAR
    core[y, x] = 0
    stack[0, 0], stack[0, 1] = y, x
    size = 1
    while size:
        size -= 1
        y, x = stack[size, 0], stack[size, 1]
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            v, u = y + dy, x + dx
            if depth[v, u] > radius and core[v, u]:
                core[v, u] = 0
                stack[size, 0], stack[size, 1] = v, u
                size += 1


@compiled
def _keep_near(
    window: NDArray[np.int32], label: np.int32, core: NDArray[np.int32], radius: float, lines: NDArray[np.int32]
) -> None:
    """Clear the pixels of a label that are further from its core than the root of ``radius``."""
    height, width = window.shape
    for y in range(1, height + 2):
        before, here = core[y - 1], core[y]
        for x in range(width + 2):
            here[x] = min(here[x], before[x] + np.int32(1))
    for y in range(height, -1, -1):
        after, here = core[y + 1], core[y]
        for x in range(width + 2):
            here[x] = min(here[x], after[x] + np.int32(1))
    reach = int(np.sqrt(radius))
    for y in range(height):
        _lower_envelope(core[y + 1], reach, _FAR * _FAR, lines)
        row = window[y]
        for x in range(width):
            if row[x] == label and lines[1, x + 1] > radius:
                row[x] = 0
