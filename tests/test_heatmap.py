"""Heatmaps, tiles for QuPath and contact sheets: ranks, places, averages and colours against plain loops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import percentileofscore

from wsi_engine import detect_tissue, lay_grid, open_slide
from wsi_engine.classification.heatmap import (
    HeatmapText,
    average_tiles,
    colour,
    draw_heatmap,
    rank_percentiles,
    write_tiles_geojson,
)
from wsi_engine.classification.sheet import draw_sheet, pick_ends
from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.grid import TileGrid
from wsi_engine.slide_record import SlideRecord


def make_grid(origins: list[tuple[int, int]], size: float, tile_px: int = 64) -> TileGrid:
    return TileGrid(np.array(origins, np.int64), tile_px, tile_px, 0.5, (size, size), len(origins))


@given(arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([0.0, 0.25, 1e-9, 3.0, -1.0])))
def test_percentiles_are_scipys(values: np.ndarray) -> None:
    expected = [percentileofscore(values, value, kind="mean") / 100 for value in values]
    assert rank_percentiles(values) == pytest.approx(expected, abs=1e-12)


def test_percentiles_of_nothing_and_of_nan() -> None:
    assert len(rank_percentiles([])) == 0
    assert rank_percentiles([7.0]).tolist() == [0.5]
    for bad in ([1.0, np.nan], [[1.0, 2.0]]):
        with pytest.raises(SettingsError, match="finite numbers in one row"):
            rank_percentiles(bad)


@given(st.integers(0, 2**32 - 1), st.sampled_from([3.0, 7.3, 20.0]), st.sampled_from([1.0, 2.7, 11.0]))
def test_overlapping_tiles_are_averaged_as_in_a_plain_loop(seed: int, size: float, per_px: float) -> None:
    rng = np.random.default_rng(seed)
    grid = make_grid([tuple(xy) for xy in rng.integers(0, 60, (12, 2)).tolist()], size)
    values = rng.random(12)
    total, count = np.zeros((50, 70)), np.zeros((50, 70))
    for (x, y), value in zip(grid.origins, values, strict=True):
        left, top = min(round(x / per_px), 69), min(round(y / per_px), 49)
        right = max(left + 1, round((x + np.ceil(size)) / per_px))
        below = max(top + 1, round((y + np.ceil(size)) / per_px))
        total[top:below, left:right] += value
        count[top:below, left:right] += 1
    heat, covered = average_tiles(grid, values, (70, 50), (per_px, per_px))
    assert np.array_equal(covered, count > 0)
    assert np.abs(heat - total / np.maximum(count, 1)).max() < 1e-12


def test_touching_tiles_leave_no_seam() -> None:
    """Origins are rounded to whole pixels one by one, so tiles of 257.4 px touch only up to a pixel."""
    step = 257.4
    grid = make_grid([(round(x * step), round(y * step)) for y in range(9) for x in range(9)], step)
    for per_px in (1.0, 1.3, 1.9, 16.0):
        side = int(9 * step / per_px) - 1
        _, covered = average_tiles(grid, np.ones(81), (side, side), (per_px, per_px))
        assert covered.all()


def test_colours_rise_in_brightness_for_every_eye() -> None:
    shades = colour(np.linspace(0, 1, 101)).astype(float)
    luminance = shades @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > -0.5).all()
    assert luminance[-1] - luminance[0] > 180
    assert colour(np.array(0.0)).tolist() == [68, 1, 84]
    assert colour(np.array([2.0, -1.0])).tolist() == [[253, 231, 37], [68, 1, 84]]


def test_a_heatmap_shows_tiles_where_they_are(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image, mpp=0.5) as slide:
        record = SlideRecord.of(slide, "a")
        tissue = detect_tissue(slide)
        grid = lay_grid(slide, tile_px=100, tissue=None)
        percentiles = np.where(grid.origins[:, 0] < 800, 0.0, 1.0)
        over = draw_heatmap(percentiles, grid, record, slide, long_side=800).astype(float)
        blank = draw_heatmap(percentiles, grid, record, None, tissue, HeatmapText("x" * 500), 800).astype(float)
        only = draw_heatmap(percentiles[:8], make_grid(grid.origins[:8].tolist(), 100.0), record, slide, long_side=800)
        plain = slide.read_overview(1.0).astype(float)
    assert over.shape == blank.shape == (662, 800, 3)
    for picture, ground in ((over, plain), (blank, None)):
        for x, end in ((100, 0.0), (700, 1.0)):
            below = np.full(3, 255.0) if ground is None else ground[20:40, x]
            mixed = below * 0.45 + colour(np.array(end)) * 0.55
            assert np.abs(picture[20:40, x] - mixed).max() <= 1.5
    assert np.abs(blank[300, 300] - (205 * 0.45 + colour(np.array(0.0)) * 0.55)).max() <= 1.5  # tissue in grey
    assert np.array_equal(only[60:500], plain[60:500])  # no tile, no colour


def test_a_narrow_slide_has_room_for_the_words() -> None:
    with open_slide(np.full((1000, 40, 3), 240, np.uint8), mpp=0.5) as slide:
        grid = lay_grid(slide, tile_px=40, tissue=None)
        picture = draw_heatmap(np.full(len(grid), 0.5), grid, SlideRecord.of(slide, "a"), slide, long_side=500)
    assert picture.shape == (562, 520, 3)
    with open_slide(np.full((40, 40, 3), 240, np.uint8), mpp=0.5) as slide:
        record = SlideRecord.of(slide, "a")
        with pytest.raises(SettingsError, match="long side"):
            draw_heatmap(np.zeros(0), make_grid([], 4.0), record, slide, long_side=3)
        with pytest.raises(SettingsError, match="as many percentiles"):
            draw_heatmap(np.zeros(3), grid, record, slide)


def test_geojson_tiles(tmp_path: Path) -> None:
    grid = make_grid([(0, 0), (103, 0), (0, 103), (500, 103)], 102.6)
    attention = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    write_tiles_geojson(tmp_path / "a.geojson", grid, attention, rank_percentiles(attention), 'tumour "x"')
    text = (tmp_path / "a.geojson").read_text()
    features = json.loads(text)["features"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.geojson"]
    assert [feature["geometry"]["coordinates"][0][0] for feature in features] == grid.origins.tolist()
    assert features[1]["geometry"]["coordinates"] == [[[103, 0], [206, 0], [206, 103], [103, 103], [103, 0]]]
    assert len({feature["id"] for feature in features}) == 4
    names = [feature["properties"]["classification"]["name"] for feature in features]
    assert names == [f"attention: {name} quarter" for name in ("lowest", "lower", "upper", "highest")]
    for feature, weight, rank in zip(features, attention, (12.5, 37.5, 62.5, 87.5), strict=True):
        properties = feature["properties"]
        assert (feature["type"], properties["objectType"], properties["name"]) == ("Feature", "detection", 'tumour "x"')
        assert all(isinstance(v, int) and 0 <= v <= 255 for v in properties["classification"]["color"])
        assert properties["measurements"] == {"attention": float(weight), "attention percentile": rank}
    write_tiles_geojson(tmp_path / "a.geojson", grid, attention, rank_percentiles(attention), 'tumour "x"')
    assert (tmp_path / "a.geojson").read_text() == text
    with pytest.raises(SlideError, match="cannot write the tiles"):
        write_tiles_geojson(tmp_path / "nowhere" / "a.geojson", grid, attention, attention.astype(float), "x")


def test_geojson_of_no_tile_is_valid(tmp_path: Path) -> None:
    grid = TileGrid(np.zeros((0, 2), np.int64), 64, 64, 0.5, (64.0, 64.0), 0)
    write_tiles_geojson(tmp_path / "a.geojson", grid, np.zeros(0, np.float32), np.zeros(0), "x")
    assert json.loads((tmp_path / "a.geojson").read_text()) == {"type": "FeatureCollection", "features": []}


def test_the_ends_of_a_slide() -> None:
    most, least = pick_ends(np.array([0.2, 0.9, 0.5, 0.9, 0.1]), 2)
    assert (most.tolist(), least.tolist()) == ([1, 3], [4, 0])
    most, least = pick_ends(np.array([0.2, 0.9, 0.5]), 8)
    assert (most.tolist(), least.tolist()) == ([1, 2], [0])
    most, least = pick_ends(np.array([0.5]), 8)
    assert (most.tolist(), least.tolist()) == ([0], [])


def test_a_sheet_shows_the_right_tiles(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image, mpp=0.5) as slide:
        grid = lay_grid(slide, tile_px=128, tissue=None)
        percentiles = rank_percentiles(np.random.default_rng(0).random(len(grid)))
        picture = draw_sheet(slide, grid, percentiles, 3, "a slide")
        most, least = pick_ends(percentiles, 3)
        for row, tiles in enumerate((most, least)):
            for place, tile in enumerate(tiles):
                x, y = 10 + place * (136 + 10), row * (34 + 136 + 24 + 10) + 34
                left, top = grid.origins[tile]
                expected = slide.read_region(int(left), int(top), 128, 128, mpp=0.5)
                assert np.array_equal(picture[y + 4 : y + 132, x + 4 : x + 132], expected)
                assert np.array_equal(picture[y + 1, x + 1], colour(percentiles[tile]))
        assert len(draw_sheet(slide, make_grid([(0, 0)], 128.0), np.array([0.5]))) == 34 + 128 + 8 + 24 + 10
        assert draw_sheet(slide, make_grid([(0, 0)], 512.0, 512), np.array([0.5])).shape == (34 + 264 + 34, 520, 3)
        for top, count in ((0, len(grid)), (3, 2)):
            with pytest.raises(SettingsError):
                draw_sheet(slide, grid, np.zeros(count), top)


def test_small_tiles_are_enlarged(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image, mpp=0.5) as slide:
        grid = lay_grid(slide, tile_px=48, tissue=None)
        picture = draw_sheet(slide, grid, np.linspace(0, 1, len(grid)), 2)
        x, y = grid.origins[-1].tolist()
        tile = slide.read_region(x, y, 48, 48, mpp=0.5)
    assert np.array_equal(picture[38 : 38 + 144, 14 : 14 + 144], tile.repeat(3, axis=0).repeat(3, axis=1))
