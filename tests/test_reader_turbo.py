"""The turbo reader against OpenSlide, on slides of every kind that it takes."""

from __future__ import annotations

from collections.abc import Collection
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
from wsi_engine.readers.turbo import TurboReader
from wsi_engine.synthetic import paint_ihc
from wsi_engine.tiffwriter import TiffLayout, write_pyramid

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
    while True:
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


def test_real_slide_equals_openslide(shared_data: Path) -> None:
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    assert_like_openslide(path, levels=1)
    metadata = TurboReader(path, StageClock()).metadata
    assert (metadata.mpp, metadata.objective) == ((0.499, 0.499), 20)
    with openslide.OpenSlide(path) as oracle:
        pixels = np.asarray(oracle.read_region((2100, 2900), 0, (240, 240)))
    on_white = np.where(pixels[..., 3:] > 0, pixels[..., :3], 255)
    assert np.array_equal(TurboReader(path, StageClock()).read(0, 2100, 2900, 240, 240), on_white)


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


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize("photometric", ["ycbcr", "rgb"])
def test_reduced_decoding_shrinks_the_level(tmp_path: Path, reduce: int, photometric: str) -> None:
    layout = TiffLayout(tile_px=240, photometric=photometric, quality=90, levels=1)
    write_pyramid(tmp_path / "a.svs", 1003, 807, paint_ihc(1003, 807), mpp=0.25, layout=layout)
    reader = TurboReader(tmp_path / "a.svs")
    assert reader.reductions == (1, 2, 4, 8)
    width, height = 1003 // reduce, 807 // reduce
    small = reader.read(0, 0, 0, width, height, reduce).astype(float)
    full = reader.read(0, 0, 0, width * reduce, height * reduce).astype(float)
    boxes = full.reshape(height, reduce, width, reduce, 3).mean(axis=(1, 3))
    assert 10 * np.log10(255**2 / np.mean((small - boxes) ** 2)) > 33
    x, y = 700 // reduce, 500 // reduce
    assert np.array_equal(reader.read(0, x, y, 30, 20, reduce), small[y : y + 20, x : x + 30].astype(np.uint8))
    outside = reader.read(0, width - 10, height - 5, 20, 20, reduce)
    assert np.array_equal(outside[:5, :10], small[-5:, -10:].astype(np.uint8))
    assert (outside[5:] == 255).all()
    assert (outside[:, 10:] == 255).all()


def test_reduced_tiles_are_decoded_once(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.svs", 1024, 1024, paint_ihc(1024, 1024), mpp=0.25, layout=TiffLayout(levels=1))
    reader = TurboReader(tmp_path / "a.svs")
    boxes = np.array([(x, y, 100, 100) for y in range(0, 400, 50) for x in range(0, 400, 50)])
    with reader.expect(0, boxes, 2):
        for box in boxes:
            reader.read(0, *(int(v) for v in box), 2)
    assert reader.tiles_decoded == 16


def test_reductions_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.svs", 300, 300, paint_ihc(300, 300), mpp=0.25)
    with pytest.raises(SettingsError, match="1, 2, 4, 8, not 3"):
        TurboReader(tmp_path / "a.svs").read(0, 0, 0, 10, 10, 3)


def test_missing_tiles_are_filled_at_a_reduction(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    write_pyramid(path, 1024, 1024, paint_ihc(1024, 1024), mpp=0.25, layout=TiffLayout(levels=2))
    whole = TurboReader(path).read(1, 0, 0, 256, 256, 2).astype(float)
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[2].tags["TileByteCounts"]
    with path.open("r+b") as file:
        file.seek(tag.valueoffset)
        file.write(bytes(4 * 4 if tag.dtype == 4 else 4 * 2))
    filled = TurboReader(path).read(1, 0, 0, 256, 256, 2).astype(float)
    assert 10 * np.log10(255**2 / np.mean((filled - whole) ** 2)) > 28
