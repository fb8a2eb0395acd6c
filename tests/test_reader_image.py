"""Pictures and arrays read as slides of one level."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from support import paint, read_level

from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.readers import open_reader


def test_grey_and_transparent_arrays() -> None:
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    np.testing.assert_array_equal(read_level(open_reader(grey), 0), np.stack([grey] * 3, axis=-1))
    clear = np.zeros((2, 3, 4), np.uint8)
    clear[0, :, :3] = [200, 100, 0]
    clear[0, :, 3] = [0, 128, 255]
    image = read_level(open_reader(clear), 0)
    over = Image.alpha_composite(Image.new("RGBA", (3, 2), "white"), Image.fromarray(clear))
    assert np.abs(image.astype(int) - np.asarray(over.convert("RGB"))).max() <= 1
    assert (image[1] == 255).all()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(5, np.uint8),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_arrays_of_other_kinds_are_refused(array: NDArray[np.generic]) -> None:
    with pytest.raises(SettingsError, match="uint8"):
        open_reader(array)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "RGB"])
def test_png_modes(mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray(paint(0, 0, 40, 30)).convert(mode)
    picture.save(tmp_path / "picture.png")
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(read_level(open_reader(tmp_path / "picture.png"), 0), expected)


def test_jpeg_pictures_and_their_resolution_is_no_scale(tmp_path: Path) -> None:
    Image.fromarray(paint(0, 0, 90, 70)).save(tmp_path / "photo.jpg", dpi=(300, 300))
    reader = open_reader(tmp_path / "photo.jpg")
    assert reader.metadata.mpp is None
    np.testing.assert_array_equal(read_level(reader, 0), np.asarray(Image.open(tmp_path / "photo.jpg")))


@pytest.mark.parametrize("kind", ["striped", "planar", "grey", "white-is-zero", "palette", "lzw"])
def test_plain_tiffs(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    pixels = paint(0, 0, 90, 70)
    expected = pixels
    if kind == "striped":
        tifffile.imwrite(path, pixels, photometric="rgb", rowsperstrip=8)
    elif kind == "planar":
        tifffile.imwrite(path, np.moveaxis(pixels, -1, 0), photometric="rgb", planarconfig="separate")
    elif kind == "grey":
        tifffile.imwrite(path, pixels[..., 0], photometric="minisblack")
        expected = np.stack([pixels[..., 0]] * 3, axis=-1)
    elif kind == "white-is-zero":
        tifffile.imwrite(path, pixels[..., 0], photometric="miniswhite")
        expected = 255 - np.stack([pixels[..., 0]] * 3, axis=-1)
    elif kind == "palette":
        picture = Image.fromarray(pixels).quantize(64)
        picture.save(path)
        expected = np.asarray(picture.convert("RGB"))
    else:
        Image.fromarray(pixels).save(path, compression="tiff_lzw")
    reader = open_reader(path)
    assert reader.name == "image"
    np.testing.assert_array_equal(read_level(reader, 0), expected)


def test_scale_of_plain_tiffs(tmp_path: Path) -> None:
    pixels = paint(0, 0, 90, 70)
    path = tmp_path / "picture.tif"

    def scale(**options: object) -> tuple[tuple[float, float] | None, str | None]:
        tifffile.imwrite(path, pixels, photometric="rgb", **options)  # type: ignore[arg-type]
        metadata = open_reader(path).metadata
        return metadata.mpp, metadata.mpp_source

    mpp, source = scale(resolution=(20_000, 40_000), resolutionunit="CENTIMETER", metadata=None)
    assert mpp == pytest.approx((0.5, 0.25))
    assert source == "TIFF resolution"
    assert scale(resolution=(50_800, 50_800), resolutionunit="INCH", metadata=None)[0] == pytest.approx((0.5, 0.5))
    assert scale(metadata=None) == (None, None)
    assert scale(resolution=(4, 2), resolutionunit="NONE", metadata=None) == (None, None)
    mpp, source = scale(imagej=True, resolution=(4, 2), metadata={"unit": "um"})
    assert mpp == pytest.approx((0.25, 0.5))
    assert source == "ImageJ unit"
    mpp, source = scale(ome=True, metadata={"axes": "YXS", "PhysicalSizeX": 0.3, "PhysicalSizeY": 0.4})
    assert mpp == pytest.approx((0.3, 0.4))
    assert source == "OME PhysicalSizeX"


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_are_refused_with_advice(name: str, tmp_path: Path) -> None:
    deep = (paint(0, 0, 20, 10)[..., 0].astype(np.uint16)) << 8
    if name.endswith("png"):
        Image.fromarray(deep).save(tmp_path / name)
    else:
        tifffile.imwrite(tmp_path / name, deep)
    with pytest.raises(SlideError, match="8 bits"):
        open_reader(tmp_path / name)


def test_a_picture_too_large_for_memory_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    Image.fromarray(paint(0, 0, 90, 70)).save(tmp_path / "picture.png")
    monkeypatch.setattr("wsi_engine.readers.image.MAX_PIXELS", 6000)
    with pytest.raises(SlideError, match="pyramidal TIFF"):
        open_reader(tmp_path / "picture.png")
    monkeypatch.undo()
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)  # Pillow's own guard would warn or refuse here
    assert open_reader(tmp_path / "picture.png").levels[0].width == 90
    assert not recwarn.list
