"""Which reader opens what, and what is said of sources that none is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from support import HEIGHT, WIDTH, Files, paint, read_level

from wsi_engine.errors import SettingsError
from wsi_engine.places import is_url
from wsi_engine.readers import open_reader
from wsi_engine.tiffwriter import TiffLayout, write_pyramid


def test_auto_takes_the_fastest(files: Files) -> None:
    slide = open_reader(files.slide)
    assert slide.name == "turbo"
    assert open_reader(files.picture).name == "image"
    assert open_reader(np.zeros((5, 6, 3), np.uint8)).name == "image"
    assert open_reader(files.slide.as_uri()).name == "turbo"
    slide.close()


@pytest.mark.parametrize("compression", ["jpeg2000", "lzw"])
def test_auto_goes_on_where_turbo_cannot(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    layout = TiffLayout(tile_px=128, levels=2, compression=compression, photometric="rgb")  # type: ignore[arg-type]
    write_pyramid(path, WIDTH, HEIGHT, paint, mpp=0.5, layout=layout)
    reader = open_reader(path)
    assert reader.name == "openslide"
    assert np.abs(read_level(reader, 0).astype(int) - paint(0, 0, WIDTH, HEIGHT)).mean() < 3
    reader.close()


def test_auto_keeps_the_levels_that_openslide_cannot_see(tmp_path: Path) -> None:
    path = tmp_path / "subifds.tif"
    pixels = np.tile(paint(0, 0, WIDTH, HEIGHT), (6, 4, 1))
    with tifffile.TiffWriter(path) as writer:
        writer.write(pixels, tile=(512, 512), compression="zstd", photometric="rgb", subifds=1, metadata=None)
        writer.write(pixels[::2, ::2], tile=(512, 512), compression="zstd", photometric="rgb", metadata=None)
    reader = open_reader(path)
    assert (reader.name, len(reader.levels)) == ("tiffslide", 2)
    np.testing.assert_array_equal(reader.read(0, 1000, 600, 300, 200), pixels[600:800, 1000:1300])
    np.testing.assert_array_equal(reader.read(1, 1000, 600, 300, 200), pixels[::2, ::2][600:800, 1000:1300])
    reader.close()


def test_unknown_reader_lists_the_four(files: Files) -> None:
    with pytest.raises(SettingsError, match="turbo, openslide, tiffslide, image"):
        open_reader(files.slide, "cucim")


def test_readers_that_cannot_take_the_source(files: Files) -> None:
    with pytest.raises(SettingsError, match="image"):
        open_reader(np.zeros((5, 6, 3), np.uint8), "openslide")
    with pytest.raises(SettingsError, match="tiffslide"):
        open_reader("https://example.invalid/slide.svs", "openslide")
    with pytest.raises(SettingsError, match="int"):
        open_reader(5)  # type: ignore[arg-type]


def test_urls_and_paths_are_told_apart() -> None:
    assert is_url("s3://bucket/slide.svs")
    assert is_url("simplecache::https://host/slide.svs")
    assert not is_url("file:///data/slide.svs")
    assert not is_url("/data/slide.svs")
    assert not is_url("C:\\data\\slide.svs")
