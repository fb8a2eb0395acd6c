"""Connected components as runs with the values of their pixels: small, and free of the window they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels.components import find_components
from wsi_engine.kernels.pieces import find_boxes, gather_pieces, order_pieces


@dataclass(frozen=True, eq=False)
class Pieces:
    """n components, or parts of them.

    Attributes:
        runs: int32 (R, 3): row, first column, column after the last, in pixels of the frame, piece after piece, each in
            raster order.
        starts: int64 (n + 1,): the runs of piece k are ``runs[starts[k]:starts[k + 1]]``.
        pixels: uint8 (P, 3), run after run.
        maps: float32 (C, P), run after run.
    """

    runs: NDArray[np.int32]
    starts: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    maps: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def boxes(self) -> NDArray[np.int64]:
        """First row, first column, row and column after the last of each: int64 (n, 4)."""
        out = np.empty((len(self), 4), np.int64)
        find_boxes(self.runs, self.starts, out)
        return out


def join_pieces(parts: Sequence[Pieces]) -> Pieces:
    """One piece of all parts of it."""
    if len(parts) == 1 and len(parts[0]) == 1:
        return parts[0]
    runs, pixels = np.concatenate([part.runs for part in parts]), np.concatenate([part.pixels for part in parts])
    maps = np.concatenate([part.maps for part in parts], axis=1)
    order = np.lexsort((runs[:, 1], runs[:, 0]))
    sizes = runs[:, 2].astype(np.int64) - runs[:, 1]
    out = Pieces(np.empty_like(runs), np.array([0, len(runs)]), np.empty_like(pixels), np.empty_like(maps))
    order_pieces(runs, order, np.cumsum(sizes) - sizes, pixels, maps, out.runs, out.pixels, out.maps)
    return out


@dataclass(frozen=True, eq=False)
class Edges:
    """Which piece (1 … n, or 0) lies along each side of a window: int64 top and bottom (w,), left and right (h,)."""

    top: NDArray[np.int64]
    bottom: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]


class WindowPieces:
    """The 8-connected components of a window, numbered in raster order of their first pixels.

    Args:
        mask: bool (h, w).
        maps: float32 (C, h, w).
        pixels: uint8 (h / d, w / d, 3).
        x: the window's first column in pixels of the frame.
        y: its first row.
        detail: pixels of the maps along one pixel, d.
    """

    def __init__(
        self,
        mask: NDArray[np.bool_],
        maps: NDArray[np.float32],
        pixels: NDArray[np.uint8],
        x: int,
        y: int,
        detail: int = 1,
    ) -> None:
        self._found = found = find_components(mask, 8)
        self._runs = np.bincount(found.owner, minlength=found.count + 1)
        self._areas = found.areas()
        self._images, self._corner = (pixels, maps, detail), np.array([y, x, x], np.int32)
        self.edges = _find_edges(found.runs, found.owner, mask.shape)

    def __len__(self) -> int:
        return self._found.count

    def take(self, chosen: NDArray[np.int64]) -> Pieces:
        """Some of the components, by their ascending numbers from 0, with the values of their pixels."""
        starts, begins = _add_up(self._runs[chosen + 1]), _add_up(self._areas[chosen + 1])
        run_at, pixel_at = np.full(len(self) + 1, -1), np.zeros(len(self) + 1, np.int64)
        run_at[chosen + 1], pixel_at[chosen + 1] = starts[:-1], begins[:-1]
        runs, pixels = np.empty((int(starts[-1]), 3), np.int32), np.empty((int(begins[-1]), 3), np.uint8)
        values = np.empty((len(self._images[1]), len(pixels)), np.float32)
        gather_pieces(self._found.runs, self._found.owner, run_at, pixel_at, *self._images, runs, pixels, values)
        runs += self._corner
        return Pieces(runs, starts, pixels, values)

    def take_each(self, chosen: NDArray[np.int64]) -> list[Pieces]:
        """As :meth:`take`, each component for itself."""
        together, begins = self.take(chosen), _add_up(self._areas[chosen + 1])
        out = []
        for k in range(len(chosen)):
            first, stop = together.starts[k : k + 2]
            part = slice(begins[k], begins[k + 1])
            runs, starts = together.runs[first:stop].copy(), np.array([0, stop - first])
            out.append(Pieces(runs, starts, together.pixels[part].copy(), together.maps[:, part].copy()))
        return out

    def all(self) -> Pieces:
        """All of them."""
        return self.take(np.arange(len(self)))


def _add_up(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where things of these sizes (n,) begin one after another, and where the last one ends: int64 (n + 1,)."""
    out = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=out[1:])
    return out


def _find_edges(runs: NDArray[np.int32], owner: NDArray[np.int32], shape: tuple[int, ...]) -> Edges:
    height, width = shape
    edges = Edges(*(np.zeros(size, np.int64) for size in (width, width, height, height)))
    for side, row in ((edges.top, 0), (edges.bottom, height - 1)):
        for k in np.flatnonzero(runs[:, 0] == row):
            side[runs[k, 1] : runs[k, 2]] = owner[k]
    for side, touches in ((edges.left, runs[:, 1] == 0), (edges.right, runs[:, 2] == width)):
        side[runs[touches, 0]] = owner[touches]
    return edges
