"""Moving objects about: their pixels gathered along runs, packed onto sheets with gaps, and polygons filled again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled


@compiled
def gather_along(runs: NDArray[np.int32], image: NDArray[Any], top: int, left: int, out: NDArray[Any]) -> None:
    """Copy the pixels of runs, one after another, into ``out``.

    Args:
        runs: int32 (R, 3): row, first column, column after the last.
        image: (H, W, C), whose first pixel is (``top``, ``left``) in the coordinates of the runs.
        top: row of the image's first pixel.
        left: column of the image's first pixel.
        out: (P, C), P the pixels of all runs.
    """
    at = 0
    for k in range(runs.shape[0]):
        row = image[runs[k, 0] - top]
        for x in range(runs[k, 1] - left, runs[k, 2] - left):
            for c in range(out.shape[1]):
                out[at, c] = row[x, c]
            at += 1


@compiled
def gather_maps(runs: NDArray[np.int32], maps: NDArray[np.float32], top: int, left: int, out: NDArray[Any]) -> None:
    """As :func:`gather_along` from maps (C, H, W)."""
    for c in range(out.shape[1]):
        at = 0
        for k in range(runs.shape[0]):
            row = maps[c, runs[k, 0] - top]
            for x in range(runs[k, 1] - left, runs[k, 2] - left):
                out[at, c] = row[x]
                at += 1


@compiled
def paint_along(
    runs: NDArray[np.int32],
    top: int,
    left: int,
    pixels: NDArray[np.uint8],
    maps: NDArray[np.float32],
    mask: NDArray[np.bool_],
    canvas: NDArray[np.uint8],
    fields: NDArray[np.float32],
) -> None:
    """Write runs and their values onto a canvas whose first pixel is (``top``, ``left``); what lies beyond is left out.

    Args:
        runs: int32 (R, 3): row, first column, column after the last.
        top: row of the canvas's first pixel, in the coordinates of the runs.
        left: its column.
        pixels: uint8 (P, 3), run after run.
        maps: float32 (P, C), run after run.
        mask: bool (H, W); set where a run lies.
        canvas: uint8 (H, W, 3).
        fields: float32 (C, H, W).
    """
    height, width = mask.shape
    at = 0
    for k in range(runs.shape[0]):
        y, begin, end = runs[k, 0] - top, runs[k, 1] - left, runs[k, 2] - left
        if 0 <= y < height:
            for x in range(max(begin, 0), min(end, width)):
                source = at + x - begin
                mask[y, x] = True
                for c in range(3):
                    canvas[y, x, c] = pixels[source, c]
                for c in range(fields.shape[0]):
                    fields[c, y, x] = maps[source, c]
        at += end - begin


@compiled
def find_boxes(runs: NDArray[np.int32], starts: NDArray[np.int64], out: NDArray[np.int64]) -> None:
    """Fill ``out`` (n, 4) with first row, first column, row and column after the last of each group of runs."""
    for k in range(starts.size - 1):
        first = runs[starts[k]]
        top, left, bottom, right = first[0], first[1], first[0] + 1, first[2]
        for r in range(starts[k], starts[k + 1]):
            top, bottom = min(top, runs[r, 0]), max(bottom, runs[r, 0] + 1)
            left, right = min(left, runs[r, 1]), max(right, runs[r, 2])
        out[k, 0], out[k, 1], out[k, 2], out[k, 3] = top, left, bottom, right


@compiled
def lay_shelves(
    sizes: NDArray[np.int64], order: NDArray[np.int64], width: int, gap: int, out: NDArray[np.int64]
) -> int:
    """Lay boxes side by side on shelves, ``gap`` pixels from each other and from the sheet's edge.

    Args:
        sizes: int64 (n, 2): height, width, the latter at most ``width`` − 2 · ``gap``.
        order: int64 (n,), in which they are laid; by falling height little is lost.
        width: of the sheet in pixels.
        gap: in pixels.
        out: int64 (n, 2), filled with the row and column of each box.

    Returns:
        the height of the sheet in pixels.
    """
    top, left, tallest = gap, gap, 0
    for i in range(order.size):
        k = order[i]
        if left + sizes[k, 1] + gap > width:
            top, left, tallest = top + tallest + gap, gap, 0
        out[k, 0], out[k, 1] = top, left
        left += sizes[k, 1] + gap
        tallest = max(tallest, sizes[k, 0])
    return int(top + tallest + gap)


@compiled
def paint_sheet(
    runs: NDArray[np.int32],
    starts: NDArray[np.int64],
    shifts: NDArray[np.int64],
    pixels: NDArray[np.uint8],
    maps: NDArray[np.float32],
    owner: NDArray[np.int32],
    canvas: NDArray[np.uint8],
    fields: NDArray[np.float32],
) -> None:
    """Write objects onto a sheet, each moved by its own shift.

    Args:
        runs: int32 (R, 3), object after object.
        starts: int64 (n + 1,): the runs of object k are ``runs[starts[k]:starts[k + 1]]``.
        shifts: int64 (n, 2), rows and columns to add.
        pixels: uint8 (P, 3), run after run.
        maps: float32 (P, C), run after run.
        owner: int32 (H, W), zero so far: becomes 1 + the object's number.
        canvas: uint8 (H, W, 3).
        fields: float32 (C, H, W).
    """
    at = 0
    for k in range(starts.size - 1):
        for r in range(starts[k], starts[k + 1]):
            y, begin, end = runs[r, 0] + shifts[k, 0], runs[r, 1] + shifts[k, 1], runs[r, 2] + shifts[k, 1]
            for x in range(begin, end):
                owner[y, x] = k + 1
                for c in range(3):
                    canvas[y, x, c] = pixels[at, c]
                for c in range(fields.shape[0]):
                    fields[c, y, x] = maps[at, c]
                at += 1


@compiled
def sum_stains(
    labels: NDArray[np.int32],
    owner: NDArray[np.int32],
    canvas: NDArray[np.uint8],
    score: NDArray[np.float32],
    density: NDArray[np.float64],
    inverse: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """Sum the first two stains and a score over the pixels of each label that have an owner.

    Args:
        labels: int32 (H, W), 0 … n.
        owner: int32 (H, W); pixels with 0 have no colour and are left out.
        canvas: uint8 (H, W, 3).
        score: float32 (H, W).
        density: float64 (256,), optical density of each byte.
        inverse: float64 (3, 3), from densities to concentrations.
        out: float64 (n + 1, 6), zero so far: pixels, sum and sum of squares of both stains, sum of the score.
    """
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            if labels[y, x] != 0 and owner[y, x] != 0:
                red, green, blue = density[canvas[y, x, 0]], density[canvas[y, x, 1]], density[canvas[y, x, 2]]
                first = red * inverse[0, 0] + green * inverse[1, 0] + blue * inverse[2, 0]
                second = red * inverse[0, 1] + green * inverse[1, 1] + blue * inverse[2, 1]
                row = out[labels[y, x]]
                row[0] += 1
                row[1] += first
                row[2] += first * first
                row[3] += second
                row[4] += second * second
                row[5] += score[y, x]


@compiled
def fill_polygons(offsets: NDArray[np.int64], points: NDArray[np.float64], out: NDArray[np.int32]) -> None:
    """Write 1 + k into the pixels of ``out`` (H, W) whose centre lies in polygon k, by the even-odd rule.

    Args:
        offsets: int64 (n + 1,): polygon k is ``points[offsets[k]:offsets[k + 1]]``, without its first point repeated.
        points: float64 (P, 2), x and y in pixels, pixel (row r, column c) from (c, r) to (c + 1, r + 1).
        out: int32 (H, W); later polygons overwrite earlier ones.
    """
    height, width = out.shape
    longest = 0
    for k in range(offsets.size - 1):
        longest = max(longest, offsets[k + 1] - offsets[k])
    crossings = np.empty(longest + 1, np.float64)
    for k in range(offsets.size - 1):
        begin, end = offsets[k], offsets[k + 1]
        if begin == end:
            continue
        low, high = points[begin:end, 1].min(), points[begin:end, 1].max()
        for y in range(max(int(np.floor(low)), 0), min(int(np.ceil(high)), height)):
            middle, count = y + 0.5, 0
            for i in range(begin, end):
                j = i + 1 if i + 1 < end else begin
                if (points[i, 1] <= middle) != (points[j, 1] <= middle):
                    share = (middle - points[i, 1]) / (points[j, 1] - points[i, 1])
                    crossings[count] = points[i, 0] + share * (points[j, 0] - points[i, 0])
                    count += 1
            crossings[:count].sort()
            for i in range(0, count - 1, 2):
                first = max(int(np.ceil(crossings[i] - 0.5)), 0)
                for x in range(first, min(int(np.ceil(crossings[i + 1] - 0.5)), width)):
                    out[y, x] = k + 1
