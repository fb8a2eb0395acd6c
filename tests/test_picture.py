"""The overview picture: the slide's own pixels, an outline on the tissue's border, tiles where the grid says."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_engine import detect_tissue, draw_overview, lay_grid, open_slide, save_picture
from wsi_engine.classification.heatmap import write_tiles_geojson
from wsi_engine.errors import ScaleError, SettingsError, SlideError
from wsi_engine.grid import TileGrid
from wsi_engine.picture import GRID, OUTLINE
from wsi_engine.places import write_file


def test_outline_and_grid_lie_where_they_should(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image, mpp=0.5) as slide:
        tissue = detect_tissue(slide)
        grid = lay_grid(slide, tile_px=256, tissue=tissue)
        plain = draw_overview(slide, long_side=800)
        drawn = draw_overview(slide, grid, tissue, long_side=800)
    assert plain.shape == drawn.shape == (600, 800, 3)
    assert np.abs(plain[:500].astype(int) - tissue_image.reshape(600, 2, 800, 2, 3).mean(axis=(1, 3))[:500]).max() <= 1
    y, x = np.nonzero((drawn == OUTLINE).all(axis=2))
    radius = np.hypot(x - 350, y - 300)
    assert len(x) > 500
    assert np.abs(radius - 225).max() < 15  # the disc's border, to a raster pixel of 8 µm
    for left, top in (grid.origins[[0, -1]] / 2).astype(int):
        assert tuple(drawn[top, left + 60]) in (GRID, OUTLINE)
        assert tuple(drawn[top + 60, left]) in (GRID, OUTLINE)


def test_needs_a_scale_and_a_size(tissue_image: np.ndarray) -> None:
    with open_slide(tissue_image) as slide, pytest.raises(ScaleError):
        draw_overview(slide)
    with open_slide(tissue_image, mpp=0.5) as slide, pytest.raises(SettingsError):
        draw_overview(slide, long_side=3)


def test_saving(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    save_picture(picture, tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(SlideError, match="cannot write"):
        save_picture(picture, tmp_path / "nowhere" / "a.png")


def test_a_draft_that_cannot_be_removed_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that became read-only: neither the picture nor the tiles nor a small file can be written."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    grid = TileGrid(np.zeros((0, 2), np.int64), 64, 64, 0.5, (64.0, 64.0), 0)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SlideError, match=r"cannot write the picture .*a\.png: Read-only file system"):
        save_picture(np.zeros((4, 4, 3), np.uint8), tmp_path / "a.png")
    with pytest.raises(SlideError, match=r"cannot write the tiles .*a\.geojson: Read-only file system"):
        write_tiles_geojson(tmp_path / "a.geojson", grid, np.zeros(0, np.float32), np.zeros(0), "x")
    with pytest.raises(OSError, match="gone") as caught:
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
        write_file(tmp_path / "a.csv", b"x")
    assert caught.value.errno == errno.EIO
