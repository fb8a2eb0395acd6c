"""Runs of a label image: the pixels of each label as horizontal runs, gathered by label.

What is measured or traced per object is then a loop over that object's own runs, so the work grows with the pixels of
the objects, however their bounding boxes overlap, and groups of objects can be given to different threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels._threads import run_parallel, split_rows


@dataclass(frozen=True, eq=False)
class LabelRuns:
    """Horizontal runs of n labels; those of label ``label[k]`` are ``runs[starts[k]:starts[k + 1]]``, in raster order.

    Attributes:
        label: int64 (n,), ascending, without 0.
        starts: int64 (n + 1,).
        runs: int32 (R, 3): row, first column, column after the last.
    """

    label: NDArray[np.int64]
    starts: NDArray[np.int64]
    runs: NDArray[np.int32]


@compiled
def _count_loop(labels: NDArray[np.int32], first: int, stop: int, counts: NDArray[np.int64]) -> tuple[int, int]:
    """Fill ``counts`` of rows first … stop − 1 with the number of runs; returns the least and greatest label there."""
    low, high = np.int32(0), np.int32(0)
    for y in range(first, stop):
        row = labels[y]
        low, high = min(low, row[0]), max(high, row[0])
        count = np.int32(row[0] != 0)
        for x in range(1, row.size):
            low, high = min(low, row[x]), max(high, row[x])
            count += np.int32(row[x] != row[x - 1]) & np.int32(row[x] != 0)
        counts[y] = count
    return int(low), int(high)


@compiled
def _collect_loop(
    labels: NDArray[np.int32], first: int, stop: int, at: int, runs: NDArray[np.int32], owner: NDArray[np.int32]
) -> None:
    """Write the runs of rows first … stop − 1 and their labels, in raster order, from index ``at`` on."""
    width = labels.shape[1]
    for y in range(first, stop):
        row = labels[y]
        x = 0
        while x < width:
            value = row[x]
            start = x
            x += 1
            while x < width and row[x] == value:
                x += 1
            if value != 0:
                runs[at, 0], runs[at, 1], runs[at, 2] = y, start, x
                owner[at] = value
                at += 1


@compiled
def _gather_loop(
    runs: NDArray[np.int32], key: NDArray[np.int32], places: NDArray[np.int64], out: NDArray[np.int32]
) -> None:
    """Copy each run to the next free place of its key: a stable counting sort. ``places`` is used up."""
    for k in range(key.size):
        place = places[key[k]]
        places[key[k]] += 1
        for i in range(3):
            out[place, i] = runs[k, i]


def as_labels(labels: NDArray[Any], name: str) -> NDArray[np.int32]:
    """A label image as int32 (H, W), C-contiguous; ``name`` is the function that the messages speak of.

    Raises:
        TypeError: ``labels`` is neither bool nor of an integer type.
        ValueError: ``labels`` is not (H, W), or a label is negative or above 2³¹ − 1.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "biu":
        raise TypeError(f"{name} takes integer or bool labels, not {labels.dtype}")
    if labels.ndim != 2:
        raise ValueError(f"{name} takes labels of shape (H, W), not {labels.shape}")
    narrow = np.can_cast(labels.dtype, np.int32)
    if labels.size and not narrow and (labels.min() < 0 or labels.max() >= 2**31):
        raise ValueError(f"{name} takes labels of 0 to 2³¹ − 1, not {labels.min()} to {labels.max()}")
    return np.ascontiguousarray(labels, dtype=np.int32)


def find_runs(labels: NDArray[np.int32], name: str) -> LabelRuns:
    """Horizontal runs of every label but 0, gathered by label; rows are shared by threads.

    Args:
        labels: int32 (H, W), C-contiguous, as ``as_labels`` makes it.
        name: the function that the messages speak of.

    Raises:
        ValueError: a label is negative.

    Complexity: O(H·W); O(R log R) more for R runs when a label exceeds the number of pixels.
    """
    if labels.size == 0:
        return LabelRuns(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros((0, 3), np.int32))
    counts = np.empty(labels.shape[0], np.int64)
    bands = split_rows(labels.shape[0])
    extremes = run_parallel(_count_loop, [(labels, first, stop, counts) for first, stop in bands])
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    if low < 0:
        raise ValueError(f"{name} takes labels of at least 0, not {low}")
    ends = np.cumsum(counts)
    total = int(ends[-1])
    runs, owner = np.empty((total, 3), np.int32), np.empty(total, np.int32)
    begins = ends - counts
    run_parallel(_collect_loop, [(labels, a, b, int(begins[a]), runs, owner) for a, b in bands])
    return _gather(runs, owner, high, labels.size)


def _gather(runs: NDArray[np.int32], owner: NDArray[np.int32], high: int, pixels: int) -> LabelRuns:
    if high > pixels:  # too large for a table: number the labels first
        ids, inverse = np.unique(owner, return_inverse=True)
        owner = inverse.astype(np.int32)
    sizes = np.bincount(owner, minlength=1)
    present = np.flatnonzero(sizes)
    places = np.cumsum(sizes) - sizes
    starts = np.append(places[present], len(runs))
    gathered = np.empty_like(runs)
    _gather_loop(runs, owner, places, gathered)
    return LabelRuns((ids if high > pixels else present).astype(np.int64), starts, gathered)
