"""The turbo reader against OpenSlide, on slides of every kind that it takes."""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from numpy.typing import NDArray

from wsi_engine.clock import StageClock
from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.readers.base import DamagedError
from wsi_engine.readers.openslide import OpenSlideReader
from wsi_engine.readers.tilecache import TileCache, count_uses
from wsi_engine.readers.turbo import TurboReader

RGB = NDArray[np.uint8]
TILE = 64
APERIO = "Aperio Image Library v12.0.0\n501x397 [0,0 501x397] (64x64) JPEG/RGB Q=85|AppMag = 40|MPP = 0.2527"
SAMPLING = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}


def paint(width: int, height: int) -> RGB:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 17) * np.cos(y / 23), np.sin((x + y) / 31), np.cos(x / 11 - y / 13)]
    noise = np.random.default_rng(3).normal(0, 10, (height, width, 3))
    return np.clip(128 + 100 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def halve(image: RGB) -> RGB:
    height, width = image.shape[0] // 2, image.shape[1] // 2
    blocks = image[: 2 * height, : 2 * width].reshape(height, 2, width, 2, -1)
    return blocks.mean(axis=(1, 3)).astype(np.uint8)


def encode(tile: RGB, colour: str, sampling: str, tables: bool, markers: bool) -> tuple[bytes | None, bytes]:
    """JPEGTables (None when the tile keeps its own) and the tile's stream."""
    if colour == "rgb":
        jpeg = imagecodecs.jpeg8_encode(tile, level=85, colorspace="rgb", outcolorspace="rgb", subsampling="444")
    elif colour == "minisblack":
        jpeg = simplejpeg.encode_jpeg(tile[..., :1].copy(), 85, colorspace="GRAY", colorsubsampling="GRAY")
    else:
        jpeg = simplejpeg.encode_jpeg(tile, 85, colorsubsampling=sampling)
    moved, kept, position = b"", b"\xff\xd8", 2
    while not kept[-2:] == b"SS":
        marker, end = jpeg[position + 1], position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        if marker in (0xDB, 0xC4) and tables:
            moved += jpeg[position:end]
        elif markers or not 0xE0 <= marker < 0xF0:
            kept += jpeg[position:end]
        position = end
        if marker == 0xDA:
            break
    return b"\xff\xd8" + moved + b"\xff\xd9" if tables else None, kept + jpeg[position:]


def write_slide(
    path: Path,
    levels: list[RGB],
    *,
    colour: str = "ycbcr",
    photometric: str | None = None,
    sampling: str = "420",
    tables: bool = True,
    markers: bool = False,
    missing: Collection[tuple[int, int]] = (),
    subifd: bool = False,
    reduced: bool = True,
    description: str | None = None,
    thumbnail: bool = False,
    resolution: tuple[tuple[float, float], str] | None = None,
    **options: object,
) -> Path:
    with tifffile.TiffWriter(path, **options) as writer:
        for number, image in enumerate(levels):
            streams, shared = [], None
            for top in range(0, image.shape[0], TILE):
                for left in range(0, image.shape[1], TILE):
                    part = image[top : top + TILE, left : left + TILE]
                    rest = (0, TILE - part.shape[0]), (0, TILE - part.shape[1]), (0, 0)
                    whole = np.ascontiguousarray(np.pad(part, rest, mode="edge"))
                    shared, stream = encode(whole, colour, sampling, tables, markers)
                    streams.append(b"" if (number, len(streams)) in missing else stream)
            kind = photometric or colour
            extra: dict[str, object] = {"subsampling": SAMPLING[sampling]} if kind == "ycbcr" else {}
            if resolution:
                extra |= {"resolution": resolution[0], "resolutionunit": resolution[1]}
            writer.write(
                iter(streams),
                shape=image.shape[:2] if colour == "minisblack" else image.shape,
                dtype=np.uint8,
                tile=(TILE, TILE),
                compression="jpeg",
                photometric=kind,
                jpegtables=shared,
                description=description if number == 0 or (description or "").startswith("Aperio") else None,
                metadata=None,
                subifds=len(levels) - 1 if subifd and number == 0 else None,
                subfiletype=1 if number and reduced else 0,
                **extra,
            )
            if thumbnail and number == 0:
                writer.write(image[::5, ::5], photometric="rgb", description=description, metadata=None)
    return path


def read_level(reader: TurboReader | OpenSlideReader, level: int) -> NDArray[np.int64]:
    size = reader.levels[level]
    return reader.read(level, 0, 0, size.width, size.height).astype(np.int64)


def assert_like_openslide(path: Path, levels: int) -> None:
    turbo, oracle = TurboReader(path, StageClock()), OpenSlideReader(path, StageClock())
    assert turbo.levels == oracle.levels
    assert len(turbo.levels) == levels
    assert turbo.metadata.mpp == pytest.approx(oracle.metadata.mpp)
    for level in range(levels):
        assert np.abs(read_level(turbo, level) - read_level(oracle, level)).max() <= 2
    turbo.close()
    oracle.close()


@pytest.fixture(scope="module")
def pyramid() -> list[RGB]:
    first = paint(501, 397)
    second = halve(first)
    return [first, second, halve(second)]


@pytest.fixture(scope="module")
def slide(pyramid: list[RGB], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("turbo") / "slide.tif", pyramid)


@pytest.mark.parametrize("description", [None, APERIO])
@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize(("colour", "sampling"), [("ycbcr", "420"), ("ycbcr", "422"), ("ycbcr", "444"), ("rgb", "444")])
def test_pixels_equal_openslide(
    tmp_path: Path, pyramid: list[RGB], colour: str, sampling: str, markers: bool, tables: bool, description: str | None
) -> None:
    kind = {"colour": colour, "sampling": sampling, "tables": tables, "markers": markers, "description": description}
    assert_like_openslide(write_slide(tmp_path / "a.tif", pyramid, **kind), levels=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind",
    [
        {"bigtiff": True},
        {"description": APERIO, "thumbnail": True},
        {"description": APERIO, "reduced": False},
        {"photometric": "rgb", "sampling": "444", "tables": False, "markers": True},  # against its JFIF marker
        {"colour": "rgb", "photometric": "ycbcr", "sampling": "444", "markers": True},  # against its Adobe marker
        {"missing": {(0, 3), (0, 55), (1, 2), (2, 1)}},
        {"colour": "minisblack"},
    ],
    ids=["bigtiff", "thumbnail", "not-reduced", "rgb-with-jfif", "ycbcr-with-adobe", "missing", "grey"],
)
def test_layouts_equal_openslide(tmp_path: Path, pyramid: list[RGB], kind: dict[str, object]) -> None:
    assert_like_openslide(write_slide(tmp_path / "a.tif", pyramid, **kind), levels=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [2, 4])
def test_missing_tiles_of_aperio_come_from_the_finer_level(tmp_path: Path, step: int) -> None:
    levels = [paint(512, 384)]
    levels += [halve(levels[0]) if step == 2 else halve(halve(levels[0]))]
    path = write_slide(tmp_path / "a.svs", levels, missing={(0, 3), (1, 1)}, description=APERIO)
    assert_like_openslide(path, levels=2)
    reader = TurboReader(path, StageClock())
    assert (reader.read(0, 3 * TILE, 0, TILE, TILE) == 255).all()
    assert (reader.read(1, TILE, 0, TILE, TILE) < 250).any()


@pytest.mark.parametrize("options", [{"subifd": True}, {"byteorder": ">"}, {"subifd": True, "bigtiff": True}])
def test_what_openslide_does_not_open_equals_tifffile(
    tmp_path: Path, pyramid: list[RGB], options: dict[str, object]
) -> None:
    path = write_slide(tmp_path / "a.tif", pyramid, tables=False, markers=True, **options)  # type: ignore[arg-type]
    reader = TurboReader(path, StageClock())
    assert [(level.width, level.height) for level in reader.levels] == [(501, 397), (250, 198), (125, 99)]
    assert [level.downsample for level in reader.levels] == [1, 2, 4]
    with tifffile.TiffFile(path) as tiff:
        pages = [tiff.pages[0], *tiff.pages[0].pages] if "subifd" in options else list(tiff.pages)
        for number, page in enumerate(pages):
            assert np.abs(read_level(reader, number) - page.asarray()).max() <= 2


def test_single_level(tmp_path: Path, pyramid: list[RGB]) -> None:
    assert_like_openslide(write_slide(tmp_path / "a.tif", pyramid[:1]), levels=1)


@pytest.mark.parametrize(
    "box",
    [(0, 0, 64, 64), (448, 384, 64, 64), (-30, -20, 100, 90), (450, 350, 200, 200), (10, 70, 1, 300), (-9, 600, 5, 5)],
)
def test_any_rectangle_is_cut_from_the_level_on_white(slide: Path, box: tuple[int, int, int, int]) -> None:
    reader = TurboReader(slide, StageClock())
    x, y, width, height = box
    canvas = np.pad(read_level(reader, 0), ((1000, 1000), (1000, 1000), (0, 0)), constant_values=255)
    pixels = reader.read(0, *box)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert np.array_equal(pixels, canvas[1000 + y : 1000 + y + height, 1000 + x : 1000 + x + width])


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
    assert most <= 2 * 8 * TILE * TILE * 3


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
                return cache.tile((0, 0), slow)
            except SlideError as error:
                return str(error)

        with cache.plan(0, np.array([4], np.int32)), ThreadPoolExecutor(4) as pool:
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
    with cache.plan(0, np.full(50, 2, np.int32)):
        for number in range(50):
            cache.tile((0, number), lambda: np.zeros(1000, np.uint8))
            cache.tile((1, number), lambda: np.zeros(1000, np.uint8))
        assert cache.held_bytes == 7000
    assert cache.held_bytes == 2000


def test_metadata_of_aperio(tmp_path: Path, pyramid: list[RGB]) -> None:
    path = write_slide(tmp_path / "a.svs", pyramid, description=APERIO)
    metadata = TurboReader(path, StageClock()).metadata
    assert (metadata.vendor, metadata.mpp, metadata.mpp_source) == ("aperio", (0.2527, 0.2527), "aperio MPP")
    assert metadata.objective == 40
    bare = write_slide(tmp_path / "b.svs", pyramid, description="Aperio Image Library|AppMag = x|MPP = ")
    metadata = TurboReader(bare, StageClock()).metadata
    assert (metadata.mpp, metadata.mpp_source, metadata.objective) == (None, None, None)


@pytest.mark.parametrize(
    ("resolution", "expected"),
    [
        (((40_000, 20_000), "centimeter"), (0.25, 0.5)),
        (((50_800, 50_800), "inch"), (0.5, 0.5)),
        (((40_000, 40_000), "none"), None),
        (None, None),
    ],
)
def test_metadata_of_generic_tiff(
    tmp_path: Path,
    pyramid: list[RGB],
    resolution: tuple[tuple[float, float], str] | None,
    expected: tuple[float, float] | None,
) -> None:
    path = write_slide(tmp_path / "a.tif", pyramid, resolution=resolution)
    metadata = TurboReader(path, StageClock()).metadata
    assert metadata.vendor == "generic-tiff"
    assert metadata.mpp == (None if expected is None else pytest.approx(expected))
    assert metadata.mpp_source == ("TIFF resolution" if expected else None)


def test_metadata_of_ome(tmp_path: Path, pyramid: list[RGB]) -> None:
    xml = (
        '<?xml version="1.0"?><OME><Image><Pixels SizeX="9" SizeY="9" PhysicalSizeX="7" PhysicalSizeY="7"/></Image>'
        '<Image><Pixels SizeX="501" SizeY="397" PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.26"/>'
        "</Image></OME>"
    )
    path = write_slide(tmp_path / "a.ome.tif", pyramid, description=xml, subifd=True)
    metadata = TurboReader(path, StageClock()).metadata
    assert (metadata.vendor, metadata.mpp_source) == ("ome-tiff", "OME PhysicalSizeX")
    assert metadata.mpp == pytest.approx((0.25, 0.26))


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
def test_damaged_tables_are_found_at_opening(
    tmp_path: Path, pyramid: list[RGB], code: int, values: list[int], message: str
) -> None:
    path = write_slide(tmp_path / "a.tif", pyramid)
    patch_tag(path, code, values)
    with pytest.raises(DamagedError, match=message) as caught:
        TurboReader(path, StageClock())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_tile_is_named_and_reaches_every_reader(tmp_path: Path, pyramid: list[RGB]) -> None:
    path = write_slide(tmp_path / "a.tif", pyramid)
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


def test_a_tile_cut_short_or_of_another_size_is_an_error(tmp_path: Path, pyramid: list[RGB]) -> None:
    path = write_slide(tmp_path / "a.tif", pyramid)
    patch_tag(path, 325, [700])
    with pytest.raises(SlideError, match="level 0, tile in column 0 of row 0"):
        TurboReader(path, StageClock()).read(0, 0, 0, 10, 10)
    path = write_slide(tmp_path / "b.tif", [paint(128, 128)])
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "lzw", "tile": (64, 64)}, "LZW"),
        ({"compression": "jpeg"}, "not tiled"),
        ({"tile": (64, 64)}, "uncompressed"),
        ({"compression": "jpeg", "tile": (64, 64), "software": "Philips DP v1.0"}, "Philips"),
        ({"compression": "jpeg", "tile": (64, 64), "description": "<scn>x</scn>"}, "Leica"),
        ({"compression": "jpeg", "tile": (64, 64), "extratags": [(65420, 4, 1, 7, True)]}, "Hamamatsu"),
        ({"compression": "jpeg", "tile": (64, 64), "extratags": [(700, 1, 8, b"<iScan/>", True)]}, "Ventana"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, paint(130, 90), photometric="rgb", metadata=None, **options)
    with pytest.raises(SlideError, match=message) as caught:
        TurboReader(path, StageClock())
    assert not isinstance(caught.value, DamagedError)


