"""Grids: exact geometry, tissue by exact area, order and digest."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_engine import TileGrid, TissueMask, TissueSettings, lay_grid, open_slide
from wsi_engine.errors import ScaleError, SettingsError
from wsi_engine.slide import Slide


def blank(width: int, height: int, mpp: float) -> Slide:
    return open_slide(np.full((height, width, 3), 255, np.uint8), mpp=mpp)


def test_tiles_cover_everything_and_no_more() -> None:
    with blank(1000, 700, 0.25) as slide:
        grid = lay_grid(slide, mpp=0.5, tile_px=128, tissue=None)
    assert grid.tile_size_level0 == (256.0, 256.0)
    assert grid.origins.dtype == np.int64
    assert grid.origins.tolist() == [[x, y] for y in (0, 256, 512) for x in (0, 256, 512, 768)]
    assert grid.lattice_tiles == len(grid) == 12


def test_a_whole_number_of_tiles_has_no_rest() -> None:
    with blank(1024, 512, 0.5) as slide:
        assert len(lay_grid(slide, mpp=0.5, tile_px=256, tissue=None)) == 8


def test_a_slide_smaller_than_a_tile_has_one() -> None:
    with blank(100, 50, 0.5) as slide:
        assert lay_grid(slide, mpp=0.5, tile_px=256, tissue=None).origins.tolist() == [[0, 0]]


def test_stride_overlaps() -> None:
    with blank(1024, 512, 0.5) as slide:
        grid = lay_grid(slide, mpp=0.5, tile_px=256, stride_px=128, tissue=None)
    assert sorted({x for x, _ in grid.origins.tolist()}) == [0, 128, 256, 384, 512, 640, 768]
    assert grid.stride_px == 128


def test_fractional_sizes_do_not_drift() -> None:
    """Origins are rounded one by one from exact positions: the hundredth tile is as exact as the first."""
    with blank(60_000, 300, 0.325) as slide:
        xs = lay_grid(slide, mpp=0.5, tile_px=256, tissue=None).origins[:, 0]
    exact = np.arange(len(xs)) * 256 * 0.5 / 0.325
    assert np.abs(xs - exact).max() <= 0.5


@pytest.mark.parametrize("seed", range(3))
def test_tissue_fraction_equals_a_plain_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = TissueMask(rng.random((40, 50)) < 0.4, mpp=8.0)
    scale = 0.25 / 8.0  # mask pixels per level-0 pixel
    fine = np.kron(mask.mask, np.ones((32, 32)))  # every level-0 pixel
    with blank(1600, 1280, 0.25) as slide:
        lattice = lay_grid(slide, mpp=0.3, tile_px=100, stride_px=70, tissue=None)
        kept = lay_grid(slide, mpp=0.3, tile_px=100, stride_px=70, tissue=mask, min_tissue=0.4)
    assert scale * 32 == 1.0
    side = 120
    expected = [[x, y] for x, y in lattice.origins.tolist() if fine[y : y + side, x : x + side].sum() / side**2 >= 0.4]
    assert 0 < len(expected) < len(lattice)
    assert kept.origins.tolist() == expected
    assert kept.lattice_tiles == len(lattice)


def test_zero_fraction_keeps_any_touch_of_tissue() -> None:
    mask = np.zeros((40, 50), bool)
    mask[20, 25] = True
    with blank(1600, 1280, 0.25) as slide:
        grid = lay_grid(slide, mpp=0.25, tile_px=256, tissue=TissueMask(mask, 8.0), min_tissue=0.0)
    assert grid.origins.tolist() == [[768, 512]]


def test_outside_the_slide_is_no_tissue() -> None:
    mask = TissueMask(np.ones((40, 50), bool), 8.0)
    with blank(1600, 1280, 0.25) as slide:
        grid = lay_grid(slide, mpp=0.25, tile_px=500, tissue=mask, min_tissue=0.5)
    assert [1500, 0] not in grid.origins.tolist()  # only a fifth of that tile lies on the slide
    assert [1000, 500] in grid.origins.tolist()


def test_default_detects_tissue(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image, mpp=0.5) as slide:
        grid = lay_grid(slide, mpp=0.5, tile_px=64)
        by_settings = lay_grid(slide, mpp=0.5, tile_px=64, tissue=TissueSettings())
    centres = grid.origins + 32
    inside = np.hypot(centres[:, 0] - 700, centres[:, 1] - 600) < 450 + 45
    assert inside.all()
    assert len(grid) * 64**2 == pytest.approx(np.pi * 450**2, rel=0.15)
    assert by_settings.digest == grid.digest


def test_order_is_row_by_row(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image, mpp=0.5) as slide:
        origins = lay_grid(slide, mpp=0.5, tile_px=64).origins
    assert np.array_equal(origins, origins[np.lexsort((origins[:, 0], origins[:, 1]))])


def test_digest_tells_grids_apart_and_survives_json() -> None:
    with blank(1000, 700, 0.25) as slide:
        grids = [
            lay_grid(slide, mpp=0.5, tile_px=128, tissue=None),
            lay_grid(slide, mpp=0.5, tile_px=64, tissue=None),
            lay_grid(slide, mpp=0.25, tile_px=128, tissue=None),
            lay_grid(slide, mpp=0.5, tile_px=128, stride_px=64, tissue=None),
        ]
        again = lay_grid(slide, mpp=0.5, tile_px=128, tissue=None)
    assert len({grid.digest for grid in grids}) == 4
    assert again.digest == grids[0].digest
    assert TileGrid.from_json(grids[0].to_json(), grids[0].origins).digest == grids[0].digest


def test_too_coarse_a_slide_is_refused() -> None:
    with blank(400, 300, 1.01) as slide, pytest.raises(ScaleError, match="--mpp"):
        lay_grid(slide, mpp=0.5, tile_px=64, tissue=None)
    with blank(400, 300, 1.0) as slide:
        assert len(lay_grid(slide, mpp=0.5, tile_px=64, tissue=None)) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"mpp": 0},
        {"mpp": float("nan")},
        {"tile_px": 0},
        {"tile_px": 10**6},
        {"stride_px": 0},
        {"min_tissue": 1.5},
        {"tissue": "trees"},
    ],
)
def test_settings_are_checked(options: dict[str, object]) -> None:
    with blank(400, 300, 0.5) as slide, pytest.raises(SettingsError):
        lay_grid(slide, **options)  # type: ignore[arg-type]
