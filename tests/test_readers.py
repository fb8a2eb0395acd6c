"""One suite that every reader passes, on the same generated slide."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from support import HEIGHT, WIDTH, Files, Pixels, paint, read_level

from wsi_engine.clock import StageClock
from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.readers import READERS, open_reader
from wsi_engine.readers.base import Reader
from wsi_engine.readers.openslide import BLOCK
from wsi_engine.tiffwriter import TiffLayout, write_pyramid

PYRAMID = [name for name in READERS if name != "image"]


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, files: Files) -> Iterator[Reader]:
    source = files.picture if request.param == "image" else files.slide
    opened = open_reader(source, request.param, StageClock())
    yield opened
    opened.close()


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
