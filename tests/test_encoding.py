"""Batches that run on from slide to slide: whose tiles are told, and what is kept when the encoder fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support_faults import MeanEncoder

from wsi_engine.encoding import extract_sources
from wsi_engine.errors import EncoderError
from wsi_engine.grid import GridSettings
from wsi_engine.inputs import SlideSource, find_slides
from wsi_engine.jobs import ExtractSettings, SlideResult
from wsi_engine.store import FeatureStore

BATCH = 48
SETTINGS = ExtractSettings(GridSettings(tile_px=64), batch_size=BATCH)


class Submitting(MeanEncoder):
    """Works behind, as a device does; ``fails`` is the number of the batch that it refuses."""

    def __init__(self, fails: int = -1) -> None:
        super().__init__()
        self.fails, self.batches = fails, 0

    def submit(self, pixels: np.ndarray) -> Callable[[], np.ndarray]:
        self.batches += 1
        if self.batches == self.fails:
            raise EncoderError("out of memory")
        copy = pixels.copy()
        return lambda: self.encode(copy)

    def allocate(self, size: int) -> bytearray:
        return bytearray(size)


class Listener:
    """Tiles as they are told, by slide."""

    def __init__(self) -> None:
        self.tiles: dict[str, int] = {}
        self.expected: dict[str, int] = {}
        self.last = ""

    def run_started(self, slides: int) -> None: ...

    def slide_started(self, slide_id: str, tiles: int, done: int) -> None:
        assert slide_id not in self.tiles
        self.last, self.tiles[slide_id], self.expected[slide_id] = slide_id, done, tiles

    def tiles_done(self, tiles: int) -> None:
        self.tiles[self.last] += tiles

    def slide_finished(self, result: SlideResult) -> None: ...


@pytest.fixture
def sources(picture: Path, tmp_path: Path) -> list[SlideSource]:
    folder = tmp_path / "copies"
    folder.mkdir()
    for name in "abc":
        shutil.copy(picture, folder / f"{name}{picture.suffix}")
    return find_slides([folder], 0.5)


@pytest.mark.parametrize("encoder", [MeanEncoder, Submitting])
def test_tiles_are_told_of_their_own_slide(
    sources: list[SlideSource], tmp_path: Path, encoder: type[MeanEncoder]
) -> None:
    listener = Listener()
    report = extract_sources(sources, tmp_path, encoder(), SETTINGS, listener)
    assert report.results[0].tiles % BATCH  # batches hold tiles of two slides
    assert listener.tiles == listener.expected == {one.slide_id: one.tiles for one in report.results}


def test_a_batch_that_is_refused_takes_no_other_with_it(sources: list[SlideSource], tmp_path: Path) -> None:
    """The last batch ends the last slide, and the one before, which is with the encoder then, holds tiles of it."""
    tiles = extract_sources(sources, tmp_path, whole := Submitting(), SETTINGS).tiles
    assert whole.batches == -(-tiles // BATCH)
    for name in "abc":
        shutil.rmtree(tmp_path / f"{name}.zarr")
    report = extract_sources(sources, tmp_path, Submitting(fails=whole.batches), SETTINGS)
    assert [one.status for one in report.results] == ["done", "done", "failed"]
    assert report.results[2].message == "out of memory"
    again = MeanEncoder()
    shapes: list[int] = []
    plain = again.encode
    again.encode = lambda pixels: (shapes.append(len(pixels)), plain(pixels))[1]  # type: ignore[method-assign]
    assert not extract_sources(sources, tmp_path, again, SETTINGS).failed
    assert sum(shapes) < report.results[0].tiles  # what had been computed of the slide was kept
    assert len({FeatureStore.open(one.store).features().tobytes() for one in report.results[:2]}) == 1
