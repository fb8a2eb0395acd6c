"""The writer of pyramidal TIFFs, judged by three independent readers."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
from PIL import Image
from skimage.data import immunohistochemistry

from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.tiffwriter import TiffLayout, write_pyramid

WIDTH, HEIGHT = 1501, 1100
TISSUE = np.tile(immunohistochemistry(), (3, 3, 1))[:HEIGHT, :WIDTH]
KINDS = [
    TiffLayout(compression=compression, photometric=photometric, pyramid=pyramid, share_tables=shared)
    for compression in ("jpeg", "jpeg2000", "lzw", "none")
    for photometric in ("ycbcr", "rgb")
    for pyramid in ("flat", "subifd")
    for shared in ((True, False) if compression == "jpeg" else (True,))
    if compression.startswith("jpeg") or photometric == "rgb"
]


def name_of(layout: TiffLayout) -> str:
    return f"{layout.compression}-{layout.photometric}-{layout.pyramid}-{'tables' if layout.share_tables else 'whole'}"


def paint_tissue(x: int, y: int, width: int, height: int) -> np.ndarray:
    return TISSUE[y : y + height, x : x + width]


def halve(image: np.ndarray, step: int = 2) -> np.ndarray:
    """Box average by 64-bit arithmetic, halves up."""
    rows, columns = image.shape[0] // step, image.shape[1] // step
    boxes = image[: rows * step, : columns * step].reshape(rows, step, columns, step, 3).astype(np.int64)
    return (2 * boxes.sum(axis=(1, 3)) + step * step) // (2 * step * step)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def read_openslide(path: Path, level: int) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3]


def read_tifffile(path: Path, level: int) -> np.ndarray:
    with tifffile.TiffFile(path) as tiff:
        return tiff.series[0].levels[level].asarray().reshape(-1, *tiff.series[0].levels[level].shape[-2:])


def read_tiffslide(path: Path, level: int) -> np.ndarray:
    with tiffslide.TiffSlide(path) as slide:
        return slide.read_region((0, 0), level, slide.level_dimensions[level], as_array=True)


@pytest.mark.parametrize("layout", KINDS, ids=name_of)
def test_every_reader_sees_the_pixels(tmp_path: Path, layout: TiffLayout) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, WIDTH, HEIGHT, paint_tissue, mpp=0.499, layout=layout)
    truth = [TISSUE, halve(TISSUE), halve(halve(TISSUE))]
    readers = [read_tifffile, read_tiffslide]
    if layout.compression == "jpeg2000" and layout.photometric == "ycbcr":
        readers = []  # these two hand out YCbCr without converting it
    if layout.pyramid == "flat":
        readers.append(read_openslide)
    for read in readers:
        for level, expected in enumerate(truth):
            pixels = read(path, level)
            assert pixels.shape == expected.shape
            if layout.compression in {"lzw", "none"}:
                assert np.array_equal(pixels, expected)
            else:
                assert psnr(pixels, expected) > 30
    if layout.pyramid == "subifd" and layout.compression != "jpeg2000":
        assert psnr(read_openslide(path, 0), TISSUE) > 30  # openslide does not look into sub-directories
    with tifffile.TiffFile(path) as tiff:
        expected_pages = 1 if layout.pyramid == "subifd" else len(truth) + 1
        assert len(tiff.pages) == expected_pages


def test_ycbcr_jpeg2000_decodes_to_the_tissue(tmp_path: Path) -> None:
    write_pyramid(
        tmp_path / "a.svs", WIDTH, HEIGHT, paint_tissue, mpp=0.5, layout=TiffLayout(compression="jpeg2000", quality=100)
    )
    raw = read_tifffile(tmp_path / "a.svs", 0)
    assert np.array_equal(raw, np.asarray(Image.fromarray(TISSUE).convert("YCbCr")))


@pytest.mark.parametrize("quality", [100])
def test_jpeg2000_of_quality_100_is_lossless(tmp_path: Path, quality: int) -> None:
    layout = TiffLayout(compression="jpeg2000", photometric="rgb", quality=quality)
    write_pyramid(tmp_path / "a.svs", WIDTH, HEIGHT, paint_tissue, mpp=0.5, layout=layout)
    assert np.array_equal(read_openslide(tmp_path / "a.svs", 0), TISSUE)
    assert np.array_equal(read_openslide(tmp_path / "a.svs", 2), halve(halve(TISSUE)))


def test_openslide_takes_it_for_an_aperio_slide(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, WIDTH, HEIGHT, paint_tissue, mpp=0.499)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert slide.properties["aperio.MPP"] == "0.4990"
        assert float(slide.properties["openslide.mpp-x"]) == 0.499
        assert slide.properties["openslide.objective-power"] == "20"
        assert slide.level_dimensions == ((1501, 1100), (750, 550), (375, 275))
        thumbnail = np.asarray(slide.associated_images["thumbnail"].convert("RGB"))
    assert psnr(thumbnail, halve(halve(TISSUE))) > 30


@pytest.mark.parametrize("mpp", [0.25, 0.499, 1 / 3, 0.2265467, 28.97, 2e-2])
@pytest.mark.parametrize("pyramid", ["flat", "subifd"])
def test_mpp_survives_exactly(tmp_path: Path, mpp: float, pyramid: str) -> None:
    layout = TiffLayout(compression="lzw", pyramid=pyramid)
    write_pyramid(tmp_path / "a.svs", 64, 48, paint_tissue, mpp=mpp, layout=layout)
    with tifffile.TiffFile(tmp_path / "a.svs") as tiff:
        fields = dict(part.split(" = ") for part in tiff.pages[0].description.split("|")[1:])
        resolution = tiff.pages[0].get_resolution("micrometer")[0]
    assert float(fields["MPP"]) == mpp
    assert 1 / resolution == pytest.approx(mpp, rel=1e-6)


def test_rgb_jpeg_tiles_carry_no_colour_marker(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.svs", WIDTH, HEIGHT, paint_tissue, mpp=0.5, layout=TiffLayout(photometric="rgb"))
    with tifffile.TiffFile(tmp_path / "a.svs") as tiff:
        page = tiff.pages[0]
        tiff.filehandle.seek(page.dataoffsets[0])
        tile = tiff.filehandle.read(page.databytecounts[0])
        assert page.photometric == tifffile.PHOTOMETRIC.RGB
        assert page.jpegtables[:4] == b"\xff\xd8\xff\xdb"
    assert b"Adobe" not in tile
    assert b"JFIF" not in tile
    frame = tile.index(b"\xff\xc0")
    assert [tile[frame + 10 + 3 * k] for k in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("step", [2, 4, 16])
@pytest.mark.parametrize("size", [(517, 303), (48, 640), (33, 33)])
def test_levels_are_box_averages_of_the_level_before(tmp_path: Path, step: int, size: tuple[int, int]) -> None:
    layout = TiffLayout(tile_px=64, compression="none", level_step=step, levels=2)
    write_pyramid(tmp_path / "a.tif", *size, paint_tissue, mpp=0.5, layout=layout)
    expected = halve(TISSUE[: size[1], : size[0]], step)
    assert np.array_equal(read_openslide(tmp_path / "a.tif", 1), expected)


def test_edge_tiles_repeat_the_edge(tmp_path: Path) -> None:
    layout = TiffLayout(tile_px=64, compression="none", levels=1)
    write_pyramid(tmp_path / "a.tif", 70, 50, paint_tissue, mpp=0.5, layout=layout)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        page = tiff.pages[0]
        tiff.filehandle.seek(page.dataoffsets[1])
        tile = np.frombuffer(tiff.filehandle.read(page.databytecounts[1]), np.uint8).reshape(64, 64, 3)
    assert (tile[:50, 6:] == TISSUE[:50, 69:70]).all()
    assert (tile[50:] == tile[49]).all()


def test_generic_tiff_when_described_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    write_pyramid(path, WIDTH, HEIGHT, paint_tissue, mpp=0.31, description="taken on a Tuesday, 5 µm thick")
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.level_count == 3
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.31, rel=1e-6)
        assert slide.properties["tiff.ImageDescription"] == "taken on a Tuesday, 5 µm thick"


def test_objective_and_bigtiff_are_settable(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, 300, 200, paint_tissue, mpp=0.325, layout=TiffLayout(bigtiff=True), objective=40)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
        assert "AppMag = 40|" in tiff.pages[0].description


def test_same_input_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for name, workers in (("a.svs", 1), ("b.svs", 3)):
        write_pyramid(tmp_path / name, WIDTH, HEIGHT, paint_tissue, mpp=0.5, workers=workers)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_each_pixel_is_painted_once(tmp_path: Path) -> None:
    painted = np.zeros((900, 5000), np.int64)

    def paint(x: int, y: int, width: int, height: int) -> np.ndarray:
        painted[y : y + height, x : x + width] += 1
        return np.full((height, width, 3), 200, np.uint8)

    write_pyramid(tmp_path / "a.svs", 5000, 900, paint, mpp=0.5, workers=1)
    assert (painted == 1).all()


def test_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    def paint(x: int, y: int, width: int, height: int) -> np.ndarray:
        return np.full((height, width, 3), (x // 64 + y) % 251, np.uint8)

    peaks = []
    for height in (1024, 8192):
        tracemalloc.start()
        write_pyramid(tmp_path / "a.tif", 1024, height, paint, mpp=0.5, layout=TiffLayout(compression="none"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "a.tif").stat().st_size > 3 * 1024 * 8192
    assert peaks[1] < 1.3 * peaks[0] + 2**20
    assert peaks[1] < 3 * 1024 * 8192 // 2


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    path.write_bytes(b"before")

    def paint(x: int, y: int, width: int, height: int) -> np.ndarray:
        if y > 500:
            raise RuntimeError("out of paint")
        return paint_tissue(x, y, width, height)

    with pytest.raises(RuntimeError, match="out of paint"):
        write_pyramid(path, WIDTH, HEIGHT, paint, mpp=0.5)
    assert [file.name for file in tmp_path.iterdir()] == ["slide.svs"]
    assert path.read_bytes() == b"before"


def test_a_painter_of_the_wrong_shape_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="return uint8"):
        write_pyramid(tmp_path / "a.svs", 600, 500, lambda x, y, w, h: np.zeros((w, h), np.uint8), mpp=0.5)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="cannot be written: No such file"):
        write_pyramid(tmp_path / "no" / "a.svs", 600, 500, paint_tissue, mpp=0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tile_px": 250}, {"tile_px": 0}, {"compression": "webp"}, {"photometric": "cmyk"}, {"quality": 0},
        {"quality": 101}, {"levels": 0}, {"level_step": 3}, {"pyramid": "ome"},
    ],
)  # fmt: skip
def test_wrong_layouts_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        TiffLayout(**wrong)


@pytest.mark.parametrize(("width", "height", "mpp"), [(0, 5, 0.5), (5, -1, 0.5), (5, 5, 0.0), (5, 5, float("nan"))])
def test_wrong_sizes_are_refused(tmp_path: Path, width: int, height: int, mpp: float) -> None:
    with pytest.raises(SettingsError):
        write_pyramid(tmp_path / "a.svs", width, height, paint_tissue, mpp=mpp)


def test_more_levels_than_pixels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="ask for fewer"):
        write_pyramid(tmp_path / "a.svs", 20, 4, paint_tissue, mpp=0.5, layout=TiffLayout(levels=4))
