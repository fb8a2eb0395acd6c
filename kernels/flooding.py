"""Flooding of single components of a mask from their markers, in order of value: the compiled part of the watershed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels.bits import LAST, ONE, lowest_bit
from wsi_engine.kernels.sorting import sort_by_key, sort_packed

_SIGN, _SIX = np.uint64(1 << 63), np.uint64(6)
_SIGN_32, _UPPER, _LOWER = np.uint32(1 << 31), np.uint64(32), np.uint64((1 << 32) - 1)
_SPARSE = 8
"""A component is flooded in a box of its own, near in memory, unless the box has more than this many times its area."""


@compiled
def _rank_pixels(
    runs: NDArray[np.int32],
    image: NDArray[Any],
    corner: int,
    width: int,
    values: NDArray[np.float64],
    keys: NDArray[np.uint64],
    places: NDArray[np.int32],
    state: NDArray[np.int32],
    tails: NDArray[np.int32],
) -> None:
    """Set ``state`` of the component's pixels to 1 + their bucket, and the ``tails`` of the buckets to empty.

    The pixels are sorted by value; a bucket is named by the place of the first pixel of its value. So bucket b owns
    the places b … b + pixels of that value − 1 of the queue, and equal values alone share a bucket.
    """
    n = 0
    for k in range(runs.shape[0]):
        y = runs[k, 0]
        for x in range(runs[k, 1], runs[k, 2]):
            values[n] = np.float64(image[y, x]) + 0.0  # makes −0 into 0
            places[0, n] = y * width + x - corner
            n += 1
    bits = values.view(np.uint64)
    for i in range(n):  # order of floats to order of integers
        keys[0, i] = ~bits[i] if bits[i] & _SIGN else bits[i] | _SIGN
    side = sort_by_key(keys, places, n)
    bucket = 0
    for i in range(n):
        if keys[side, i] != keys[side, bucket]:
            bucket = i
        tails[i] = i
        state[places[side, i]] = bucket + 1


@compiled
def _rank_narrow(
    runs: NDArray[np.int32],
    image: NDArray[np.float32],
    corner: int,
    width: int,
    values: NDArray[np.float32],
    items: NDArray[np.uint64],
    state: NDArray[np.int32],
    tails: NDArray[np.int32],
) -> None:
    """As :func:`_rank_pixels` for float32: value and place share a word."""
    n, bits = 0, values.view(np.uint32)
    for k in range(runs.shape[0]):
        line = image[runs[k, 0], runs[k, 1] : runs[k, 2]]
        place = np.int64(runs[k, 0]) * width + runs[k, 1] - corner
        for x in range(line.size):
            values[x] = np.float32(line[x]) + np.float32(0)  # makes −0 into 0
        for x in range(line.size):
            key = ~bits[x] if bits[x] & _SIGN_32 else bits[x] | _SIGN_32
            items[0, n + x] = (np.uint64(key) << _UPPER) | np.uint64(place + x)
        n += line.size
    side = sort_packed(items, n)
    ranked, bucket, before = items[side], 0, items[side, 0] >> _UPPER
    for i in range(n):
        key = ranked[i] >> _UPPER
        if key != before:
            bucket, before = i, key
        tails[i] = i
        state[ranked[i] & _LOWER] = bucket + 1


@compiled
def _append(
    pixel: np.uint64, bucket: np.uint64, queue: NDArray[np.int32], tails: NDArray[np.int32], used: NDArray[np.uint64]
) -> None:
    """Append a pixel to a bucket, and mark that one as used: a bit in words of 64."""
    queue[tails[bucket]] = pixel
    tails[bucket] += 1
    used[bucket >> _SIX] |= ONE << (bucket & LAST)


@compiled
def _flood(
    words: int,
    steps: NDArray[np.int64],
    state: NDArray[np.int32],
    queue: NDArray[np.int32],
    tails: NDArray[np.int32],
    used: NDArray[np.uint64],
    level: NDArray[np.int32],
) -> None:
    """Empty the buckets from the least to the greatest; all pixels give their label to their free neighbours.

    What is reached at or below the present level joins that level, behind what waits there already: so the level never
    falls, and ``used`` is scanned once. It is all zero again in the end.
    """
    for at in range(words):
        while used[at] != 0:
            bucket = (np.uint64(at) << _SIX) | lowest_bit(used[at])
            used[at] &= used[at] - ONE
            waiting = 0
            for place in range(bucket, np.uint64(tails[bucket])):
                level[waiting] = queue[place]
                waiting += 1
            done = 0
            while done < waiting:
                pixel = np.uint64(level[done])
                label = state[pixel]
                done += 1
                for step in steps:
                    neighbour = pixel + np.uint64(step)  # wraps around where the step is negative
                    if state[neighbour] > 0:
                        target = np.uint64(state[neighbour] - 1)
                        state[neighbour] = label
                        if target <= bucket:
                            level[waiting] = neighbour
                            waiting += 1
                        else:
                            _append(neighbour, target, queue, tails, used)


@compiled
def flood_components(
    runs: NDArray[np.int32],
    starts: NDArray[np.int64],
    room: int,
    image: NDArray[Any],
    markers: NDArray[np.int32],
    corners: int,
    sheet: NDArray[np.int32],
    out: NDArray[np.int32],
) -> None:
    """Flood the components whose runs begin and end at ``starts``, none with more than ``room`` pixels.

    The state of a pixel is 1 + bucket before it has a label, then −label; it is 0 outside of the component. It is kept
    in a box of one pixel around the component, or of sparse ones in ``sheet``, a box around the image.
    """
    narrow = image.itemsize == 4
    values, keys = np.empty(0 if narrow else room), np.empty((2, room), np.uint64)
    places, line = np.empty((2, 0 if narrow else room), np.int32), np.empty(image.shape[1], np.float32)
    queue, tails, level = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.int32)
    used, box = np.zeros((room >> 6) + 1, np.uint64), np.empty(min(_SPARSE * room, sheet.size), np.int32)
    for c in range(starts.size - 1):
        own = runs[starts[c] : starts[c + 1]]
        n, left, right = 0, image.shape[1], 0
        for k in range(own.shape[0]):
            n += own[k, 2] - own[k, 1]
            left, right = min(left, own[k, 1]), max(right, own[k, 2])
        top, bottom = own[0, 0], own[own.shape[0] - 1, 0] + 1
        width = right - left + 2
        size = (bottom - top + 2) * width
        state = box
        if size <= _SPARSE * n:
            box[:size] = 0
        else:
            state, width, top, left = sheet, image.shape[1] + 2, 0, 0
        corner = (top - 1) * width + left - 1
        if narrow:
            _rank_narrow(own, image, corner, width, line, keys, state, tails)
        else:
            _rank_pixels(own, image, corner, width, values, keys, places, state, tails)
        for k in range(own.shape[0]):
            y = own[k, 0]
            for x in range(own[k, 1], own[k, 2]):
                if markers[y, x] != 0:
                    pixel = y * width + x - corner
                    _append(np.uint64(pixel), np.uint64(state[pixel] - 1), queue, tails, used)
                    state[pixel] = -markers[y, x]
        steps = np.array([-width, -1, 1, width, -width - 1, -width + 1, width - 1, width + 1])[:corners]
        _flood((n >> 6) + 1, steps, state, queue, tails, used, level)
        for k in range(own.shape[0]):
            y = own[k, 0]
            for x in range(own[k, 1], own[k, 2]):
                out[y, x] = -state[y * width + x - corner]
