"""Tiles as a stream: threads read ahead into batches of one fixed shape, in the order of the grid."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SettingsError
from wsi_engine.grid import TileGrid
from wsi_engine.readers.base import BACKGROUND
from wsi_engine.sampling import Sampling
from wsi_engine.slide import Slide
from wsi_engine.workers import usable_cores

_TILES_PER_TASK = 4
"""Tiles that one thread reads before it asks for more: enough to make the asking cheap, few enough to share evenly."""

_READ_AHEAD_BYTES = 256 * 2**20
"""Bound on the pixels that wait for the consumer."""


@dataclass(frozen=True)
class TileBatch:
    """Some consecutive tiles of a grid.

    ``pixels`` is uint8 (n, H, W, 3), ``index`` int64 (n,) the rows of the grid. All batches have n =
    ``batch_size`` but the last, whose buffer goes on in white: ``padded`` (batch_size, H, W, 3) is that whole
    buffer, for an encoder that wants one fixed shape. Memory is recycled once nothing refers to it any more.
    """

    pixels: NDArray[np.uint8]
    index: NDArray[np.int64]
    slide_id: str
    padded: NDArray[np.uint8] = field(repr=False)

    def __len__(self) -> int:
        return len(self.index)


def stream_tiles(
    slide: Slide,
    grid: TileGrid,
    batch_size: int = 64,
    workers: int | None = None,
    batches: NDArray[np.int64] | None = None,
) -> Iterator[TileBatch]:
    """Read the tiles of a grid in its order, a few batches ahead of the consumer.

    The pixels do not depend on the number of threads. Memory is bounded: reading pauses while enough batches
    wait. Leaving the loop early, Ctrl-C and an error in a reader all stop the threads before control returns;
    the error of a reader reaches the caller at the batch it belongs to.

    Args:
        slide: an open slide.
        grid: its grid.
        batch_size: tiles in a batch, ≥ 1.
        workers: reading threads; None for the number of usable cores.
        batches: numbers of the batches to read, ascending (batch b holds rows b·batch_size …); None for all.

    Raises:
        SlideError: a tile cannot be read.
        SettingsError: a number is out of range.
    """
    if batch_size < 1:
        raise SettingsError(f"the batch size must be at least 1, not {batch_size}")
    if workers is not None and workers < 1:
        raise SettingsError(f"the number of reading threads must be at least 1, not {workers}")
    count = -(-len(grid) // batch_size)
    wanted = np.arange(count) if batches is None else np.asarray(batches, np.int64)
    if len(wanted) and not (wanted.min() >= 0 and wanted.max() < count):
        raise SettingsError(f"batches must be within 0–{count - 1}, not {wanted.min()}–{wanted.max()}")
    return _stream(slide, grid, batch_size, workers or usable_cores(), wanted)


def _stream(
    slide: Slide, grid: TileGrid, batch_size: int, workers: int, wanted: NDArray[np.int64]
) -> Iterator[TileBatch]:
    if len(wanted) == 0:
        return
    side = grid.tile_px
    source = _TileSource(slide, grid, slide.sampling(grid.mpp))
    buffers = _Buffers((batch_size, side, side, 3))
    ahead = max(2, min(8, _READ_AHEAD_BYTES // (batch_size * side * side * 3)))
    rows = [np.arange(b * batch_size, min((b + 1) * batch_size, len(grid))) for b in wanted]
    upcoming = iter(rows)
    waiting: deque[_Pending] = deque()
    pool = ThreadPoolExecutor(workers, "tiles")
    try:
        with slide.expect(source.sampling, grid.origins[np.concatenate(rows)], side, side):
            while True:
                while len(waiting) < ahead and (index := next(upcoming, None)) is not None:
                    waiting.append(_Pending(pool, source, index, buffers.take()))
                if not waiting:
                    return
                yield waiting.popleft().result()
    finally:
        source.stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _TileSource:
    """Where the reading threads take tiles from until they are told to stop."""

    slide: Slide
    grid: TileGrid
    sampling: Sampling
    stopped: threading.Event = field(default_factory=threading.Event)

    def read_into(self, out: NDArray[np.uint8], index: NDArray[np.int64]) -> None:
        """Read the tiles of some rows of the grid into the first places of ``out``."""
        side = self.grid.tile_px
        for place, row in enumerate(index):
            if self.stopped.is_set():
                return
            x, y = (int(v) for v in self.grid.origins[row])
            out[place] = self.slide.read_sampled(self.sampling, x, y, side, side)


class _Pending:
    """A batch that is being read."""

    def __init__(
        self, pool: ThreadPoolExecutor, source: _TileSource, index: NDArray[np.int64], buffer: NDArray[np.uint8]
    ) -> None:
        self._slide_id = source.slide.name
        self._index = index
        self._buffer = buffer
        buffer[len(index) :] = BACKGROUND
        self._tasks: list[Future[None]] = [
            pool.submit(source.read_into, buffer[start:], index[start : start + _TILES_PER_TASK])
            for start in range(0, len(index), _TILES_PER_TASK)
        ]

    def result(self) -> TileBatch:
        """Wait until all tiles are there; raises the error of the first that failed."""
        for task in self._tasks:
            task.result()
        return TileBatch(self._buffer[: len(self._index)], self._index, self._slide_id, self._buffer)


class _Buffers:
    """Batch buffers that come back by themselves once nothing refers to them.

    A consumer may keep a batch, or only a view of its pixels, as long as it likes: the buffer returns when the
    last array over it dies, never before.
    """

    _SPARE = 4

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._spare: list[bytearray] = []
        self._size = int(np.prod(shape))

    def take(self) -> NDArray[np.uint8]:
        """A buffer of the shape, its content undefined."""
        memory = self._spare.pop() if self._spare else bytearray(self._size)
        flat = np.frombuffer(memory, np.uint8)
        weakref.finalize(flat, self._give_back, memory).atexit = False
        return flat.reshape(self._shape)

    def _give_back(self, memory: bytearray) -> None:
        if len(self._spare) < self._SPARE:
            self._spare.append(memory)
