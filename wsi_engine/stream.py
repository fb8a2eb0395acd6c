"""Tiles of one slide as a stream: threads read ahead into batches of one fixed shape, in the order of the grid."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SettingsError
from wsi_engine.feed import ListedSources, TileFeed, TileSource
from wsi_engine.grid import TileGrid
from wsi_engine.slide import Slide
from wsi_engine.workers import usable_cores


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
    rows: NDArray[np.int64] | None = None,
    exact: bool = False,
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
        rows: rows of the grid to read, ascending; None for all.
        exact: resample by the area filter alone. By default a reader may shrink the slide while it decodes (libjpeg's
            scaled cosine transform), which is faster where the scale asked for is half of a level's or less.

    Raises:
        SlideError: a tile cannot be read.
        SettingsError: a number is out of range.
    """
    if batch_size < 1:
        raise SettingsError(f"the batch size must be at least 1, not {batch_size}")
    if workers is not None and workers < 1:
        raise SettingsError(f"the number of reading threads must be at least 1, not {workers}")
    wanted = np.arange(len(grid)) if rows is None else np.asarray(rows, np.int64)
    if len(wanted) and not (wanted[0] >= 0 and wanted[-1] < len(grid) and (np.diff(wanted) > 0).all()):
        raise SettingsError(f"rows of the grid must ascend within 0–{len(grid) - 1}")
    return _stream(slide, grid, batch_size, workers or usable_cores(), wanted, exact)


def _stream(
    slide: Slide, grid: TileGrid, batch_size: int, workers: int, rows: NDArray[np.int64], exact: bool
) -> Iterator[TileBatch]:
    if len(rows) == 0:
        return
    with ThreadPoolExecutor(workers, "tiles") as pool:
        feed = iter(TileFeed(ListedSources([TileSource(slide, grid, rows, exact)]), pool, batch_size, grid.tile_px))
        try:
            for batch in feed:
                for part in batch.parts:
                    if part.error:
                        raise part.error
                    yield TileBatch(batch.pixels[part.place], part.rows, slide.name, batch.pixels)
                del batch, part  # or the buffer would be held while the next is waited for
        finally:
            feed.close()  # type: ignore[attr-defined]
