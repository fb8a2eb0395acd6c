"""The benchmark measures the same tiles by every way, and says how near each comes to its limit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from wsi_engine import create_encoder, lay_grid, open_slide
from wsi_engine.bench import compressed_tiles, decode_all, mask_of, measure, plain_tiles, run_bench, some_tiles
from wsi_engine.cli.app import app
from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.grid import GridSettings, lay_grid_on
from wsi_engine.readers.turbo import TurboReader
from wsi_engine.synthetic import paint_constant, write_ihc_slide
from wsi_engine.tiffwriter import TiffLayout, write_pyramid


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bench") / "ihc.svs"
    write_ihc_slide(path, 2048, 2048, layout=TiffLayout(level_step=4))
    return str(path)


def test_every_way_is_measured_on_the_same_tiles(path: str) -> None:
    told: list[str] = []
    report = run_bench(path, create_encoder("texture"), tiles=8, batch_size=4, repeats=2, told=told.append)
    rates = {one.name: one.rate for one in report.measurements}
    assert report.tiles == 8
    assert {"reader turbo, 1 thread", "reader openslide, 1 thread", "reader tiffslide, 1 thread"} <= set(rates)
    assert {"libjpeg-turbo alone, 1 thread", "OpenSlide + PIL, 1 thread", "encoder, synthetic tiles"} <= set(rates)
    assert all(len(one.runs) == 2 and min(one.runs) <= one.rate <= max(one.runs) for one in report.measurements)
    assert len(told) == 3 * len(rates)
    ratios = {ratio.name: ratio.value for ratio in report.ratios}
    assert len(ratios) == 3
    pair = rates["reader turbo, 1 thread"] / rates["OpenSlide + PIL, 1 thread"]
    assert ratios["reader turbo / OpenSlide + PIL, 1 thread"] == pytest.approx(pair)


def test_the_mask_brings_back_just_the_tiles(path: str) -> None:
    with open_slide(path) as slide:
        whole = lay_grid(slide, mpp=0.5, tile_px=128, tissue=None)
        some = some_tiles(slide, whole, 20)
        assert len(some) == 20
        again = lay_grid_on(slide, GridSettings(0.5, 128, min_tissue=0.5), mask_of(slide, some))
    assert np.array_equal(again.origins, some.origins)


def test_the_limit_decodes_each_compressed_tile_once(path: str) -> None:
    with open_slide(path, reader="turbo") as slide:
        assert isinstance(slide.backend, TurboReader)
        grid = lay_grid(slide, mpp=0.5, tissue=None)
        streams, size = compressed_tiles(slide, slide.backend, grid)
    assert len(streams) == 64  # 2048² px in tiles of 256
    assert size == (128, 128)
    decode_all(streams, size, 3)
    with pytest.raises(ValueError, match=r"JPEG|jpeg|marker"):
        decode_all([b"no picture"], size, 1)


def test_the_plain_way_shows_the_same_tissue(path: str) -> None:
    with open_slide(path) as slide:
        grid = lay_grid(slide, mpp=0.5, tissue=None)
        for (x, y), tile in zip(grid.origins[:3].tolist(), plain_tiles(path, grid), strict=False):
            ours = slide.read_region(x, y, 256, 256, mpp=0.5).astype(float)
            assert np.asarray(tile).shape == (256, 256, 3)
            assert np.abs(np.asarray(tile) - ours).mean() < 8


def test_what_fails_is_left_out() -> None:
    def broken() -> None:
        raise SlideError("cannot be read")

    done = measure({"good": (1, 10, lambda: None), "bad": (1, 10, broken)}, 3)
    assert list(done) == ["good"]
    assert len(done["good"].runs) == 3


def test_wrong_settings_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="at least 1"):
        run_bench(path, create_encoder("texture"), tiles=0)
    write_pyramid(tmp_path / "white.svs", 1024, 1024, paint_constant((250, 250, 250)), mpp=0.5)
    with pytest.raises(SettingsError, match="no tile to measure with"):
        run_bench(str(tmp_path / "white.svs"), create_encoder("texture"))


def test_the_command_writes_json(path: str, tmp_path: Path) -> None:
    options = ["--encoder", "texture", "--tiles", "4", "--repeats", "1", "--batch-size", "4"]
    result = CliRunner().invoke(app, ["bench", path, *options, "-o", str(tmp_path / "bench.json")])
    assert result.exit_code == 0, result.output
    assert "end to end / the slower of reader and encoder" in result.output
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures["encoder"] == "texture"
    assert figures["tiles"] == 4
    assert {"name", "rate", "runs", "threads"} == set(figures["measurements"][0])
