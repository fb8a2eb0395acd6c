"""The tile stream: order, fixed shapes, bounded memory, and clean ends."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from wsi_engine import TileGrid, lay_grid, open_slide, stream_tiles
from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.sampling import Sampling
from wsi_engine.slide import Slide


@pytest.fixture
def slide(tissue_image: np.ndarray) -> Slide:
    return open_slide(tissue_image, mpp=0.5)


@pytest.fixture
def grid(slide: Slide) -> TileGrid:
    return lay_grid(slide, mpp=0.7, tile_px=64, tissue=None)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tiles")]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_pixels_equal_a_plain_loop(slide: Slide, grid: TileGrid, workers: int) -> None:
    rows = 0
    for batch in stream_tiles(slide, grid, batch_size=10, workers=workers):
        assert batch.slide_id == "array"
        for tile, row in zip(batch.pixels, batch.index, strict=True):
            assert row == rows
            x, y = (int(v) for v in grid.origins[row])
            assert np.array_equal(tile, slide.read_region(x, y, 64, 64, mpp=0.7))
            rows += 1
    assert rows == len(grid)
    assert reading_threads() == []


def test_batches_have_one_fixed_shape(slide: Slide, grid: TileGrid) -> None:
    assert len(grid) % 10 != 0
    batches = list(stream_tiles(slide, grid, batch_size=10))
    assert {batch.padded.shape for batch in batches} == {(10, 64, 64, 3)}
    last = batches[-1]
    assert len(last) == len(last.pixels) == len(grid) % 10
    assert (last.padded[len(last) :] == 255).all()


def test_kept_batches_are_never_overwritten(slide: Slide, grid: TileGrid) -> None:
    """Memory is recycled, but only of batches that nobody holds: neither the batch nor a view of it."""
    kept = []
    for number, batch in enumerate(stream_tiles(slide, grid, batch_size=10)):
        if number % 3 == 0:
            kept.append((batch.pixels[2:5], batch.index[2:5]))
    for pixels, index in kept:
        for tile, row in zip(pixels, index, strict=True):
            x, y = (int(v) for v in grid.origins[row])
            assert np.array_equal(tile, slide.read_region(x, y, 64, 64, mpp=0.7))


def test_memory_is_recycled(slide: Slide, grid: TileGrid) -> None:
    addresses = set()
    count = 0
    for batch in stream_tiles(slide, grid, batch_size=4):
        addresses.add(batch.padded.ctypes.data)
        count += 1
        del batch
    assert count > 30
    assert len(addresses) < 16


def test_reads_only_the_rows_asked_for(slide: Slide, grid: TileGrid) -> None:
    rows = np.array([3, 4, 9, *range(20, 31)])
    batches = list(stream_tiles(slide, grid, batch_size=10, rows=rows))
    assert np.array_equal(np.concatenate([batch.index for batch in batches]), rows)
    for batch in batches:
        for tile, row in zip(batch.pixels, batch.index, strict=True):
            x, y = (int(v) for v in grid.origins[row])
            assert np.array_equal(tile, slide.read_region(x, y, 64, 64, mpp=0.7))
    assert list(stream_tiles(slide, grid, batch_size=10, rows=np.array([], int))) == []


def test_reading_pauses_while_nobody_takes(slide: Slide, grid: TileGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    plain = Slide.read_sampled

    def counting(
        self: Slide, sampling: Sampling, x: int, y: int, width: int, height: int, *out: np.ndarray
    ) -> np.ndarray:
        read.append((x, y))
        return plain(self, sampling, x, y, width, height, *out)

    monkeypatch.setattr(Slide, "read_sampled", counting)
    stream = stream_tiles(slide, grid, batch_size=4, workers=2)
    next(stream)
    before = -1
    while len(read) != before:  # until the threads have nothing left to do
        before = len(read)
        time.sleep(0.05)
    assert before <= 4 * 9 < len(grid)
    stream.close()  # type: ignore[attr-defined]
    assert reading_threads() == []


def test_an_error_in_a_reader_reaches_the_caller(slide: Slide, grid: TileGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Slide.read_sampled
    broken = tuple(grid.origins[47])

    def failing(
        self: Slide, sampling: Sampling, x: int, y: int, width: int, height: int, *out: np.ndarray
    ) -> np.ndarray:
        if (x, y) == broken:
            raise SlideError("tile cannot be decoded")
        return plain(self, sampling, x, y, width, height, *out)

    monkeypatch.setattr(Slide, "read_sampled", failing)
    seen = 0
    with pytest.raises(SlideError, match="cannot be decoded"):
        for batch in stream_tiles(slide, grid, batch_size=10, workers=3):
            seen += len(batch)
    assert seen == 40  # the batches before the broken one arrived
    assert reading_threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_threads_end_when_the_consumer_stops(slide: Slide, grid: TileGrid, error: type[BaseException]) -> None:
    stream = stream_tiles(slide, grid, batch_size=4, workers=3)
    with pytest.raises(error):
        try:
            for _ in stream:
                raise error
        finally:
            stream.close()  # type: ignore[attr-defined]
    assert reading_threads() == []


def test_an_empty_grid_streams_nothing(slide: Slide) -> None:
    empty = TileGrid(np.empty((0, 2), np.int64), 64, 64, 0.5, (64.0, 64.0), 10)
    assert list(stream_tiles(slide, empty)) == []


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"workers": 0}, {"rows": np.array([10**6])}, {"rows": np.array([2, 1])}]
)
def test_settings_are_checked_at_once(slide: Slide, grid: TileGrid, options: dict[str, int]) -> None:
    with pytest.raises(SettingsError):
        stream_tiles(slide, grid, **options)  # type: ignore[arg-type]
