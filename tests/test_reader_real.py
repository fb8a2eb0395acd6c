"""Every reader on real slides of several scanners."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from wsi_engine.errors import SlideError
from wsi_engine.readers import READERS, open_reader
from wsi_engine.readers.base import Reader

Pixels = NDArray[np.uint8]

PYRAMID = [name for name in READERS if name != "image"]


def read_level(reader: Reader, level: int) -> Pixels:
    size = reader.levels[level]
    return reader.read(level, 0, 0, size.width, size.height)


def open_real(shared_data: Path, name: str, reader: str = "auto") -> Reader:
    return open_reader(shared_data / "slides" / name, reader)


@pytest.mark.parametrize("name", PYRAMID)
def test_real_aperio_slide(name: str, shared_data: Path) -> None:
    reader = open_real(shared_data, "CMU-1-Small-Region.svs", name)
    assert (reader.levels[0].width, reader.levels[0].height) == (2220, 2967)
    assert reader.metadata.mpp == (0.499, 0.499)
    assert reader.metadata.objective == 20
    truth = read_level(open_real(shared_data, "CMU-1-Small-Region.svs", "openslide"), 0)
    assert np.abs(read_level(reader, 0).astype(int) - truth).max() <= 2


def test_real_openslide_pixels_are_openslides(shared_data: Path) -> None:
    openslide = pytest.importorskip("openslide")
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    with openslide.OpenSlide(path) as slide:
        region = slide.read_region((2100, 2900), 0, (200, 100))
    expected = Image.alpha_composite(Image.new("RGBA", region.size, "white"), region).convert("RGB")
    np.testing.assert_array_equal(open_reader(path, "openslide").read(0, 2100, 2900, 200, 100), np.asarray(expected))


@pytest.mark.parametrize(
    ("name", "levels", "mpp", "vendor"),
    [
        ("TCGA-CR-7395-jpeg2000-no-mpp.svs", [(4443, 3567), (2221, 1783)], None, "aperio"),
        ("camelyon-overview.dcm", [(1152, 700)], 28.97, "dicom"),
        ("fluorescence-DAPI.ndpi", [(3968, 4864), (1984, 2432)], 0.228, "hamamatsu"),
    ],
)
def test_real_slides_of_other_scanners(
    name: str, levels: list[tuple[int, int]], mpp: float | None, vendor: str, shared_data: Path
) -> None:
    reader = open_real(shared_data, name)
    assert reader.name == "openslide"
    assert reader.metadata.vendor == vendor
    assert [(level.width, level.height) for level in reader.levels][: len(levels)] == levels
    assert (reader.metadata.mpp is None) if mpp is None else reader.metadata.mpp[0] == pytest.approx(mpp, rel=0.01)  # type: ignore[index]
    image = read_level(reader, len(reader.levels) - 1)
    assert image.std() > 5


def test_real_jpeg2000_slide_reads_alike(shared_data: Path) -> None:
    name = "TCGA-CR-7395-jpeg2000-no-mpp.svs"
    openslide, tiffslide = open_real(shared_data, name, "openslide"), open_real(shared_data, name, "tiffslide")
    base = [reader.read(0, 600, 500, 700, 600).astype(int) for reader in (openslide, tiffslide)]
    assert np.abs(base[0] - base[1]).max() <= 2
    # The sizes of level 1 are rounded, 2221 for 4443: OpenSlide shifts it by up to a quarter of a pixel.
    coarse = [reader.read(1, 600, 500, 700, 600).astype(int) for reader in (openslide, tiffslide)]
    assert np.abs(coarse[0] - coarse[1]).mean() < 4


def test_real_tiff_region(shared_data: Path) -> None:
    reader = open_real(shared_data, "HE-region-no-mpp.tif")
    assert (reader.levels[0].width, reader.levels[0].height) == (1380, 1484)
    other = open_real(shared_data, "HE-region-no-mpp.tif", "tiffslide")
    assert np.abs(read_level(reader, 0).astype(int) - read_level(other, 0)).max() <= 2


def test_real_broken_slide(shared_data: Path) -> None:
    with pytest.raises(SlideError) as caught:
        read_level(open_real(shared_data, "unreadable.svs"), 0)
    assert "unreadable.svs" in str(caught.value)
    assert "\n" not in str(caught.value)
