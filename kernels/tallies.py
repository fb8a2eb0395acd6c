"""Labels counted, measured and numbered anew along the runs of a mask: fewer pixels than the image has."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels.components import find_components


@compiled
def tally_labels(
    runs: NDArray[np.int32],
    labels: NDArray[np.int32],
    values: NDArray[Any],
    sizes: NDArray[np.int64],
    totals: NDArray[np.float64],
) -> None:
    """Add the pixels of each label to ``sizes``, and their values, in raster order, to ``totals``.

    Args:
        runs: int32 (R, 3) in raster order: row, first column, column after the last.
        labels: int32 (H, W), 0 … n.
        values: of any number type (H, W).
        sizes: int64 (n + 1,).
        totals: float64 (n + 1,).
    """
    for r in range(runs.shape[0]):
        row = labels[runs[r, 0], runs[r, 1] : runs[r, 2]]
        line = values[runs[r, 0], runs[r, 1] : runs[r, 2]]
        x = 0
        while x < row.size:
            label, begin, total = row[x], x, totals[row[x]]
            while x < row.size and row[x] == label:
                total += line[x]
                x += 1
            totals[label] = total
            sizes[label] += x - begin


@compiled
def sum_stains(
    labels: NDArray[np.int32],
    runs: NDArray[np.int32],
    starts: NDArray[np.int64],
    shifts: NDArray[np.int64],
    pixels: NDArray[np.uint8],
    score: NDArray[np.float32],
    shares: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """Sum the first two stains and a score over the pixels of each label that belong to an object, in raster order.

    Args:
        labels: int32 (H, W), 0 … n, on a sheet; no label has pixels of two objects.
        runs: int32 (R, 3), object after object, each in raster order.
        starts: int64 (m + 1,): the runs of object k are ``runs[starts[k]:starts[k + 1]]``.
        shifts: int64 (m, 2), rows and columns from the runs to the sheet.
        pixels: uint8 (P, 3), run after run.
        score: float32 (P,), run after run.
        shares: float64 (2, 3, 256), what each byte of red, green and blue adds to both stains.
        out: float64 (n + 1, 6), zero so far: pixels, sum and sum of squares of both stains, sum of the score.
    """
    at = 0
    for k in range(starts.size - 1):
        for r in range(starts[k], starts[k + 1]):
            y, begin, end = runs[r, 0] + shifts[k, 0], runs[r, 1] + shifts[k, 1], runs[r, 2] + shifts[k, 1]
            size = end - begin
            line, colours, sureness = labels[y, begin:end], pixels[at : at + size], score[at : at + size]
            x = 0
            while x < size:
                label = line[x]
                row = out[label]
                n, a, aa, b, bb, s = row[0], row[1], row[2], row[3], row[4], row[5]
                while x < size and line[x] == label:
                    red, green, blue = colours[x, 0], colours[x, 1], colours[x, 2]
                    first = shares[0, 0, red] + shares[0, 1, green] + shares[0, 2, blue]
                    second = shares[1, 0, red] + shares[1, 1, green] + shares[1, 2, blue]
                    n += 1
                    a += first
                    aa += first * first
                    b += second
                    bb += second * second
                    s += sureness[x]
                    x += 1
                row[0], row[1], row[2], row[3], row[4], row[5] = n, a, aa, b, bb, s
            at += size


@compiled
def renumber_labels(runs: NDArray[np.int32], table: NDArray[np.int32], labels: NDArray[np.int32]) -> None:
    """Replace the labels (H, W) under the runs (R, 3) by their entries in ``table``."""
    for r in range(runs.shape[0]):
        row = labels[runs[r, 0], runs[r, 1] : runs[r, 2]]
        for x in range(row.size):
            row[x] = table[row[x]]


@compiled
def copy_runs(runs: NDArray[np.int32], source: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Copy what lies under the runs (R, 3) from one image (H, W) into another."""
    for r in range(runs.shape[0]):
        line, target = source[runs[r, 0], runs[r, 1] : runs[r, 2]], out[runs[r, 0], runs[r, 1] : runs[r, 2]]
        for x in range(line.size):
            target[x] = line[x]


@compiled
def mark_owners(
    runs: NDArray[np.int32], owner: NDArray[np.int32], marks: NDArray[np.bool_], out: NDArray[np.bool_]
) -> None:
    """Set ``out`` (count + 1,) for the owners (R,) with a mark (H, W) under one of their runs (R, 3)."""
    for r in range(runs.shape[0]):
        if not out[owner[r]]:
            row, found = marks[runs[r, 0], runs[r, 1] : runs[r, 2]], False
            for x in range(row.size):
                found |= row[x]
            out[owner[r]] = found


def drop_small(labels: NDArray[np.int32], mask: NDArray[np.bool_], min_area: float) -> None:
    """Clear the labels of fewer than ``min_area`` pixels; what is outside of the mask is not looked at.

    Args:
        labels: int32 (H, W), at least 0, C-contiguous; changed in place.
        mask: bool (H, W), C-contiguous.
        min_area: in pixels.
    """
    runs = find_components(mask, 8).runs
    count = int(labels.max(initial=0)) + 1
    sizes = np.zeros(count, np.int64)
    tally_labels(runs, labels, labels, sizes, np.zeros(count))
    renumber_labels(runs, np.where(sizes >= min_area, np.arange(count), 0).astype(np.int32), labels)
