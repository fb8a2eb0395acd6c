"""Batches that never wait: threads read the tiles of many slides, one slide after another, into batches of one shape.

A batch goes on into the next slide where one ends, so that no encoder sees a gap between slides. Buffers are recycled,
memory is bounded, and an error in one slide is told with the rows it concerns and stops no other slide.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_engine.grid import TileGrid
from wsi_engine.readers.base import BACKGROUND
from wsi_engine.slide import Slide

_TILES_PER_TASK = 16
"""Tiles that one thread reads before it asks for more: enough to make the asking cheap, few enough to share evenly."""

_READ_AHEAD_BYTES = 128 * 2**20
"""Bound on the pixels that wait for the consumer."""

Allocate = Callable[[int], bytearray | memoryview]
"""Gives so many bytes of memory for pixels, such as page-locked memory for a device."""


class TileSource:
    """The rows of one slide's grid that are to be read, ascending; ``exact`` as in :meth:`Slide.sampling`."""

    def __init__(self, slide: Slide, grid: TileGrid, rows: NDArray[np.int64], exact: bool = False) -> None:
        self.slide = slide
        self.grid = grid
        self.rows = rows
        self._sampling = slide.sampling(grid.mpp, exact)
        self._stop_row = sys.maxsize
        self.error: BaseException | None = None
        """The first error in a reader, of the row it stopped at; later rows are not read."""

    def stop(self) -> None:
        """Read no more rows."""
        self._stop_row = -1

    @property
    def stopped(self) -> bool:
        """Whether rows are left out, because of :meth:`stop` or an error."""
        return self._stop_row < sys.maxsize

    def expect(self) -> AbstractContextManager[None]:
        """Announce the rows to the reader."""
        side = self.grid.tile_px
        return self.slide.expect(self._sampling, self.grid.origins[self.rows], side, side)

    def read_into(self, out: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        """Read the tiles of some rows into the first places of ``out``."""
        side = self.grid.tile_px
        corners = self.grid.origins[rows].tolist()
        for place, (row, (x, y)) in enumerate(zip(rows.tolist(), corners, strict=True)):
            if row >= self._stop_row:
                return
            try:
                self.slide.read_sampled(self._sampling, x, y, side, side, out[place])
            except BaseException as error:
                if row < self._stop_row:
                    self._stop_row, self.error = row, error
                return

    def error_at(self, rows: NDArray[np.int64]) -> BaseException | None:
        """The error, if it hit one of these rows or one before them."""
        return self.error if len(rows) and rows[-1] >= self._stop_row else None


@dataclass(frozen=True)
class BatchPart:
    """The part of a batch that comes from one slide: ``rows`` of its grid, at ``place`` in the batch."""

    source: TileSource
    rows: NDArray[np.int64]
    place: slice
    error: BaseException | None = None


@dataclass(frozen=True)
class MixedBatch:
    """Tiles of one slide or several.

    ``pixels`` is uint8 (batch_size, H, W, 3) in every batch; what no part covers is white. ``ended`` are the sources
    of which nothing more will come and nothing is being read any more. Memory is recycled once nothing refers to it.
    """

    pixels: NDArray[np.uint8]
    parts: tuple[BatchPart, ...]
    ended: tuple[TileSource, ...] = ()

    @property
    def tiles(self) -> int:
        """Tiles in the batch that could be read."""
        return sum(len(part.rows) for part in self.parts if part.error is None)


class Sources(Protocol):
    """Hands out sources in order."""

    def ready(self) -> bool:
        """Whether :meth:`next` would return at once."""

    def next(self) -> TileSource | None:
        """The next source, after waiting for it where it must be, or None when there are no more."""


class ListedSources:
    """Sources that are all there."""

    def __init__(self, sources: list[TileSource]) -> None:
        self._left = deque(sources)

    def ready(self) -> bool:
        """Always."""
        return True

    def next(self) -> TileSource | None:
        """The next source, or None."""
        return self._left.popleft() if self._left else None


@dataclass
class _Reading:
    """A source while some of its rows are being read."""

    source: TileSource
    announced: AbstractContextManager[None]
    next_row: int = 0
    pending: int = 0

    @property
    def exhausted(self) -> bool:
        return self.source.stopped or self.next_row == len(self.source.rows)


@dataclass
class _Filling:
    """A batch while it is being filled and read."""

    buffer: NDArray[np.uint8]
    parts: list[tuple[_Reading, NDArray[np.int64], slice]] = field(default_factory=list)
    tasks: list[Future[None]] = field(default_factory=list)
    used: int = 0


class TileFeed:
    """Iterates over the batches of many slides; reading runs ahead of the consumer by a bounded number of batches."""

    def __init__(
        self, sources: Sources, pool: Executor, batch_size: int, tile_px: int, allocate: Allocate = bytearray
    ) -> None:
        self._sources = sources
        self._pool = pool
        self._shape = (batch_size, tile_px, tile_px, 3)
        size = int(np.prod(self._shape))
        self._buffers = _Buffers(self._shape, allocate)
        self._ahead = max(2, min(4, _READ_AHEAD_BYTES // size))
        self._waiting: deque[_Filling] = deque()
        self._open: _Filling | None = None
        self._current: _Reading | None = None
        self._readings: list[_Reading] = []
        self._supply_ended = False

    def __iter__(self) -> Iterator[MixedBatch]:
        try:
            while True:
                self._read_ahead()
                if self._waiting:
                    yield self._finish(self._waiting.popleft())
                    continue
                if self._supply_ended:
                    ended = self._ended()
                    if ended:
                        yield MixedBatch(np.empty((0, *self._shape[1:]), np.uint8), (), ended)
                    return
        finally:
            self.close()

    def close(self) -> None:
        """Stop reading; returns when no thread reads for this feed any more."""
        for reading in self._readings:
            reading.source.stop()
        for filling in (*self._waiting, *([self._open] if self._open else [])):
            for task in filling.tasks:
                task.cancel()
            for task in filling.tasks:
                if not task.cancelled():
                    task.exception()
        self._waiting.clear()
        self._open = None
        for reading in self._readings:
            reading.announced.__exit__(None, None, None)
        self._readings.clear()

    def _read_ahead(self) -> None:
        """Give the threads as much to read as may wait; wait for a source only when nothing else can be handed out."""
        while len(self._waiting) < self._ahead:
            if self._current is None or self._current.exhausted:
                self._current = None
                if not self._supply_ended and (self._sources.ready() or not self._waiting):
                    self._take_source()
                if self._current is None:
                    break
            self._fill_from(self._current)
        if self._supply_ended and self._current is None and self._open is not None:
            self._close_batch()

    def _take_source(self) -> None:
        source = self._sources.next()
        if source is None:
            self._supply_ended = True
            return
        self._current = _Reading(source, source.expect())
        self._current.announced.__enter__()
        self._readings.append(self._current)

    def _fill_from(self, reading: _Reading) -> None:
        """Put the next rows of a source into the open batch."""
        if self._open is None:
            self._open = _Filling(self._buffers.take())
        batch, source = self._open, reading.source
        count = min(len(batch.buffer) - batch.used, len(source.rows) - reading.next_row)
        rows = source.rows[reading.next_row : reading.next_row + count]
        for start in range(0, count, _TILES_PER_TASK):
            out = batch.buffer[batch.used + start : batch.used + count]
            task = self._pool.submit(source.read_into, out, rows[start : start + _TILES_PER_TASK])
            batch.tasks.append(task)
        if count:
            batch.parts.append((reading, rows, slice(batch.used, batch.used + count)))
            reading.pending += 1
        reading.next_row += count
        batch.used += count
        if batch.used == len(batch.buffer):
            self._close_batch()

    def _close_batch(self) -> None:
        assert self._open is not None
        self._open.buffer[self._open.used :] = BACKGROUND
        self._waiting.append(self._open)
        self._open = None

    def _finish(self, batch: _Filling) -> MixedBatch:
        """Wait until all tiles of a batch are there."""
        wait(batch.tasks)  # once for all: each wake-up takes the interpreter from the readers
        for task in batch.tasks:
            task.result()
        parts = []
        for reading, rows, place in batch.parts:
            parts.append(BatchPart(reading.source, rows, place, reading.source.error_at(rows)))
            reading.pending -= 1
        return MixedBatch(batch.buffer, tuple(parts), self._ended())

    def _ended(self) -> tuple[TileSource, ...]:
        """Sources that are through, each told once."""
        through = [reading for reading in self._readings if reading.exhausted and not reading.pending]
        for reading in through:
            reading.announced.__exit__(None, None, None)
            self._readings.remove(reading)
        return tuple(reading.source for reading in through)


class _Buffers:
    """Batch buffers that come back by themselves once nothing refers to them.

    A consumer may keep a batch, or only a view of its pixels, as long as it likes: the buffer returns when the
    last array over it dies, never before.
    """

    _SPARE = 4

    def __init__(self, shape: tuple[int, ...], allocate: Allocate) -> None:
        self._shape = shape
        self._allocate = allocate
        self._spare: list[bytearray | memoryview] = []
        self._size = int(np.prod(shape))

    def take(self) -> NDArray[np.uint8]:
        """A buffer of the shape, its content undefined."""
        memory = self._spare.pop() if self._spare else self._allocate(self._size)
        flat = np.frombuffer(memory, np.uint8)
        weakref.finalize(flat, self._give_back, memory).atexit = False
        return flat.reshape(self._shape)

    def _give_back(self, memory: bytearray | memoryview) -> None:
        if len(self._spare) < self._SPARE:
            self._spare.append(memory)
