"""Connected components of a mask as horizontal runs, joined by union-find.

Runs are found and joined by bands of rows, which threads share; then the bands are joined along their borders. The root
of a component is always its first run, so numbering the roots as they come gives raster order, whatever the bands.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels._threads import run_parallel, split_rows
from wsi_engine.kernels.bits import LAST, ONE, count_bits, lowest_bit, pack_rows


@dataclass(frozen=True, eq=False)
class Components:
    """Runs of a mask (H, W) in raster order, and the component of each.

    Attributes:
        runs: int32 (R, 3): row, first column, column after the last.
        begins: int64 (H + 1,): the runs of row y are ``runs[begins[y]:begins[y + 1]]``.
        owner: int32 (R,), components 1 … count, numbered by their first pixel in raster order.
        count: number of components.
    """

    runs: NDArray[np.int32]
    begins: NDArray[np.int64]
    owner: NDArray[np.int32]
    count: int

    def areas(self) -> NDArray[np.int64]:
        """Pixels of each component: int64 (count + 1,), where the place 0 is not used."""
        out = np.zeros(self.count + 1, np.int64)
        _area_loop(self.runs, self.owner, out)
        return out

    def groups(self) -> list[tuple[int, int]]:
        """The runs as groups (first, stop) for threads to share; none where there are no runs."""
        return split_rows(len(self.owner), 4096) if len(self.owner) else []


def check_connectivity(connectivity: int, caller: str) -> int:
    """``connectivity`` if it is 4 or 8.

    Raises:
        ValueError: it is neither.
    """
    if connectivity not in (4, 8):
        raise ValueError(f"{caller} takes a connectivity of 4 or 8, not {connectivity!r}")
    return operator.index(connectivity)


@compiled
def _count_loop(words: NDArray[np.uint64], counts: NDArray[np.int64]) -> None:
    """Fill ``counts`` (H,) with the number of runs in each packed row: the bits set behind a bit that is not."""
    for y in range(words.shape[0]):
        count, before = np.uint64(0), np.uint64(0)
        for word in words[y]:
            count += count_bits(word & ~((word << ONE) | before))
            before = word >> LAST
        counts[y] = count


def _count_band(
    mask: NDArray[np.bool_], first: int, stop: int, words: NDArray[np.uint64], counts: NDArray[np.int64]
) -> None:
    """Pack rows first … stop − 1 and count their runs."""
    words[first:stop] = pack_rows(mask[first:stop])
    _count_loop(words[first:stop], counts[first:stop])


@compiled
def _root(parent: NDArray[np.int32], k: int) -> int:
    """First run of the set of run k; shortens the way there."""
    while parent[k] != k:
        parent[k] = parent[parent[k]]
        k = int(parent[k])
    return k


@compiled
def _join_rows(
    runs: NDArray[np.int32], parent: NDArray[np.int32], begins: NDArray[np.int64], y: int, reach: int
) -> None:
    """Join the runs of row y with those of the row above that touch them; ``reach`` is 1 if corners count, else 0."""
    above, below = begins[y - 1], begins[y]
    while above < begins[y] and below < begins[y + 1]:
        if runs[above, 1] < runs[below, 2] + reach and runs[below, 1] < runs[above, 2] + reach:
            a, b = _root(parent, above), _root(parent, below)
            parent[max(a, b)] = min(a, b)
        if runs[above, 2] < runs[below, 2]:  # what ends first can touch nothing more
            above += 1
        else:
            below += 1


@compiled
def _write_runs(words: NDArray[np.uint64], y: int, width: int, runs: NDArray[np.int32]) -> None:
    """Write the runs of the packed row y. They begin and end where a bit differs from the one before it."""
    k, side = 0, 1
    before = np.uint64(0)
    for i in range(words.size):
        changes = words[i] ^ ((words[i] << ONE) | before)
        before = words[i] >> LAST
        while changes != 0:
            runs[k, side] = 64 * i + np.int64(lowest_bit(changes))
            changes &= changes - ONE
            if side == 2:
                k += 1
            side = 3 - side
    if side == 2:  # the last pixel is True, and so is the last bit of its word
        runs[k, 2] = width
    for r in range(len(runs)):
        runs[r, 0] = y


@compiled
def _band_loop(
    words: NDArray[np.uint64],
    width: int,
    first: int,
    stop: int,
    begins: NDArray[np.int64],
    reach: int,
    runs: NDArray[np.int32],
    parent: NDArray[np.int32],
) -> None:
    """Write the runs of rows first … stop − 1 and join them."""
    for y in range(first, stop):
        _write_runs(words[y], y, width, runs[begins[y] : begins[y + 1]])
        for k in range(begins[y], begins[y + 1]):
            parent[k] = k
        if y > first:
            _join_rows(runs, parent, begins, y, reach)


@compiled
def _number_loop(parent: NDArray[np.int32], owner: NDArray[np.int32]) -> int:
    """Number the components, and give their number to every run; a parent always stands before its children."""
    count = 0
    for k in range(parent.size):
        if parent[k] == k:
            count += 1
            owner[k] = count
        else:
            owner[k] = owner[parent[k]]
    return count


@compiled
def _area_loop(runs: NDArray[np.int32], owner: NDArray[np.int32], out: NDArray[np.int64]) -> None:
    """Add the length of each run to the area of its component."""
    for k in range(owner.size):
        out[owner[k]] += runs[k, 2] - runs[k, 1]


@compiled
def _paint_loop(
    runs: NDArray[np.int32], owner: NDArray[np.int32], first: int, stop: int, values: NDArray[Any], out: NDArray[Any]
) -> None:
    """Write ``values[owner]`` into the runs first … stop − 1, where it is not 0."""
    for k in range(first, stop):
        value = values[owner[k]]
        if value:
            row = out[runs[k, 0]]
            for x in range(runs[k, 1], runs[k, 2]):
                row[x] = value


def paint_components(components: Components, values: NDArray[Any], out: NDArray[Any]) -> None:
    """Write into ``out`` (H, W) the value of each component, from ``values`` (count + 1,); 0 leaves it as it is."""
    runs, owner = components.runs, components.owner
    run_parallel(_paint_loop, [(runs, owner, *group, values, out) for group in components.groups()])


def find_components(mask: NDArray[np.bool_], connectivity: int) -> Components:
    """Components of the True pixels.

    Args:
        mask: bool (H, W), C-contiguous; may be empty.
        connectivity: 4 (sides) or 8 (sides and corners).

    Complexity: O(H·W + R·α(R)) for R runs.

    Source: L. He et al., "A run-based two-scan labeling algorithm", IEEE Trans. Image Processing 17 (2008).
    """
    height = mask.shape[0]
    begins = np.zeros(height + 1, np.int64)
    if mask.size == 0:
        return Components(np.zeros((0, 3), np.int32), begins, np.zeros(0, np.int32), 0)
    bands = split_rows(height)
    words = np.empty((height, -(-mask.shape[1] // 64)), np.uint64)
    run_parallel(_count_band, [(mask, first, stop, words, begins[1:]) for first, stop in bands])
    np.cumsum(begins, out=begins)
    total, reach = int(begins[-1]), int(connectivity == 8)
    runs, parent = np.empty((total, 3), np.int32), np.empty(total, np.int32)
    run_parallel(_band_loop, [(words, mask.shape[1], *band, begins, reach, runs, parent) for band in bands])
    for first, _ in bands[1:]:
        _join_rows(runs, parent, begins, first, reach)
    owner = np.empty(total, np.int32)
    return Components(runs, begins, owner, _number_loop(parent, owner))
