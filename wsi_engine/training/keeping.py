"""Bags that stay in memory once they are read, as far as memory allows."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

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


def available_memory() -> int:
    """Bytes that can be had without swapping: the least of what the system and the control group leave."""
    free = [_system_memory()]
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # another version, or "max": no limit
            continue
    return max(0, min(free))


def _system_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (OSError, ValueError, AttributeError):
        return 4 * 2**30
