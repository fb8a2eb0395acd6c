"""One suite that every reader passes, on the same generated slide; then what is particular to one, and real files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from wsi_engine.clock import StageClock
from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.readers import READERS, is_url, open_reader
from wsi_engine.readers.base import Reader
from wsi_engine.readers.openslide import BLOCK
from wsi_engine.tiffwriter import TiffLayout, write_pyramid

Pixels = NDArray[np.uint8]

WIDTH, HEIGHT = 1100, 700
ALL = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(f"wsi_engine.readers.{name}") is None, reason=f"there is no reader {name} yet"
        ),
    )
    for name in READERS
]
PYRAMID = [param for param in ALL if param.values[0] != "image"]


def paint(x: int, y: int, width: int, height: int) -> Pixels:
    """A picture that has no two equal places, no symmetry, and three different channels."""
    rows, columns = np.mgrid[y : y + height, x : x + width].astype(np.float64)
    red = 130 + 90 * np.sin(columns / 37) * np.cos(rows / 53)
    green = 255 * (columns + 1) / (WIDTH + 1)
    blue = 255 * (rows + 1) / (HEIGHT + 1)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


@dataclass(frozen=True)
class Files:
    """The generated slide, and level 0 of it as a picture without loss."""

    slide: Path
    picture: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("slides")
    slide = folder / "slide.svs"
    layout = TiffLayout(tile_px=128, levels=3, quality=90)
    write_pyramid(slide, WIDTH, HEIGHT, paint, mpp=0.2527, layout=layout)
    with tifffile.TiffFile(slide) as tiff:
        Image.fromarray(tiff.pages.first.asarray()).save(folder / "picture.png")
    return Files(slide, folder / "picture.png")


@pytest.fixture(params=ALL)
def reader(request: pytest.FixtureRequest, files: Files) -> Iterator[Reader]:
    source = files.picture if request.param == "image" else files.slide
    opened = open_reader(source, request.param, StageClock())
    yield opened
    opened.close()


def read_level(reader: Reader, level: int) -> Pixels:
    size = reader.levels[level]
    return reader.read(level, 0, 0, size.width, size.height)


def cut(whole: Pixels, x: int, y: int, width: int, height: int) -> Pixels:
    """The oracle of a read: the rectangle of an array on white."""
    image = np.full((height, width, 3), 255, np.uint8)
    for row in range(max(0, y), min(y + height, whole.shape[0])):
        left, right = max(0, x), min(x + width, whole.shape[1])
        if left < right:
            image[row - y, left - x : right - x] = whole[row, left:right]
    return image


def test_levels_are_sorted_and_sized(reader: Reader) -> None:
    base = reader.levels[0]
    assert (base.width, base.height, base.downsample) == (WIDTH, HEIGHT, 1.0)
    expected = [(WIDTH, HEIGHT, 1.0)]
    if reader.name != "image":
        expected += [(550, 350, 2.0), (275, 175, 4.0)]
    assert [(level.width, level.height, level.downsample) for level in reader.levels] == expected


def test_metadata(reader: Reader) -> None:
    if reader.name == "image":
        assert (reader.metadata.vendor, reader.metadata.mpp, reader.metadata.mpp_source) == ("image", None, None)
        return
    assert reader.metadata.vendor == "aperio"
    assert reader.metadata.mpp == pytest.approx((0.2527, 0.2527))
    assert reader.metadata.mpp_source
    assert reader.metadata.objective == pytest.approx(10 / 0.2527, rel=0.01)


def test_pixels_are_those_painted(reader: Reader) -> None:
    image = read_level(reader, 0)
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert image.dtype == np.uint8
    delta = np.abs(image.astype(int) - paint(0, 0, WIDTH, HEIGHT))
    assert delta.mean() < 3  # what JPEG loses
    assert delta.max() < 40


def test_levels_show_the_same_picture(reader: Reader) -> None:
    base = read_level(reader, 0).astype(float)
    for number, level in enumerate(reader.levels):
        step = int(level.downsample)
        mean = base[: level.height * step, : level.width * step].reshape(level.height, step, level.width, step, 3)
        assert np.abs(read_level(reader, number) - mean.mean(axis=(1, 3))).mean() < 3


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 64, 48),
        (100, 90, 300, 200),
        (127, 127, 2, 2),
        (511, 383, 1, 1),
        (-20, 30, 60, 40),
        (30, -20, 60, 40),
        (WIDTH - 25, 30, 60, 40),
        (30, HEIGHT - 25, 60, 40),
        (-10, -15, 50, 50),
        (WIDTH - 7, HEIGHT - 9, 50, 50),
        (-50, -60, WIDTH + 100, HEIGHT + 120),
    ],
)
def test_a_rectangle_is_cut_from_the_level_on_white(reader: Reader, box: tuple[int, int, int, int]) -> None:
    for number, level in enumerate(reader.levels):
        step = int(level.downsample)
        x, y, width, height = box[0] // step, box[1] // step, box[2], box[3]
        image = reader.read(number, x, y, width, height)
        assert image.shape == (height, width, 3)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        assert image.flags.writeable
        np.testing.assert_array_equal(image, cut(read_level(reader, number), x, y, width, height))


@pytest.mark.parametrize(
    "corner", [(-500, 0), (0, -500), (WIDTH, 0), (0, HEIGHT), (WIDTH + 9000, HEIGHT + 9000), (-40, -30)]
)
def test_outside_is_white(reader: Reader, corner: tuple[int, int]) -> None:
    for level in range(len(reader.levels)):
        image = reader.read(level, *corner, 40, 30)
        assert image.shape == (30, 40, 3)
        assert (image == 255).all()


def test_what_is_returned_is_the_callers(reader: Reader) -> None:
    first = reader.read(0, 10, 10, 30, 20)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(reader.read(0, 10, 10, 30, 20), kept)


@pytest.mark.parametrize(("width", "height"), [(0, 10), (10, 0), (-5, 10), (0, 0)])
def test_a_rectangle_without_pixels_is_a_wrong_setting(reader: Reader, width: int, height: int) -> None:
    with pytest.raises(SettingsError, match="1"):
        reader.read(0, 0, 0, width, height)


@pytest.mark.parametrize("level", [-1, 3, 100])
def test_a_level_that_is_not_there(reader: Reader, level: int) -> None:
    with pytest.raises(SlideError, match=f"no level {level}"):
        reader.read(level, 0, 0, 10, 10)


def test_threads_read_what_one_thread_reads(reader: Reader) -> None:
    rng = np.random.default_rng(3)
    whole = [read_level(reader, level) for level in range(len(reader.levels))]
    requests = [
        (
            int(rng.integers(len(whole))),
            int(rng.integers(-60, WIDTH)),
            int(rng.integers(-60, HEIGHT)),
            int(rng.integers(1, 300)),
            int(rng.integers(1, 300)),
        )
        for _ in range(160)
    ]
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda request: reader.read(*request), requests))
    for (level, *box), image in zip(requests, images, strict=True):
        np.testing.assert_array_equal(image, cut(whole[level], *box))


def test_expected_reads_are_plain_reads(reader: Reader) -> None:
    boxes = np.array([[x, y, 100, 80] for y in range(-40, HEIGHT, 60) for x in range(-40, WIDTH, 75)], np.int64)
    plain = [reader.read(0, *map(int, box)) for box in boxes]
    with reader.expect(0, boxes), ThreadPoolExecutor(4) as pool:
        inside = list(pool.map(lambda box: reader.read(0, *map(int, box)), boxes))
        unannounced = reader.read(0, 33, 44, 500, 400)
    for one, other in zip(plain, inside, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(unannounced, reader.read(0, 33, 44, 500, 400))
    with reader.expect(0, np.empty((0, 4), np.int64)):
        pass


def test_an_error_inside_expect_reaches_the_caller(reader: Reader) -> None:
    with pytest.raises(KeyError, match="mine"), reader.expect(0, np.array([[0, 0, 50, 50]])):
        raise KeyError("mine")
    assert reader.read(0, 0, 0, 50, 50).shape == (50, 50, 3)


def test_a_closed_reader_says_so(reader: Reader) -> None:
    reader.read(0, 0, 0, 10, 10)
    reader.close()
    with pytest.raises(SlideError, match="closed"):
        reader.read(0, 0, 0, 10, 10)
    reader.close()


def test_closing_under_reading_threads_ends_in_errors_only(reader: Reader) -> None:
    def read_until_closed(_: int) -> str:
        for _ in range(10_000):
            try:
                reader.read(0, 0, 0, WIDTH, HEIGHT)
            except SlideError as error:
                return str(error)
        return "never closed"

    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(read_until_closed, number) for number in range(4)]
        reader.read(0, 0, 0, 10, 10)
        reader.close()
    assert all("never" not in end.result(timeout=60) for end in ends)


def test_reading_counts_on_the_clock(reader: Reader) -> None:
    before = reader.clock.seconds()
    read_level(reader, 0)
    after = reader.clock.seconds()
    assert after["decode"] > before["decode"]
    assert all(after[stage] == before[stage] for stage in ("resample", "encode", "write"))


@pytest.mark.parametrize("name", PYRAMID)
@pytest.mark.parametrize(
    "layout",
    [
        TiffLayout(tile_px=128, levels=3),
        TiffLayout(tile_px=128, levels=3, photometric="rgb", share_tables=False),
        TiffLayout(tile_px=240, levels=2, level_step=4, bigtiff=True),
    ],
    ids=["ycbcr", "rgb", "bigtiff"],
)
def test_readers_agree_with_tifffile(name: str, layout: TiffLayout, tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, WIDTH, HEIGHT, paint, mpp=0.5, layout=layout)
    with tifffile.TiffFile(path) as tiff:
        truth = [level.asarray() for level in tiff.series[0].levels]
    with_reader = open_reader(path, name)
    assert len(with_reader.levels) == len(truth)
    for level, pixels in enumerate(truth):
        assert np.abs(read_level(with_reader, level).astype(int) - pixels).max() <= 2
    with_reader.close()


@pytest.mark.parametrize("name", PYRAMID)
def test_level_sizes_that_were_rounded(name: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.svs"
    write_pyramid(path, 1103, 701, paint, mpp=0.5, layout=TiffLayout(tile_px=64, levels=3))
    reader = open_reader(path, name)
    assert [level.downsample for level in reader.levels] == [1.0, 2.0, 4.0]
    whole = read_level(reader, 2).astype(int)
    part = reader.read(2, 200, 131, 70, 40).astype(int)
    # OpenSlide shifts by up to half a level-0 pixel here, an eighth of a pixel of the level.
    assert np.abs(part - whole[131:171, 200:270]).max() <= 4
    reader.close()


@pytest.mark.parametrize("name", PYRAMID)
def test_a_tile_without_data_is_white(name: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse.tif"
    write_pyramid(path, 300, 200, paint, mpp=0.5, layout=TiffLayout(tile_px=64, levels=1), description="no scanner")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages.first.tags["TileByteCounts"]
        counts = list(tag.value)
        counts[6] = 0  # row 1, column 1 of 5 × 4 tiles
        tag.overwrite(tuple(counts))
    reader = open_reader(path, name)
    image = read_level(reader, 0)
    assert (image[64:128, 64:128] == 255).all()
    image[64:128, 64:128] = paint(64, 64, 64, 64)
    assert np.abs(image.astype(int) - paint(0, 0, 300, 200)).max() < 60
    assert (reader.read(0, 70, 70, 20, 20) == 255).all()
    reader.close()


def test_openslide_reads_large_rectangles_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "long.tif"
    width = 2 * BLOCK + 100
    write_pyramid(
        path,
        width,
        70,
        lambda x, y, w, h: np.broadcast_to((np.arange(x, x + w) // 64 % 256).astype(np.uint8)[:, None], (h, w, 3)),
        mpp=0.5,
        layout=TiffLayout(tile_px=64, levels=1, quality=95),
    )
    reader = open_reader(path, "openslide")
    image = reader.read(0, -10, -10, width + 20, 90)
    columns = np.arange(width) // 64 % 256
    assert np.abs(image[10:80, 10:-10].astype(int) - columns[None, :, None]).max() <= 3
    assert (image[:10] == 255).all()
    assert (image[:, :10] == 255).all()
    assert (image[:, -10:] == 255).all()
    reader.close()


# ---- the choice of a reader ----


def test_auto_takes_the_fastest(files: Files) -> None:
    slide = open_reader(files.slide)
    fastest = "openslide" if importlib.util.find_spec("wsi_engine.readers.turbo") is None else "turbo"
    assert slide.name == fastest
    assert open_reader(files.picture).name == "image"
    assert open_reader(np.zeros((5, 6, 3), np.uint8)).name == "image"
    assert open_reader(files.slide.as_uri()).name == fastest
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


# ---- pictures and arrays ----


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


# ---- real slides ----


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
    def open_and_read() -> None:
        read_level(open_real(shared_data, "unreadable.svs"), 0)

    check: Callable[[], None] = open_and_read
    with pytest.raises(SlideError) as caught:
        check()
    assert "unreadable.svs" in str(caught.value)
    assert "\n" not in str(caught.value)
