"""How far tasks are: told by workers now and then, added up where the run was started."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_EVERY_SECONDS = 0.3


class Teller:
    """In a worker: tells how far its task is, at most some times a second."""

    def __init__(self, topic: str, slide_id: str, part: int = 0) -> None:
        """Tell under a topic; ``part`` tells apart the tasks of one slide."""
        from distributed import get_worker  # noqa: PLC0415

        self._worker = get_worker()
        self._topic = topic
        self._message: dict[str, Any] = {"slide": slide_id, "part": part, "host": self._worker.address}
        self._done = 0
        self._told = 0.0

    def begin(self, tiles: int, done: int) -> None:
        """The task has so many tiles, of which some were done before."""
        self._message["tiles"] = tiles
        self._done = done
        self._tell()

    def add(self, tiles: int) -> None:
        """So many more are done."""
        self._done += tiles
        if time.monotonic() - self._told >= _EVERY_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        self._worker.log_event(self._topic, self._message | {"done": self._done})


class Tally:
    """Where the run was started: from messages to calls of a progress, in which no tile counts twice."""

    def __init__(self, started: Callable[[str, int, int], None], added: Callable[[int], None]) -> None:
        """Make a tally.

        Args:
            started: told of a slide's first message: its name, its tiles and how many were done before.
            added: told of so many more tiles.
        """
        self._started, self._added = started, added
        self._slides: dict[str, int] = {}
        self._parts: dict[tuple[str, int], int] = {}
        self._ended: set[str] = set()

    def begin(self, slide_id: str, tiles: int, done: int) -> None:
        """A slide begins; the second time nothing happens, as when its worker died."""
        if slide_id not in self._slides:
            self._slides[slide_id] = tiles - done
            self._started(slide_id, tiles, done)
            if slide_id in self._ended:  # a message may come later than the result
                self.end(slide_id)

    def hear(self, message: dict[str, Any]) -> None:
        """Take in a worker's message."""
        slide, part, done = message["slide"], message["part"], message["done"]
        if part == 0:
            self.begin(slide, message["tiles"], done)
        best = self._parts.setdefault((slide, part), done)
        if done > best:
            self._parts[slide, part] = done
            self._add(slide, done - best)

    def end(self, slide_id: str) -> None:
        """A slide is complete: what its workers had no time to tell is added."""
        self._ended.add(slide_id)
        self._add(slide_id, self._slides.get(slide_id, 0))

    def _add(self, slide_id: str, tiles: int) -> None:
        tiles = min(tiles, self._slides.get(slide_id, 0))
        if tiles > 0:
            self._slides[slide_id] -= tiles
            self._added(tiles)
