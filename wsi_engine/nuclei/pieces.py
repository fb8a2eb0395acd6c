"""Connected components as runs with the values of their pixels: small, and free of the window they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels.components import find_components
from wsi_engine.kernels.pieces import find_boxes, gather_along, gather_maps


@dataclass(frozen=True, eq=False)
class Pieces:
    """n components, or parts of them.

    Attributes:
        runs: int32 (R, 3): row, first column, column after the last, in pixels of the frame, piece after piece.
        starts: int64 (n + 1,): the runs of piece k are ``runs[starts[k]:starts[k + 1]]``.
        pixels: uint8 (P, 3), run after run.
        maps: float32 (P, C), run after run.
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


def join_pieces(parts: Sequence[Pieces], as_one: bool = False) -> Pieces:
    """Pieces one after another; with ``as_one`` they are all parts of a single piece."""
    runs = np.concatenate([part.runs for part in parts])
    if as_one:
        starts = np.array([0, len(runs)], np.int64)
    else:
        before = np.cumsum([0, *(len(part.runs) for part in parts)])
        ends = [part.starts[1:] + first for part, first in zip(parts, before[:-1].tolist(), strict=True)]
        starts = np.concatenate([np.zeros(1, np.int64), *ends])
    pixels = np.concatenate([part.pixels for part in parts])
    return Pieces(runs, starts, pixels, np.concatenate([part.maps for part in parts]))


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
        pixels: uint8 (h, w, 3).
        x: the window's first column in pixels of the frame.
        y: its first row.
    """

    def __init__(
        self, mask: NDArray[np.bool_], maps: NDArray[np.float32], pixels: NDArray[np.uint8], x: int, y: int
    ) -> None:
        found = find_components(mask, 8)
        order = np.argsort(found.owner, kind="stable")
        self._runs, owner = found.runs[order], found.owner[order].astype(np.int64)
        self._starts = np.searchsorted(owner, np.arange(1, found.count + 2))
        self._maps, self._pixels, self._corner = maps, pixels, np.array([y, x, x], np.int32)
        self.edges = _find_edges(self._runs, owner, mask.shape)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def take(self, chosen: NDArray[np.int64]) -> Pieces:
        """Some of the components, by their ascending numbers from 0, with the values of their pixels."""
        sizes = self._starts[chosen + 1] - self._starts[chosen]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        runs = self._runs[np.repeat(self._starts[chosen] - starts[:-1], sizes) + np.arange(starts[-1])]
        area = int((runs[:, 2].astype(np.int64) - runs[:, 1]).sum())
        colours, values = np.empty((area, 3), np.uint8), np.empty((area, len(self._maps)), np.float32)
        gather_along(runs, self._pixels, 0, 0, colours)
        gather_maps(runs, self._maps, 0, 0, values)
        return Pieces(runs + self._corner, starts, colours, values)

    def all(self) -> Pieces:
        """All of them."""
        return self.take(np.arange(len(self)))


def _find_edges(runs: NDArray[np.int32], owner: NDArray[np.int64], shape: tuple[int, ...]) -> Edges:
    height, width = shape
    edges = Edges(*(np.zeros(size, np.int64) for size in (width, width, height, height)))
    for side, row in ((edges.top, 0), (edges.bottom, height - 1)):
        for k in np.flatnonzero(runs[:, 0] == row):
            side[runs[k, 1] : runs[k, 2]] = owner[k]
    for side, touches in ((edges.left, runs[:, 1] == 0), (edges.right, runs[:, 2] == width)):
        side[runs[touches, 0]] = owner[touches]
    return edges
