"""Batches of many slides: they cross from slide to slide, never mix up rows, and outlive a broken slide."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from wsi_engine import Slide, lay_grid, open_slide
from wsi_engine.errors import SlideError
from wsi_engine.feed import ListedSources, MixedBatch, TileFeed, TileSource

SIDE = 32


def make_slide(number: int, columns: int) -> Slide:
    """A slide of one row of tiles; tile k of slide n is all (n, k, 0)."""
    image = np.zeros((SIDE, SIDE * columns, 3), np.uint8)
    image[..., 0] = number
    image[..., 1] = np.arange(SIDE * columns) // SIDE
    return open_slide(image, mpp=0.5)


def make_sources(*columns: int) -> list[TileSource]:
    sources = []
    for number, count in enumerate(columns):
        slide = make_slide(number, max(1, count))
        grid = lay_grid(slide, mpp=0.5, tile_px=SIDE, tissue=None)
        sources.append(TileSource(slide, grid, np.arange(count)))
    return sources


def run(sources: list[TileSource], batch_size: int = 8, workers: int = 3) -> list[MixedBatch]:
    with ThreadPoolExecutor(workers) as pool:
        return list(TileFeed(ListedSources(sources), pool, batch_size, SIDE))


@pytest.mark.parametrize("workers", [1, 4])
def test_batches_run_on_from_slide_to_slide(workers: int) -> None:
    sources = make_sources(5, 1, 20, 3)
    batches = run(sources, workers=workers)
    assert [sum(len(part.rows) for part in batch.parts) for batch in batches] == [8, 8, 8, 5]
    assert {batch.pixels.shape for batch in batches} == {(8, SIDE, SIDE, 3)}
    seen = []
    for batch in batches:
        for part in batch.parts:
            number = sources.index(part.source)
            for row, tile in zip(part.rows, batch.pixels[part.place], strict=True):
                assert (tile == (number, row, 0)).all()
                seen.append((number, row))
    assert seen == [(n, k) for n, count in enumerate((5, 1, 20, 3)) for k in range(count)]
    assert (batches[-1].pixels[5:] == 255).all()


def test_each_slide_ends_once_with_its_last_batch() -> None:
    sources = make_sources(5, 1, 20, 3)
    ended = [[sources.index(source) for source in batch.ended] for batch in run(sources)]
    assert ended == [[0, 1], [], [], [2, 3]]


def test_rows_left_out_stay_out() -> None:
    (source,) = make_sources(30)
    source.rows = np.array([2, 3, 17, 29])
    (batch,) = run([source])
    assert batch.pixels[:4, 0, 0, 1].tolist() == [2, 3, 17, 29]


def test_a_broken_slide_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = make_sources(6, 400, 6)
    plain = sources[1].slide.read_sampled

    def failing(sampling: object, x: int, y: int, width: int, height: int, *out: np.ndarray) -> np.ndarray:
        if x == SIDE * 12:
            raise SlideError("tile 12 is torn")
        return plain(sampling, x, y, width, height, *out)  # type: ignore[arg-type]

    monkeypatch.setattr(sources[1].slide, "read_sampled", failing)
    batches = run(sources)
    good = {0: 0, 1: 0, 2: 0}
    failed = []
    for batch in batches:
        for part in batch.parts:
            if part.error:
                failed.append(str(part.error))
                continue
            good[sources.index(part.source)] += len(part.rows)
    assert (good[0], good[2]) == (6, 6)
    assert good[1] <= 12
    assert set(failed) == {"tile 12 is torn"}
    assert sorted(sources.index(source) for batch in batches for source in batch.ended) == [0, 1, 2]
    assert sum(len(part.rows) for batch in batches for part in batch.parts) < 6 + 400 + 6, "the rest is not waited for"


def test_a_stopped_slide_is_left_out() -> None:
    sources = make_sources(400, 6)
    with ThreadPoolExecutor(2) as pool:
        feed = iter(TileFeed(ListedSources(sources), pool, 8, SIDE))
        next(feed)
        sources[0].stop()
        rest = list(feed)
    assert len(rest) < 15
    assert sum(len(part.rows) for batch in rest for part in batch.parts if part.source is sources[1]) == 6
    assert {source for batch in rest for source in batch.ended} == set(sources)


def test_sources_without_rows_end_too() -> None:
    sources = make_sources(0, 3, 0)
    batches = run(sources)
    assert [len(part.rows) for batch in batches for part in batch.parts] == [3]
    assert {source for batch in batches for source in batch.ended} == set(sources)
    assert run([]) == []


class _SlowSources(ListedSources):
    """The second source is not ready until it is released."""

    def __init__(self, sources: list[TileSource]) -> None:
        super().__init__(sources)
        self.release = threading.Event()
        self.taken = 0

    def ready(self) -> bool:
        return self.taken == 0 or self.release.is_set()

    def next(self) -> TileSource | None:
        if self.taken:
            self.release.wait(20)
        self.taken += 1
        return super().next()


def test_batches_that_are_there_do_not_wait_for_the_next_slide() -> None:
    slow = _SlowSources(make_sources(20, 4))
    with ThreadPoolExecutor(2) as pool:
        feed = iter(TileFeed(slow, pool, 8, SIDE))
        assert [len(next(feed).parts) for _ in range(2)] == [1, 1]  # 16 of the 20 tiles, without the second slide
        slow.release.set()
        assert [len(part.rows) for part in next(feed).parts] == [4, 4]


def test_announcements_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[str] = []

    @contextmanager
    def expecting(self: TileSource) -> Iterator[None]:
        announced.append("begin")
        yield
        announced.append("end")

    monkeypatch.setattr(TileSource, "expect", expecting)
    run(make_sources(5, 9))
    assert sorted(announced) == ["begin", "begin", "end", "end"]
    announced.clear()
    with ThreadPoolExecutor(2) as pool:
        feed = iter(TileFeed(ListedSources(make_sources(500, 9)), pool, 8, SIDE))
        next(feed)
        feed.close()  # type: ignore[attr-defined]
    assert announced == ["begin", "end"]


def test_memory_comes_from_the_allocator() -> None:
    sizes = []

    def allocate(size: int) -> bytearray:
        sizes.append(size)
        return bytearray(size)

    with ThreadPoolExecutor(2) as pool:
        for batch in TileFeed(ListedSources(make_sources(200)), pool, 8, SIDE, allocate):
            del batch
    assert set(sizes) == {8 * SIDE * SIDE * 3}
    assert len(sizes) < 25
