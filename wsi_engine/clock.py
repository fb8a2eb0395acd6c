"""Where the time of a run goes, stage by stage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("read", "decode", "resample", "encode", "write")
"""The stages of an extraction in the order in which a tile meets them."""


class StageClock:
    """Adds up seconds per stage from any number of threads.

    Seconds of a stage are thread-seconds: two threads that decode for one second each count two.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the wall time of the ``with`` block to ``stage`` (one of :data:`STAGES`)."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        """Add ``seconds`` to ``stage``."""
        with self._lock:
            self._seconds[stage] += seconds

    def add_read(self, read: float, decode: float) -> None:
        """Add to "read" and "decode" in one step: readers do so thousands of times a second."""
        with self._lock:
            self._seconds["read"] += read
            self._seconds["decode"] += decode

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage so far."""
        with self._lock:
            return dict(self._seconds)
