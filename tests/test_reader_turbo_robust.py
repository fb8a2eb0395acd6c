"""The turbo reader under load and on broken files: tiles decoded once, errors that reach every thread."""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from wsi_engine.clock import StageClock
from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.readers.base import DamagedError
from wsi_engine.readers.tilecache import TileCache, count_uses
from wsi_engine.readers.turbo import TurboReader
from wsi_engine.tiffwriter import TiffLayout, write_pyramid

RGB = NDArray[np.uint8]
TILE = 64


def paint(x: int, y: int, width: int, height: int) -> RGB:
    rows, columns = np.mgrid[y : y + height, x : x + width]
    waves = [np.sin(columns / 17) * np.cos(rows / 23), np.sin((columns + rows) / 31), np.cos(columns / 11 - rows / 13)]
    return (128 + 100 * np.stack(waves, -1)).astype(np.uint8)


def read_level(reader: TurboReader, level: int) -> NDArray[np.int64]:
    size = reader.levels[level]
    return reader.read(level, 0, 0, size.width, size.height).astype(np.int64)


def write_slide(path: Path) -> Path:
    """501×397, 250×198 and 125×99 pixels in tiles of 64: 8×7, 4×4 and 2×2."""
    write_pyramid(path, 501, 397, paint, mpp=0.5, layout=TiffLayout(tile_px=TILE, levels=3), description="a slide")
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("turbo") / "slide.tif")


def test_results_are_the_callers_own(slide: Path) -> None:
    reader = TurboReader(slide, StageClock())
    with reader.expect(0, np.array([(0, 0, TILE, TILE)] * 3)):
        first = reader.read(0, 0, 0, TILE, TILE)
        kept = first.copy()
        first[:] = 0
        assert np.array_equal(reader.read(0, 0, 0, TILE, TILE), kept)


OVERLAPPING = np.array([(x, y, 100, 100) for y in range(-20, 420, 50) for x in range(-20, 520, 50)], dtype=np.int64)


def test_each_tile_is_decoded_once_in_a_pass_of_four_threads(slide: Path) -> None:
    reader, lone = TurboReader(slide, StageClock()), TurboReader(slide, StageClock())
    level = read_level(lone, 0)
    canvas = np.pad(level, ((200, 200), (200, 200), (0, 0)), constant_values=255)
    with ThreadPoolExecutor(4) as pool, reader.expect(0, OVERLAPPING):
        results = list(pool.map(lambda box: reader.read(0, *box), OVERLAPPING.tolist()))
    assert reader.tiles_decoded == 8 * 7
    assert reader._cache.held_bytes == 0
    for (x, y, width, height), pixels in zip(OVERLAPPING.tolist(), results, strict=True):
        assert np.array_equal(pixels, canvas[200 + y : 200 + y + height, 200 + x : 200 + x + width])
    assert reader.clock.seconds()["decode"] > 0
    assert reader.clock.seconds()["read"] > 0


def test_only_the_front_is_kept(slide: Path) -> None:
    reader = TurboReader(slide, StageClock())
    most = 0
    with reader.expect(0, OVERLAPPING):
        for box in OVERLAPPING.tolist():
            reader.read(0, *box)
            most = max(most, reader._cache.held_bytes)
    assert most <= 3 * 8 * TILE * TILE * 3  # three rows of tiles of the seven


def test_leaving_early_frees_everything(slide: Path) -> None:
    reader = TurboReader(slide, StageClock())
    with pytest.raises(KeyError), reader.expect(0, OVERLAPPING):
        reader.read(0, *OVERLAPPING[0].tolist())
        assert reader._cache.held_bytes > 0
        raise KeyError
    assert reader._cache.held_bytes == 0
    assert reader.read(0, 0, 0, 10, 10).shape == (10, 10, 3)


def test_reads_outside_the_plan_work_meanwhile(slide: Path) -> None:
    reader, lone = TurboReader(slide, StageClock()), TurboReader(slide, StageClock())
    with reader.expect(0, np.array([(0, 0, 100, 100)])):
        assert np.array_equal(reader.read(0, 200, 200, 90, 90), lone.read(0, 200, 200, 90, 90))
        assert np.array_equal(reader.read(1, 5, 5, 90, 90), lone.read(1, 5, 5, 90, 90))
        assert np.array_equal(reader.read(0, 0, 0, 100, 100), lone.read(0, 0, 0, 100, 100))


