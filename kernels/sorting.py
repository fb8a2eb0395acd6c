"""Sorting by keys of 64 bits, with what belongs to them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels.bits import lowest_bit

_BYTE, _EIGHT, _ELEVEN, _WORD = np.uint64(255), np.uint64(8), np.uint64(11), np.uint64(64)
_LOWER = np.uint64((1 << 32) - 1)
_FEW = 2048
"""Numbers from here on are sorted by digits of 11 bits."""


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


@compiled
def sort_packed(items: NDArray[np.uint64], n: int) -> int:
    """Sort ``items[0, :n]`` by their upper 32 bits; returns the row, 0 or 1, that holds the result.

    As :func:`sort_by_key` with what belongs to a key in the lower 32 bits, which is half the memory; by digits of 11
    bits where that saves more rounds than the larger table costs. The keys lose their minimum; row 1 is room to work
    in.
    """
    least = items[0, 0]
    for i in range(n):
        least = min(least, items[0, i])
    least &= ~_LOWER
    differ = np.uint64(0)
    for i in range(n):
        items[0, i] -= least
        differ |= items[0, i]
    differ &= ~_LOWER
    width = _EIGHT if n < _FEW else _ELEVEN
    digit_of, counts = (np.uint64(1) << width) - np.uint64(1), np.empty(1 << width, np.int64)
    side, shift = 0, lowest_bit(differ)
    while shift < _WORD and differ >> shift != 0:
        counts[:] = 0
        here, there = items[side], items[1 - side]
        for i in range(n):
            counts[(here[i] >> shift) & digit_of] += 1
        total = 0
        for digit in range(counts.size):
            total += counts[digit]
            counts[digit] = total - counts[digit]
        for i in range(n):
            item = here[i]
            digit = (item >> shift) & digit_of
            there[counts[digit]] = item
            counts[digit] += 1
        side = 1 - side
        shift += width
    return side
