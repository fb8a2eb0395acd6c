"""Sorting by keys of 64 bits, with what belongs to them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels.bits import lowest_bit

_BYTE, _EIGHT, _WORD = np.uint64(255), np.uint64(8), np.uint64(64)


@compiled
def sort_by_key(keys: NDArray[np.uint64], places: NDArray[np.int32], n: int) -> int:
    """Sort ``keys[0, :n]`` and with them ``places[0, :n]``; returns the row, 0 or 1, that holds the result.

    Radix sort by bytes, from the lowest bit that differs to the highest: few bytes for values of little range. The keys
    lose their minimum; row 1 is room to work in.
    """
    least = keys[0, 0]
    for i in range(n):
        least = min(least, keys[0, i])
    differ = np.uint64(0)
    for i in range(n):
        keys[0, i] -= least
        differ |= keys[0, i]
    counts = np.empty(256, np.int64)
    side, shift = 0, lowest_bit(differ)
    while shift < _WORD and differ >> shift != 0:
        counts[:] = 0
        for i in range(n):
            counts[(keys[side, i] >> shift) & _BYTE] += 1
        total = 0
        for digit in range(256):
            total += counts[digit]
            counts[digit] = total - counts[digit]
        for i in range(n):
            key = keys[side, i]
            at = counts[(key >> shift) & _BYTE]
            counts[(key >> shift) & _BYTE] = at + 1
            keys[1 - side, at] = key
            places[1 - side, at] = places[side, i]
        side = 1 - side
        shift += _EIGHT
    return side
