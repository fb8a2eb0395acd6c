"""Convex area of an object given by its runs, in integers.

The hull is that of the four edge midpoints of each pixel, and a pixel belongs to it when its centre lies inside or on
its border: the definition that scikit-image uses. Coordinates are doubled to make the midpoints integers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled


@compiled
def _push_point(chain: NDArray[np.int64], size: int, y: int, x: int) -> int:
    """Add (y, x), whose y is not less than the last one's, to a chain that is convex towards smaller x."""
    if size > 0 and chain[size - 1, 0] == y:
        if chain[size - 1, 1] <= x:
            return size
        size -= 1
    while size > 1:
        dy, dx = chain[size - 1, 0] - chain[size - 2, 0], chain[size - 1, 1] - chain[size - 2, 1]
        if dy * (x - chain[size - 2, 1]) > dx * (y - chain[size - 2, 0]):
            break
        size -= 1
    chain[size, 0], chain[size, 1] = y, x
    return size + 1


@compiled
def _sum_first_columns(chain: NDArray[np.int64], size: int) -> int:
    """Sum over the pixel rows between both ends of the chain of the first column that is not left of it."""
    total = 0
    for k in range(size - 1):
        y0, x0 = chain[k, 0], chain[k, 1]
        dy, dx = chain[k + 1, 0] - y0, chain[k + 1, 1] - x0
        y = y0 + (y0 & 1)  # pixel rows have even y; an edge owns those in y0 … y1 − 1
        while y < y0 + dy:
            total -= -(x0 * dy + dx * (y - y0)) // (2 * dy)
            y += 2
    return total


@compiled
def hull_area(runs: NDArray[np.int32], first: int, stop: int, chain: NDArray[np.int64]) -> int:
    """Pixels in the convex hull of the object with runs first … stop − 1, which are in raster order.

    Args:
        runs: int32 (R, 3): row, first column, column after the last.
        first: index of the object's first run.
        stop: index after its last run.
        chain: int64 (at least 3 · (stop − first), 2), working space.

    Complexity: O(runs + height of the object).

    Source: A. M. Andrew, "Another efficient algorithm for convex hulls in two dimensions", Inf. Process. Lett. 9
    (1979), with one chain for the left side and, mirrored, one for the right.
    """
    area = 0
    for side in range(2):
        size = 0
        k = first
        while k < stop:
            row = int(runs[k, 0])
            left = int(runs[k, 1])
            while k < stop and runs[k, 0] == row:
                k += 1
            x = 2 * left if side == 0 else -2 * (int(runs[k - 1, 2]) - 1)
            size = _push_point(chain, size, 2 * row - 1, x)
            size = _push_point(chain, size, 2 * row, x - 1)
            size = _push_point(chain, size, 2 * row + 1, x)
        area -= _sum_first_columns(chain, size)
    # Each row holds last − first + 1 pixels; the mirrored chain gives −last.
    return area + (int(runs[stop - 1, 0]) - int(runs[first, 0]) + 1)
