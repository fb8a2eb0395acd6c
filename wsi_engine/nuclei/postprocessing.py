"""What follows a method's maps, in a thread beside it: components are joined, split, measured and outlined."""

from __future__ import annotations

import threading
from queue import Queue
from typing import Self

from wsi_engine.nuclei.seams import SeamJoiner
from wsi_engine.nuclei.sheets import NucleiChunk, SheetSplitter
from wsi_engine.nuclei.windows import WindowMaps

_WINDOWS_BEHIND = 2
"""Tiles of masks and maps that may wait for the post-processing before the method waits for it too."""


class PostProcessing:
    """A thread that makes nuclei of windows, beside the method; a context manager, whose end waits for it.

    Args:
        joiner: joins components across windows.
        splitter: makes nuclei of complete ones.
    """

    def __init__(self, joiner: SeamJoiner, splitter: SheetSplitter) -> None:
        self._joiner, self._splitter = joiner, splitter
        self._queue: Queue[list[WindowMaps] | None] = Queue(_WINDOWS_BEHIND)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="nuclei", daemon=True)
        self.chunks: list[NucleiChunk] = []
        """The nuclei so far; all of them after the end."""

    def take(self, windows: list[WindowMaps]) -> None:
        """Hand windows over; waits while too many are waiting, and raises what went wrong."""
        if self._error:
            raise self._error
        self._queue.put(windows)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._error = self._error or error  # what is waiting is not worked on any more
        self._queue.put(None)
        self._thread.join()
        if kind is None and self._error:
            raise self._error

    def _run(self) -> None:
        while (windows := self._queue.get()) is not None:
            if self._error:
                continue
            try:
                for window in windows:
                    for pieces in self._joiner.add(window):
                        self._keep(self._splitter.add(pieces))
            except BaseException as error:
                self._error = error
        if not self._error:
            try:
                self._keep(self._splitter.flush())
            except BaseException as error:
                self._error = error

    def _keep(self, chunk: NucleiChunk | None) -> None:
        if chunk is not None and len(chunk):
            self.chunks.append(chunk)
