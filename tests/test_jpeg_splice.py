"""Headers of abbreviated JPEG tiles, completed for a decoder that knows nothing of TIFF."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray

from wsi_engine.readers.jpeg import Colour, JpegError, TileHeaders, table_segments

RGB = NDArray[np.uint8]
SOI, EOI = b"\xff\xd8", b"\xff\xd9"
JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"


def segments(jpeg: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    found, position = [], 2
    while not found or found[-1][0] != 0xDA:
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        found.append((jpeg[position + 1], jpeg[position:end]))
        position = end
    return found, jpeg[position:]


def abbreviate(jpeg: bytes) -> tuple[bytes, bytes]:
    """The tables as TIFF field 347 keeps them, and the stream without tables and application markers."""
    found, scan = segments(jpeg)
    tables = b"".join(data for marker, data in found if marker in (0xDB, 0xC4))
    rest = b"".join(data for marker, data in found if marker not in (0xDB, 0xC4) and marker < 0xE0)
    return SOI + tables + EOI, SOI + rest + scan


def complete(jpeg: bytes, tables: bytes | None, colour: Colour, width: int = 48, height: int = 32) -> bytes:
    old, new = TileHeaders(table_segments(tables), colour, width, height).rewrite(jpeg)
    assert jpeg.startswith(old)
    return new + jpeg[len(old) :]


@pytest.fixture(scope="module")
def picture() -> RGB:
    y, x = np.mgrid[:32, :48]
    return np.stack([x * 5, y * 7, 255 - x * 3], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def ycbcr(picture: RGB) -> bytes:
    return simplejpeg.encode_jpeg(picture, quality=90, colorsubsampling="420")


@pytest.fixture(scope="module")
def rgb(picture: RGB) -> bytes:
    return imagecodecs.jpeg8_encode(picture, level=95, colorspace="rgb", outcolorspace="rgb", subsampling="444")


def test_abbreviated_ycbcr_decodes_like_the_whole_stream(ycbcr: bytes) -> None:
    tables, stream = abbreviate(ycbcr)
    with pytest.raises(ValueError, match="table"):
        simplejpeg.decode_jpeg(stream)
    assert np.array_equal(simplejpeg.decode_jpeg(complete(stream, tables, Colour.YCBCR)), simplejpeg.decode_jpeg(ycbcr))


@pytest.mark.parametrize("number_from", [0, 1, None])
@pytest.mark.parametrize("before", [b"", JFIF])
def test_rgb_is_not_converted_whatever_the_markers_suggest(
    picture: RGB, rgb: bytes, number_from: int | None, before: bytes
) -> None:
    """Components numbered 1, 2, 3 and a JFIF marker both make a decoder think of YCbCr."""
    found, scan = segments(rgb)
    kept = []
    for marker, data in found:
        renamed = bytearray(data)
        if number_from is not None and marker == 0xC0:
            renamed[10:19:3] = bytes(range(number_from, number_from + 3))
        if number_from is not None and marker == 0xDA:
            renamed[5:11:2] = bytes(range(number_from, number_from + 3))
        if marker < 0xE0:
            kept.append(bytes(renamed))
    stream = SOI + before + b"".join(kept) + scan
    decoded = simplejpeg.decode_jpeg(complete(stream, None, Colour.RGB))
    assert np.abs(decoded.astype(int) - picture).max() <= 8


def test_ycbcr_is_converted_against_an_adobe_marker(picture: RGB, ycbcr: bytes) -> None:
    found, scan = segments(ycbcr)
    adobe_rgb = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
    misled = SOI + adobe_rgb + b"".join(data for marker, data in found if marker < 0xE0) + scan
    assert np.abs(simplejpeg.decode_jpeg(misled).astype(int) - picture).max() > 60
    decoded = simplejpeg.decode_jpeg(complete(misled, None, Colour.YCBCR))
    assert np.array_equal(decoded, simplejpeg.decode_jpeg(ycbcr))


def test_a_tile_may_bring_its_own_tables(ycbcr: bytes, picture: RGB) -> None:
    other_tables, _ = abbreviate(simplejpeg.encode_jpeg(picture, quality=20, colorsubsampling="420"))
    decoded = simplejpeg.decode_jpeg(complete(ycbcr, other_tables, Colour.YCBCR))
    assert np.array_equal(decoded, simplejpeg.decode_jpeg(ycbcr))


def test_grey_gets_no_adobe_marker(picture: RGB) -> None:
    grey = np.ascontiguousarray(picture[..., :1])
    stream = simplejpeg.encode_jpeg(grey, quality=95, colorspace="GRAY", colorsubsampling="GRAY")
    done = complete(stream, None, Colour.GREY)
    assert b"Adobe" not in done
    assert np.array_equal(simplejpeg.decode_jpeg(done), simplejpeg.decode_jpeg(stream))


def test_restart_interval_of_the_tables_does_not_reach_the_tile(ycbcr: bytes) -> None:
    """A decoder forgets it at the tile's start of image; only quantisation and Huffman tables last."""
    tables, _ = abbreviate(ycbcr)
    restart = b"\xff\xdd\x00\x04\x00\x07"
    assert table_segments(SOI + restart + tables[2:]) == tables[2:-2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda jpeg: b"", "not a JPEG"),
        (lambda jpeg: b"\x00" * 500, "not a JPEG"),
        (lambda jpeg: jpeg[:40], "cut short"),
        (lambda jpeg: jpeg[:2] + b"\x00\x00" + jpeg[2:], "damaged"),
        (lambda jpeg: SOI + b"\xff\xdb\x00\x01" + jpeg[2:], "cut short"),
        (lambda jpeg: SOI + EOI, "before its pixels"),
        (lambda jpeg: SOI + b"\xff\xff\xff", "cut short"),
    ],
)
def test_damage_is_told(ycbcr: bytes, damage: object, message: str) -> None:
    with pytest.raises(JpegError, match=message):
        complete(damage(ycbcr), None, Colour.YCBCR)  # type: ignore[operator]


def test_every_cut_of_the_header_is_told(ycbcr: bytes) -> None:
    found, scan = segments(ycbcr)
    header = len(ycbcr) - len(scan)
    assert len(found) > 5
    for length in range(header):
        with pytest.raises(JpegError):
            complete(ycbcr[:length], None, Colour.YCBCR)


@pytest.mark.parametrize(
    ("colour", "width", "height", "message"),
    [(Colour.YCBCR, 48, 33, "48×32"), (Colour.YCBCR, 32, 48, "48×32"), (Colour.GREY, 48, 32, "3 components")],
)
def test_a_frame_of_another_shape_is_told(ycbcr: bytes, colour: Colour, width: int, height: int, message: str) -> None:
    with pytest.raises(JpegError, match=message):
        complete(ycbcr, None, colour, width, height)


@pytest.mark.parametrize("tables", [b"\x00\x01\x02", SOI, SOI + b"\xff\xdb\x00\x43\x00"])
def test_unusable_tables_are_told(tables: bytes) -> None:
    with pytest.raises(JpegError):
        table_segments(tables)