def test_uses_are_counted_like_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    boxes = np.column_stack([rng.integers(-100, 400, (300, 2)), rng.integers(0, 150, (300, 2))])
    expected = np.zeros((5, 7), int)
    for x, y, width, height in boxes.tolist():
        for row in range(5):
            for column in range(7):
                across = max(x, column * 40) < min(x + width, column * 40 + 40)
                expected[row, column] += across and max(y, row * 50) < min(y + height, row * 50 + 50)
    assert np.array_equal(count_uses(boxes, (40, 50), (7, 5)).reshape(5, 7), expected)


def test_waiting_threads_share_the_result_or_the_error() -> None:
    def ask(decode: Callable[[], RGB]) -> list[object]:
        cache, waiting, calls = TileCache(), threading.Barrier(4), []

        def slow() -> RGB:
            calls.append(1)
            threading.Event().wait(0.2)  # the other three arrive meanwhile
            return decode()

        def work(_: int) -> object:
            waiting.wait()
            try:
                return cache.tile(((0, 1), 0), slow)
            except SlideError as error:
                return str(error)

        with cache.plan((0, 1), np.array([4], np.int32)), ThreadPoolExecutor(4) as pool:
            results = list(pool.map(work, range(4)))
        assert len(calls) == 1
        assert cache.held_bytes == 0
        return results

    def fail() -> RGB:
        raise SlideError("tile 7 is broken")

    tile = np.zeros((2, 2, 3), np.uint8)
    assert all(result is tile for result in ask(lambda: tile))
    assert ask(fail) == ["tile 7 is broken"] * 4


def test_kept_tiles_are_bounded() -> None:
    cache = TileCache(planned_bytes=5000, recent_bytes=2500)
    with cache.plan((0, 1), np.full(50, 2, np.int32)):
        for number in range(50):
            cache.tile(((0, 1), number), lambda: np.zeros(1000, np.uint8))
            cache.tile(((1, 1), number), lambda: np.zeros(1000, np.uint8))
        assert cache.held_bytes == 7000
    assert cache.held_bytes == 2000


def patch_tag(path: Path, code: int, values: list[int], page: int = 0) -> None:
    """Overwrite the first values of a tag where they stand in the file."""
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[page].tags[code]
        form = {3: "H", 4: "I", 16: "Q"}[tag.dtype]
    with path.open("r+b") as file:
        file.seek(tag.valueoffset)
        file.write(struct.pack(f"<{len(values)}{form}", *values))


