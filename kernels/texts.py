"""Numbers as text, where there are so many that Python objects of them cost more than all else."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled

_ZERO, _MINUS, _DOT, _COMMA, _OPEN, _CLOSE = (ord(sign) for sign in "0-.,[]")

_LARGEST = 1e13


@compiled
def _write_number(hundredths: int, minus: bool, whole: bool, out: NDArray[np.uint8], at: int) -> int:
    """Write a number given in hundredths, as Python writes an int or a float; returns the place after it."""
    if minus:
        out[at] = _MINUS
        at += 1
    units, cents = hundredths // 100, hundredths % 100
    size, rest = 1, units // 10
    while rest > 0:
        size += 1
        rest //= 10
    for k in range(at + size - 1, at - 1, -1):
        out[k] = _ZERO + units % 10
        units //= 10
    at += size
    if whole:
        return at
    out[at], out[at + 1] = _DOT, _ZERO + cents // 10
    if cents % 10 == 0:
        return at + 2
    out[at + 2] = _ZERO + cents % 10
    return at + 3


@compiled
def _write_rings(
    offsets: NDArray[np.int64],
    points: NDArray[np.float64],
    whole: bool,
    out: NDArray[np.uint8],
    ends: NDArray[np.int64],
) -> None:
    """Write rings into ``out``, one after another, and where each ends into ``ends``."""
    at = 0
    for k in range(offsets.size - 1):
        out[at] = _OPEN
        at += 1
        for step in range(offsets[k + 1] - offsets[k] + 1):
            row = offsets[k] + step if offsets[k] + step < offsets[k + 1] else offsets[k]
            for axis in range(2):
                out[at] = _COMMA if axis else _OPEN
                value = points[row, axis]
                hundredths = int(abs(np.rint(value * 100)))
                minus = math.copysign(1.0, value) < 0 and (hundredths > 0 or not whole)
                at = _write_number(hundredths, minus, whole, out, at + 1)
            out[at], out[at + 1] = _CLOSE, _COMMA
            at += 2
        out[at - 1] = _CLOSE
        ends[k] = at


def format_rings(offsets: NDArray[np.int64], points: NDArray[np.float64], whole: bool = False) -> list[str]:
    """Closed rings as JSON, ``[[x,y],…]`` with the first point again at the end, to two decimals.

    Args:
        offsets: int64 (n + 1,): ring k is ``points[offsets[k]:offsets[k + 1]]``, at least one point.
        points: float64 (P, 2), finite and within ±10¹³: beyond, doubles have no second decimal.
        whole: leave the decimals out.

    Returns:
        n texts, equal to those of ``json.dumps`` of the points rounded by NumPy.

    Raises:
        ValueError: the offsets are not those of the points, or a point is not within the range.
    """
    if offsets[0] != 0 or offsets[-1] != len(points) or (np.diff(offsets) < 1).any():
        raise ValueError(f"format_rings takes offsets of rings of {len(points)} points, one at least in each")
    largest = np.abs(points).max(initial=0)
    if not largest <= _LARGEST:
        raise ValueError(f"format_rings takes finite points within ±{_LARGEST:g}, not {largest:g}")
    if not len(points):
        return []
    digits = len(str(int(largest) + 1))
    out = np.empty((len(points) + len(offsets)) * (2 * digits + 11) + 2 * len(offsets), np.uint8)
    ends = np.empty(len(offsets) - 1, np.int64)
    _write_rings(offsets, points, whole, out, ends)
    text = out[: ends[-1]].tobytes().decode("ascii")
    return [text[first:stop] for first, stop in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]
