"""Perimeters of labelled regions, estimated from how their border pixels lie to one another."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels._threads import run_parallel, split_rows
from wsi_engine.kernels.runs import LabelRuns


def _perimeter_kinds() -> NDArray[np.uint8]:
    """Kind of a border pixel by 1 + 2 · (border pixels beside it) + 10 · (those at its corners)."""
    kinds = np.zeros(50, np.uint8)
    kinds[[5, 7, 15, 17, 25, 27]] = 1  # the border goes straight: length 1
    kinds[[21, 33]] = 2  # diagonally: √2
    kinds[[13, 23]] = 3  # half and half: (1 + √2) / 2
    return kinds


KINDS = _perimeter_kinds()
DIAGONAL = math.sqrt(2)


@compiled
def _border_row(labels: NDArray[np.int32], y: int, out: NDArray[np.int32]) -> None:
    """Fill ``out`` (W + 2) with the labels of row y's border pixels, 0 elsewhere and in the margin of one.

    A border pixel touches another label, or the image's edge, along a side. Rows outside the image hold none.
    """
    height, width = labels.shape
    if y < 0 or y >= height:
        for x in range(width + 2):
            out[x] = 0
        return
    row = labels[y]
    out[0] = out[width + 1] = 0
    if y == 0 or y == height - 1:
        for x in range(width):
            out[x + 1] = row[x]
        return
    above, below = labels[y - 1], labels[y + 1]
    for x in range(1, width - 1):
        value = row[x]
        differs = (value ^ above[x]) | (value ^ below[x]) | (value ^ row[x - 1]) | (value ^ row[x + 1])
        out[x + 1] = value if differs != 0 else 0
    out[1], out[width] = row[0], row[width - 1]


@compiled
def _codes_loop(labels: NDArray[np.int32], first: int, stop: int, codes: NDArray[np.uint8]) -> None:
    """Fill rows first … stop − 1 of ``codes`` with the indices of ``KINDS`` of border pixels, and 0 elsewhere."""
    width = labels.shape[1]
    rows = np.empty((3, width + 2), np.int32)  # the border pixels of three rows, used in turn
    _border_row(labels, first - 1, rows[0])
    _border_row(labels, first, rows[1])
    for y in range(first, stop):
        turn = y - first
        above, here, below = rows[turn % 3], rows[(turn + 1) % 3], rows[(turn + 2) % 3]
        _border_row(labels, y + 1, below)
        out = codes[y]
        for x in range(width):
            label = here[x + 1]
            sides = np.int32(above[x + 1] == label) + np.int32(below[x + 1] == label)
            sides += np.int32(here[x] == label) + np.int32(here[x + 2] == label)
            corners = np.int32(above[x] == label) + np.int32(above[x + 2] == label)
            corners += np.int32(below[x] == label) + np.int32(below[x + 2] == label)
            code = np.int32(1) + np.int32(2) * sides + np.int32(10) * corners
            out[x] = np.uint8(code if label != 0 else np.int32(0))


@compiled
def _lengths_loop(
    codes: NDArray[np.uint8],
    spans: NDArray[np.int32],
    starts: NDArray[np.int64],
    first: int,
    stop: int,
    perimeter: NDArray[np.float64],
) -> None:
    """Fill the rows first … stop − 1 of ``perimeter`` from the codes of each label's pixels."""
    counts = np.zeros(4, np.int64)
    for k in range(first, stop):
        counts[:] = 0
        for r in range(starts[k], starts[k + 1]):
            row = codes[spans[r, 0]]
            for x in range(spans[r, 1], spans[r, 2]):
                if row[x] != 0:
                    counts[KINDS[row[x]]] += 1
        perimeter[k] = counts[1] + counts[2] * DIAGONAL + counts[3] * (1 + DIAGONAL) / 2


def measure_perimeters(
    labels: NDArray[np.int32], found: LabelRuns, groups: list[tuple[int, int]]
) -> NDArray[np.float64]:
    """Perimeter of each label by scikit-image's definition with a border of 4-connected neighbours.

    Args:
        labels: int32 (H, W), C-contiguous.
        found: its runs, of n labels.
        groups: ranges of the n labels to be shared by threads.

    Returns:
        float64 (n,).

    Complexity: O(H·W).

    Source: K. Benkrid and D. Crookes, "Design and FPGA implementation of a perimeter estimator", Queen's University of
    Belfast.
    """
    perimeter = np.empty(len(found.label))
    if groups:
        codes = np.empty(labels.shape, np.uint8)
        run_parallel(_codes_loop, [(labels, *band, codes) for band in split_rows(labels.shape[0])])
        run_parallel(_lengths_loop, [(codes, found.runs, found.starts, *group, perimeter) for group in groups])
    return perimeter
