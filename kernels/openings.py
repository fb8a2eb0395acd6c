"""Each label of an image opened by a disk of its own size: thin tails go, and small objects keep their shape."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled

_FAR = 127
"""More steps than any column has to its end; its square and any other's add up to an int16."""

LARGEST_BOX = 250
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
    sides = boxes[1:, 2:] - boxes[1:, :2]
    sides = sides[(sides.min(axis=1) > 0) & (sides.max(axis=1) <= LARGEST_BOX)]
    room = (sides + 2).prod(axis=1).max(initial=0)
    _open_loop(labels, boxes, share**2, np.empty((3, room + 2 * _FAR), np.int16))


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
def _open_loop(labels: NDArray[np.int32], boxes: NDArray[np.int32], share: float, planes: NDArray[np.int16]) -> None:
    """Open labels 1 … n by the root of ``share`` times their squared inscribed radius.

    The box of a label is laid out row after row with one column outside of it between the rows, so that all rows are
    compared with their shifted selves at once. ``planes``: int16 (3, N), working space.
    """
    stack = np.empty(planes.shape[1], np.int32)
    for k in range(1, boxes.shape[0]):
        top, left, bottom, right = boxes[k]
        height, width = bottom - top, right - left
        if height <= 0 or max(height, width) > LARGEST_BOX:
            continue
        window = labels[top:bottom, left:right]
        room, pitch = (height + 2) * (width + 1), width + 1
        steps, line, depth = planes[0, :room], planes[1], planes[2, :room]
        _measure_depth(window, np.int32(k), steps, line, depth)
        deepest = int(depth.max())
        radius = min(int(np.floor(share * deepest)), deepest - 1)  # squared, as all distances are; something is deeper
        if radius < 1:
            continue
        _find_core(depth, radius, steps)
        if not _is_simple(steps, pitch):
            _flood(depth, radius, pitch, steps, stack)
        _spread(steps, pitch)
        _lower_envelope(steps, int(np.sqrt(radius)), line, depth)
        for y in range(height):
            row, far = window[y], depth[(y + 1) * pitch + 1 : (y + 2) * pitch]
            for x in range(width):
                row[x] *= np.int32((row[x] != k) | (far[x] <= radius))


@compiled
def _measure_depth(
    window: NDArray[np.int32],
    label: np.int32,
    steps: NDArray[np.int16],
    line: NDArray[np.int16],
    depth: NDArray[np.int16],
) -> None:
    """Fill ``depth``, rows of w + 1 pixels of which the first is outside, with squared distances to the outside."""
    height, width = window.shape
    pitch, most = width + 1, np.int16(0)
    steps[:pitch], steps[(height + 1) * pitch :] = 0, 0
    for y in range(height):
        begin = (y + 1) * pitch + 1
        before, here, row = steps[begin - pitch : begin - 1], steps[begin : begin + width], window[y]
        steps[begin - 1] = 0
        for x in range(width):
            here[x] = np.int16(before[x] + 1) * np.int16(row[x] == label)
    for y in range(height - 1, -1, -1):
        begin = (y + 1) * pitch
        after, here = steps[begin + pitch : begin + 2 * pitch], steps[begin : begin + pitch]
        for x in range(pitch):
            here[x] = min(here[x], np.int16(after[x] + 1))
            most = max(most, here[x])
    _lower_envelope(steps, int(most), line, depth)


@compiled
def _lower_envelope(steps: NDArray[np.int16], reach: int, line: NDArray[np.int16], best: NDArray[np.int16]) -> None:
    """Squared distances from steps along the columns: the least square of ``reach`` columns on either side.

    A search that leaves its row finds nothing nearer there: outside of a label it passes a column of distance 0 first,
    and from a core it is further away than the radius. ``line`` is working space, ``best`` the result.
    """
    size = steps.size
    line[:reach], line[reach + size : 2 * reach + size] = _FAR * _FAR, _FAR * _FAR
    middle = line[reach : reach + size]
    for i in range(size):
        middle[i] = best[i] = np.int16(steps[i] * steps[i])
    for step in range(1, reach + 1):
        left, right, square = line[reach - step :], line[reach + step :], np.int16(step * step)
        for i in range(size):
            best[i] = min(best[i], np.int16(min(left[i], right[i]) + square))


@compiled
def _find_core(depth: NDArray[np.int16], radius: int, core: NDArray[np.int16]) -> None:
    """Set ``core`` to 0 where it is deeper than ``radius``, squared, else far."""
    least = np.int16(radius)
    for i in range(depth.size):
        core[i] = np.int16(_FAR) * np.int16(depth[i] <= least)


@compiled
def _is_simple(core: NDArray[np.int16], pitch: int) -> bool:
    """Whether each row holds one run of the core at most, which touches that of the row before."""
    last, first, stop = -1, 0, 0
    i = 0
    while i < core.size:
        if core[i]:
            i += 1
            continue
        y, begin = i // pitch, i % pitch
        while not core[i]:
            i += 1
        end = begin + i - (y * pitch + begin)
        if last >= 0 and (y != last + 1 or begin >= stop or end <= first):
            return False
        last, first, stop = y, begin, end
    return True


@compiled
def _flood(
    depth: NDArray[np.int16], radius: int, pitch: int, core: NDArray[np.int16], stack: NDArray[np.int32]
) -> None:
    """Set ``core`` to 0 in the 4-connected part of the deepest pixel among those deeper than ``radius``, else far."""
    core[:] = _FAR
    stack[0], size = depth.argmax(), 1
    core[stack[0]] = 0
    while size:
        size -= 1
        here = stack[size]
        for step in (-pitch, pitch, -1, 1):
            i = here + step
            if depth[i] > radius and core[i]:
                core[i], stack[size] = 0, i
                size += 1


@compiled
def _spread(steps: NDArray[np.int16], pitch: int) -> None:
    """Each pixel's steps along its column to the nearest 0, or far."""
    for begin in range(pitch, steps.size, pitch):
        before, here = steps[begin - pitch : begin], steps[begin : begin + pitch]
        for x in range(pitch):
            here[x] = min(here[x], np.int16(before[x] + 1))
    for begin in range(steps.size - 2 * pitch, -1, -pitch):
        after, here = steps[begin + pitch : begin + 2 * pitch], steps[begin : begin + pitch]
        for x in range(pitch):
            here[x] = min(here[x], np.int16(after[x] + 1))
