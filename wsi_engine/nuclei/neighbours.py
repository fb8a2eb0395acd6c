"""How crowded nuclei lie."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

NEIGHBOUR_UM = 50.0
"""Radius within which neighbours are counted, in µm."""

_ROWS = 65_536


def count_neighbours(places: NDArray[np.float64], radius: float) -> NDArray[np.int64]:
    """How many other points lie within a radius of each: float64 (M, 2) to int64 (M,), in the unit of the radius.

    Complexity: O(M log M + pairs); counted without listing the pairs, so memory is O(M).
    """
    out = np.zeros(len(places), np.int64)
    if not len(places):
        return out
    tree = cKDTree(places)
    for start in range(0, len(places), _ROWS):
        part = slice(start, start + _ROWS)
        out[part] = tree.query_ball_point(places[part], radius, return_length=True, workers=-1)
    return out - 1
