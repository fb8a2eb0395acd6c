"""Bags that stay in memory once they are read, as far as memory allows."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from wsi_engine.memory import available_memory

if TYPE_CHECKING:
    from wsi_engine.bags import BagSource

KEPT_SHARE = 0.25
"""Part of the memory available at the start that features may take."""


class PassedBags:
    """The bags of another source; what is made of their features is up to those who derive from it."""

    def __init__(self, source: BagSource) -> None:
        self._source = source

    @property
    def dim(self) -> int:
        """Numbers per tile."""
        return self._source.dim

    def __len__(self) -> int:
        return len(self._source)

    def tiles(self, place: int) -> int:
        """Number of tiles of a bag."""
        return self._source.tiles(place)


class KeptBags(PassedBags):
    """A source of bags that reads each one once, while they fit; safe from several threads.

    Features are kept as the source gives them, so that keeping them changes no result.
    """

    def __init__(self, source: BagSource, limit: int | None = None) -> None:
        """Keep at most ``limit`` bytes; None takes :data:`KEPT_SHARE` of what is available."""
        super().__init__(source)
        self._left = int(available_memory() * KEPT_SHARE) if limit is None else limit
        self._kept: dict[int, NDArray[Any]] = {}
        self._lock = threading.Lock()

    def load(self, place: int) -> NDArray[Any]:
        """The features (N, D) of a bag, from memory where they are kept."""
        with self._lock:
            kept = self._kept.get(place)
        if kept is not None:
            return kept
        features = self._source.load(place)
        with self._lock:
            if place not in self._kept and features.nbytes <= self._left:
                self._kept[place] = features
                self._left -= features.nbytes
        return features