@pytest.mark.parametrize(
    ("code", "values", "message"),
    [
        (325, [0] * 56, "no tile data"),
        (324, [2**32 - 10], "past the end .* tile 0|past the end .*tile 0"),
        (325, [5, 2**32 - 1], "past the end .*tile 1"),
        (256, [2**31], "tile table"),
        (257, [2**31], "tile table"),
        (256, [0], "no size|tile table"),
    ],
)
def test_damaged_tables_are_found_at_opening(tmp_path: Path, code: int, values: list[int], message: str) -> None:
    path = write_slide(tmp_path / "a.tif")
    patch_tag(path, code, values)
    with pytest.raises(DamagedError, match=message) as caught:
        TurboReader(path, StageClock())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_tile_is_named_and_reaches_every_reader(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.tif")
    with tifffile.TiffFile(path) as tiff:
        start, size = tiff.pages[1].dataoffsets[5], tiff.pages[1].databytecounts[5]
    blob = bytearray(path.read_bytes())
    blob[start + 2 : start + size] = np.random.default_rng(0).bytes(size - 2)
    path.write_bytes(blob)
    reader = TurboReader(path, StageClock())

    def attempt(_: int) -> str:
        with pytest.raises(SlideError) as caught:
            reader.read(1, 64, 64, 64, 64)
        return str(caught.value)

    with ThreadPoolExecutor(4) as pool, reader.expect(1, np.array([(64, 64, 64, 64)] * 4)):
        for message in pool.map(attempt, range(4)):
            assert str(path) in message
            assert "level 1, tile in column 1 of row 1" in message
    assert reader.read(0, 0, 0, 64, 64).shape == (64, 64, 3)


def test_a_tile_cut_short_or_of_another_size_is_an_error(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.tif")
    with tifffile.TiffFile(path) as tiff:
        half = tiff.pages[0].databytecounts[0] // 2
    patch_tag(path, 325, [half])
    with pytest.raises(SlideError, match="level 0, tile in column 0 of row 0"):
        TurboReader(path, StageClock()).read(0, 0, 0, 10, 10)
    path = tmp_path / "b.tif"
    write_pyramid(path, 128, 128, paint, mpp=0.5, layout=TiffLayout(tile_px=TILE, levels=1))
    patch_tag(path, 322, [80])
    with pytest.raises(SlideError, match="64×64 pixels, not 80×64"):
        TurboReader(path, StageClock()).read(0, 0, 0, 10, 10)


def test_random_changes_never_escape_as_other_errors(tmp_path: Path, slide: Path) -> None:
    blob = slide.read_bytes()
    with tifffile.TiffFile(slide) as tiff:
        heads = [(0, 16)] + [(page.offset, page.offset + 12 * len(page.tags) + 6) for page in tiff.pages]
    rng = np.random.default_rng(5)
    path, refused = tmp_path / "a.tif", 0
    for _ in range(150):
        broken = bytearray(blob)
        for _ in range(3):
            broken[int(rng.integers(*heads[rng.integers(len(heads))]))] = int(rng.integers(256))
        path.write_bytes(broken)
        try:
            reader = TurboReader(path, StageClock())
            for level in range(len(reader.levels)):
                reader.read(level, 0, 0, 100, 100)
        except SlideError:
            refused += 1
    assert refused > 75


@pytest.mark.parametrize(
    "content", [b"", b"II*\x00", b"II*\x00\x08\x00\x00\x00", b"II*\x00\xff\xff\xff\x7f", b"x" * 999]
)
def test_what_is_no_tiff_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(content)
    with pytest.raises(SlideError, match=r"a\.svs"):
        TurboReader(path, StageClock())
    with pytest.raises(SlideError, match="missing"):
        TurboReader(tmp_path / "missing.svs", StageClock())


def test_wrong_use_is_an_error(slide: Path) -> None:
    reader = TurboReader(slide, StageClock())
    with pytest.raises(SlideError, match="no level 3"):
        reader.read(3, 0, 0, 1, 1)
    with pytest.raises(SettingsError):
        reader.read(0, 0, 0, 0, 1)
    with pytest.raises(SlideError, match="no level 3"), reader.expect(3, OVERLAPPING):
        pass
    reader.close()
    reader.close()
    with pytest.raises(SlideError, match="closed"):
        reader.read(0, 0, 0, 1, 1)


def test_the_parser_is_silent_only_while_a_slide_is_opened(
    tmp_path: Path, slide: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(slide.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].tags[347].offset
    with path.open("r+b") as file:
        file.seek(offset + 8)
        file.write(b"\xff\xff\xff\x7f")  # the tables lie outside the file: tifffile complains and goes on
    with pytest.raises(SlideError):
        TurboReader(path, StageClock()).read(0, 0, 0, 10, 10)
    assert caplog.records == []
    logging.getLogger("tifffile").warning("heard")
    assert [record.message for record in caplog.records] == ["heard"]


def test_truncated_real_slide_is_an_error_or_reads_equal(shared_data: Path, tmp_path: Path) -> None:
    whole = (shared_data / "slides" / "CMU-1-Small-Region.svs").read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(whole)
    expected = read_level(TurboReader(path, StageClock()), 0)
    messages = []
    for percent in [*range(0, 100, 7), 99]:
        path.write_bytes(whole[: len(whole) * percent // 100])
        try:
            pixels = read_level(TurboReader(path, StageClock()), 0)
        except SlideError as error:
            messages.append(str(error))
        else:
            assert np.array_equal(pixels, expected)
    assert len(messages) >= 12
    assert all(str(path) in message and "\n" not in message for message in messages)
