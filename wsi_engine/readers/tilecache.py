"""Decoded tiles, kept while somebody still needs them and no longer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SlideError
from wsi_engine.readers.base import RGBImage

Layer = tuple[int, int]
"""Level, and by how much its tiles are reduced while they are decoded."""

Key = tuple[Layer, int]
"""Layer and number of a tile in its level, counted row by row."""

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


class _Pool:
    """Sizes of the tiles kept for one reason, least recently used first, and their limit in bytes."""

    def __init__(self, limit: int) -> None:
        self.sizes: OrderedDict[Key, int] = OrderedDict()
        self.held = 0
        self._limit = limit

    def keep(self, key: Key, size: int) -> list[Key]:
        """Enter or refresh a tile; returns the tiles that must go to make room."""
        self.drop(key)
        self.sizes[key] = size
        self.held += size
        leaving = []
        while self.held > self._limit:
            oldest, its_size = self.sizes.popitem(last=False)
            self.held -= its_size
            leaving.append(oldest)
        return leaving

    def drop(self, key: Key) -> None:
        self.held -= self.sizes.pop(key, 0)


class TileCache:
    """Shares decoded tiles between threads: each tile is decoded by one thread, the others wait for it.

    A tile of a level with a plan is kept until its last announced use; any other tile is kept while it is
    among the recent ones. A read that was not announced, of a level with a plan, counts as a use of the
    plan: it can cost a second decode later, never a wrong pixel.
    """

    def __init__(self, planned_bytes: int = PLANNED_BYTES, recent_bytes: int = RECENT_BYTES) -> None:
        self._lock = threading.Lock()
        self._slots: dict[Key, _Slot] = {}
        self._planned = _Pool(planned_bytes)
        self._recent = _Pool(recent_bytes)
        self._uses: dict[Layer, NDArray[np.int32]] = {}
        self._plans: dict[Layer, int] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of decoded tiles held now."""
        with self._lock:
            return self._planned.held + self._recent.held

    @contextmanager
    def plan(self, layer: Layer, uses: NDArray[np.int32]) -> Iterator[None]:
        """Expect each tile of ``layer`` to be used as often as ``uses`` (:func:`count_uses`) says.

        Plans of one layer add up; when the last of them ends, what they kept is dropped.
        """
        with self._lock:
            self._uses[layer] = uses + self._uses[layer] if layer in self._uses else uses.copy()
            self._plans[layer] = self._plans.get(layer, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._plans[layer] -= 1
                if not self._plans[layer]:
                    del self._plans[layer], self._uses[layer]
                    for key in [key for key in self._planned.sizes if key[0] == layer]:
                        self._drop(key)

    def take_alone(self, key: Key, *, otherwise: bool) -> bool:
        """Whether nobody else has the tile or will want it; if so the caller decodes it for itself, unshared.

        ``otherwise`` is the answer for a tile of which no use is announced.
        """
        with self._lock:
            return key not in self._slots and self._is_last_use(key, otherwise=otherwise)

    def tile(self, key: Key, decode: Callable[[], RGBImage]) -> RGBImage:
        """The tile's pixels, made by ``decode`` unless another thread has them or is making them.

        Raises:
            SlideError: ``decode`` raised it, in this thread or in the one that was waited for.
        """
        while True:
            slot = None
            with self._lock:
                waited_for = self._slots.get(key)
                if waited_for is None and not self._is_last_use(key, otherwise=False):
                    slot = self._slots[key] = _Slot()
            if waited_for is None:
                return decode() if slot is None else self._fill(key, slot, decode)
            with waited_for.lock:
                pixels, error = waited_for.pixels, waited_for.error
            if pixels is not None:
                self._count_use(key, waited_for, pixels.nbytes)
                return pixels
            if isinstance(error, SlideError):
                raise SlideError(str(error)) from error
            # Interrupted in the thread that was decoding: that is its affair, this thread tries itself.

    def clear(self) -> None:
        """Drop every tile that is kept."""
        with self._lock:
            for key in [*self._planned.sizes, *self._recent.sizes]:
                self._drop(key)

    def _fill(self, key: Key, slot: _Slot, decode: Callable[[], RGBImage]) -> RGBImage:
        try:
            pixels = slot.pixels = decode()
        except BaseException as error:
            slot.error = error
            with self._lock:
                self._drop(key)
            raise
        finally:
            slot.lock.release()
        self._count_use(key, slot, pixels.nbytes)
        return pixels

    # The methods below are called with the lock held, except _count_use, which takes it.

    def _is_last_use(self, key: Key, *, otherwise: bool) -> bool:
        """Whether one announced use is left, which is then counted; ``otherwise`` when none is announced."""
        uses = self._uses.get(key[0])
        left = 0 if uses is None else uses[key[1]]
        if uses is not None and left == 1:
            uses[key[1]] = 0
        return otherwise if left == 0 else bool(left == 1)

    def _count_use(self, key: Key, slot: _Slot, size: int) -> None:
        with self._lock:
            uses = self._uses.get(key[0])
            left = None if uses is None else int(uses[key[1]]) - 1
            if uses is not None and left is not None and left >= 0:
                uses[key[1]] = left
            if left == 0:
                self._drop(key)
            elif self._slots.get(key) is slot:
                planned = left is not None and left > 0
                (self._recent if planned else self._planned).drop(key)
                for leaving in (self._planned if planned else self._recent).keep(key, size):
                    self._slots.pop(leaving, None)

    def _drop(self, key: Key) -> None:
        self._slots.pop(key, None)
        self._planned.drop(key)
        self._recent.drop(key)
