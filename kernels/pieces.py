"""Moving objects about: their pixels gathered along runs, packed onto sheets with gaps, and polygons filled again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled


@compiled
def gather_pieces(
    runs: NDArray[np.int32],
    owner: NDArray[np.int32],
    run_at: NDArray[np.int64],
    pixel_at: NDArray[np.int64],
    image: NDArray[np.uint8],
    maps: NDArray[np.float32],
    detail: int,
    taken: NDArray[np.int32],
    pixels: NDArray[np.uint8],
    values: NDArray[np.float32],
) -> None:
    """Copy the runs of some objects, and what lies under them, object after object.

    Images are read in raster order, for the sake of the cache.

    Args:
        runs: int32 (R, 3) in raster order: row, first column, column after the last, in pixels of the maps.
        owner: int32 (R,), the object of each run.
        run_at: int64, where the runs of each object begin in ``taken``, −1 for those that are left out; used up.
        pixel_at: int64, where their pixels begin; used up.
        image: uint8 (h, w, 3).
        maps: float32 (C, H, W).
        detail: pixels of the maps along one pixel of the image.
        taken: int32 (Q, 3).
        pixels: uint8 (P, 3), run after run.
        values: float32 (C, P), run after run.
    """
    for r in range(runs.shape[0]):
        k = owner[r]
        if run_at[k] < 0:
            continue
        y, begin, end = runs[r, 0], runs[r, 1], runs[r, 2]
        size, at = end - begin, pixel_at[k]
        place = taken[run_at[k]]
        place[0], place[1], place[2] = y, begin, end
        run_at[k] += 1
        pixel_at[k] += size
        row, colours = image[y // detail], pixels[at : at + size]
        source, part = begin // detail, begin % detail
        for x in range(size):
            for c in range(3):
                colours[x, c] = row[source, c]
            part += 1
            if part == detail:
                part = 0
                source += 1
        for c in range(maps.shape[0]):
            line, target = maps[c, y, begin:end], values[c, at : at + size]
            for x in range(size):
                target[x] = line[x]


@compiled
def order_pieces(
    runs: NDArray[np.int32],
    order: NDArray[np.int64],
    begins: NDArray[np.int64],
    pixels: NDArray[np.uint8],
    values: NDArray[np.float32],
    ordered: NDArray[np.int32],
    new_pixels: NDArray[np.uint8],
    new_values: NDArray[np.float32],
) -> None:
    """Bring runs (R, 3) into another order with their pixels (P, 3) and values (C, P); ``begins`` (R,) of each run."""
    at = 0
    for i in range(order.size):
        r = order[i]
        for c in range(3):
            ordered[i, c] = runs[r, c]
        for k in range(begins[r], begins[r] + runs[r, 2] - runs[r, 1]):
            for c in range(3):
                new_pixels[at, c] = pixels[k, c]
            for c in range(values.shape[0]):
                new_values[c, at] = values[c, k]
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
        maps: float32 (C, P), run after run.
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
                    fields[c, y, x] = maps[c, source]
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
    maps: NDArray[np.float32],
    mask: NDArray[np.bool_],
    fields: NDArray[np.float32],
) -> None:
    """Write objects onto a sheet, each moved by its own shift.

    Args:
        runs: int32 (R, 3), object after object.
        starts: int64 (n + 1,): the runs of object k are ``runs[starts[k]:starts[k + 1]]``.
        shifts: int64 (n, 2), rows and columns to add.
        maps: float32 (C, P), run after run.
        mask: bool (H, W), set where an object lies.
        fields: float32 (C, H, W).
    """
    at = 0
    for k in range(starts.size - 1):
        for r in range(starts[k], starts[k + 1]):
            y, begin, size = runs[r, 0] + shifts[k, 0], runs[r, 1] + shifts[k, 1], runs[r, 2] - runs[r, 1]
            row = mask[y, begin : begin + size]
            for x in range(size):
                row[x] = True
            for c in range(maps.shape[0]):
                line, source = fields[c, y, begin : begin + size], maps[c, at : at + size]
                for x in range(size):
                    line[x] = source[x]
            at += size


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
