"""Decoded tiles, kept while somebody still needs them and no longer."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from wsi_engine.readers.base import RGBImage

Key = tuple[int, int]
"""Level and number of a tile in that level, counted row by row."""

PLANNED_BYTES = 1 << 30
"""Decoded tiles kept for announced reads; beyond it the oldest are dropped and decoded again when needed."""

RECENT_BYTES = 64 << 20
"""Decoded tiles kept from reads that nobody announced."""


def count_uses(boxes: NDArray[np.int64], tile: tuple[int, int], tiles: tuple[int, int]) -> NDArray[np.int32]:
    """How many boxes touch each tile of a level.

    ``boxes`` (N, 4) are x, y, width, height in pixels of the level, ``tile`` the (width, height) of a tile in
    pixels, ``tiles`` how many there are (across, down). Returns int32 (across × down), row by row.
    """
    table = np.asarray(boxes, dtype=np.int64).reshape(-1, 4)
    first = [np.clip(table[:, axis] // tile[axis], 0, tiles[axis]) for axis in (0, 1)]
    last = [np.clip(-(-(table[:, axis] + table[:, axis + 2]) // tile[axis]), 0, tiles[axis]) for axis in (0, 1)]
    touches = (last[0] > first[0]) & (last[1] > first[1]) & (table[:, 2] > 0) & (table[:, 3] > 0)
    left, top, right, bottom = (side[touches] for side in (*first, *last))
    edges = np.zeros((tiles[1] + 1, tiles[0] + 1), dtype=np.int32)
    for rows, columns, step in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        np.add.at(edges, (rows, columns), np.int32(step))
    uses = edges.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
    return np.ascontiguousarray(uses[:-1, :-1]).reshape(-1)


class _Slot:
    """A tile that is being decoded (``lock`` held by who does it) or has been."""

    __slots__ = ("error", "lock", "pixels")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()
        self.pixels: RGBImage | None = None
        self.error: BaseException | None = None


class TileCache:
    """Shares decoded tiles between threads: each tile is decoded by one thread, the others wait for it.

    A tile of a level with a plan is kept until its last announced use; any other tile is kept while it is
    among the recent ones. A read that was not announced, of a level with a plan, counts as a use of the
    plan: it can cost a second decode later, never a wrong pixel.
    """

    def __init__(self, planned_bytes: int = PLANNED_BYTES, recent_bytes: int = RECENT_BYTES) -> None:
        self._lock = threading.Lock()
        self._slots: OrderedDict[Key, _Slot] = OrderedDict()
        self._recent: OrderedDict[Key, _Slot] = OrderedDict()
        self._uses: dict[int, NDArray[np.int32]] = {}
        self._plans: dict[int, int] = {}
        self._held = {"planned": 0, "recent": 0}
        self._limits = {"planned": planned_bytes, "recent": recent_bytes}

    @property
    def held_bytes(self) -> int:
        """Bytes of decoded tiles held now."""
        with self._lock:
            return sum(self._held.values())