def test_a_pyramid_with_another_compression_below_is_refused(tmp_path: Path, pyramid: list[RGB]) -> None:
    path = write_slide(tmp_path / "a.tif", pyramid[:1])
    tifffile.imwrite(
        path, pyramid[1], append=True, tile=(64, 64), photometric="rgb", compression="lzw", subfiletype=1, metadata=None
    )
    with pytest.raises(SlideError, match="LZW at level 1"):
        TurboReader(path, StageClock())


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
    patch_tag(path, 347, [])
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


def test_real_slide_equals_openslide(shared_data: Path) -> None:
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    assert_like_openslide(path, levels=1)
    metadata = TurboReader(path, StageClock()).metadata
    assert (metadata.mpp, metadata.objective) == ((0.499, 0.499), 20)
    with openslide.OpenSlide(path) as oracle:
        pixels = np.asarray(oracle.read_region((2100, 2900), 0, (240, 240)))
    on_white = np.where(pixels[..., 3:] > 0, pixels[..., :3], 255)
    assert np.array_equal(TurboReader(path, StageClock()).read(0, 2100, 2900, 240, 240), on_white)


def test_truncated_real_slide_is_an_error_or_reads_equal(shared_data: Path, tmp_path: Path) -> None:
    whole = (shared_data / "slides" / "CMU-1-Small-Region.svs").read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(whole)
    expected = read_level(TurboReader(path, StageClock()), 0)
    refused = 0
    for percent in [*range(0, 100, 7), 99]:
        path.write_bytes(whole[: len(whole) * percent // 100])
        try:
            pixels = read_level(TurboReader(path, StageClock()), 0)
        except SlideError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert np.array_equal(pixels, expected)
    assert refused >= 12


def test_real_ome_tiff_equals_tifffile(shared_data: Path) -> None:
    path = shared_data / "slides" / "HE-region-no-mpp.tif"
    reader = TurboReader(path, StageClock())
    assert np.abs(read_level(reader, 0) - tifffile.imread(path)).max() <= 2


@pytest.mark.parametrize(
    ("name", "message"), [("fluorescence-DAPI.ndpi", "NDPI"), ("TCGA-CR-7395-jpeg2000-no-mpp.svs", "JPEG 2000")]
)
def test_real_slides_of_other_kinds_are_refused(shared_data: Path, name: str, message: str) -> None:
    with pytest.raises(SlideError, match=message):
        TurboReader(shared_data / "slides" / name, StageClock())
