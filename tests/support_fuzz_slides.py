"""Slides and JPEG tiles that mean harm."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from support import paint
from support_mutation import list_tags, pick, spoil_bytes, spoil_tags

from wsi_engine.tiffwriter import TiffLayout, write_pyramid

SIDE = 200, 150


def make_slides(folder: Path) -> list[tuple[str, bytes, list[tuple[int, int, str]]]]:
    """Small slides of every layout the engine reads: name, bytes, and places of the TIFF's tags."""
    layouts = {
        "shared.svs": TiffLayout(tile_px=64, levels=2),
        "plain.tif": TiffLayout(tile_px=32, share_tables=False, levels=1),
        "rgb.svs": TiffLayout(tile_px=64, levels=2, photometric="rgb"),
        "big.tif": TiffLayout(tile_px=64, bigtiff=True),
        "sub.tif": TiffLayout(tile_px=64, levels=2, pyramid="subifd"),
        "lzw.svs": TiffLayout(tile_px=64, compression="lzw"),
        "j2k.svs": TiffLayout(tile_px=64, compression="jpeg2000", levels=2),
        "raw.tif": TiffLayout(tile_px=64, compression="none"),
    }
    for name, layout in layouts.items():
        write_pyramid(folder / name, *SIDE, paint, mpp=0.25, layout=layout)
    pixels = paint(0, 0, *SIDE)
    tifffile.imwrite(folder / "strips.tif", pixels, photometric="rgb", rowsperstrip=32, compression="deflate")
    tifffile.imwrite(folder / "ome.ome.tif", pixels, photometric="rgb", tile=(64, 64), compression="jpeg",
                     metadata={"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25})  # fmt: skip
    tifffile.imwrite(folder / "palette.tif", pixels[..., 0], photometric="palette", colormap=np.zeros((3, 256), "u2"))
    Image.fromarray(pixels).save(folder / "picture.png")
    Image.fromarray(pixels).save(folder / "picture.jpg", progressive=True)
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        found.append((path.name, data, list_tags(data) if data[:2] in (b"II", b"MM") else []))
    return found


def spoil_slide(sound: Any, place: Path, rng: np.random.Generator) -> tuple[Path, str]:
    """A slide with wrong tags, a wrong header, or wrong tiles; and the reader to open it with."""
    name, data, tags = pick(rng, sound)
    if tags and rng.random() < 0.55:
        data = spoil_tags(data, tags, rng)
    else:
        data = spoil_bytes(data, rng, near=pick(rng, (8, 512, None, None)))
    path = place / name
    path.write_bytes(data)
    return path, pick(rng, ("auto", "auto", "turbo", "openslide", "tiffslide", "image"))


def read_slide(given: tuple[Path, str], place: Path) -> None:
    """Everything the engine does with a slide before and while it reads tiles."""
    from wsi_engine import open_slide

    path, reader = given
    with open_slide(path, mpp=0.5, reader=reader) as slide:
        assert slide.fingerprint
        assert slide.metadata.vendor
        width, height = slide.dimensions
        for x, y in ((0, 0), (width - 70, height - 70), (width // 2, height // 2), (-50, -50)):
            slide.read_region(x, y, 64, 64, mpp=0.5)
        for level in slide.levels:
            assert min(level.width, level.height) > 0
        slide.read_region(0, 0, 32, 32, mpp=2.0, exact=False)
        slide.backend.read(len(slide.levels) - 1, 0, 0, 80, 80)
        if width * height < 1 << 24:
            slide.read_overview(4.0)
    with open_slide(path, reader=reader) as slide:
        assert min(slide.mpp) > 0


def make_headers(folder: Path) -> list[bytes]:
    """JPEG streams, whole and abbreviated."""
    from wsi_engine.tilecodec import split_tables

    found = []
    for options in ({}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}):
        stream = io.BytesIO()
        Image.fromarray(paint(0, 0, 64, 64)).save(stream, "jpeg", **options)
        found.append(stream.getvalue())
    return [*found, *split_tables(found[0])]


def spoil_header(sound: list[bytes], place: Path, rng: np.random.Generator) -> bytes:
    """A JPEG stream with a changed header or body."""
    data = spoil_bytes(pick(rng, sound), rng, near=pick(rng, (30, 400, None)))
    return spoil_bytes(data, rng, near=400) if rng.random() < 0.5 else data


def read_header(given: bytes, place: Path) -> None:
    """A tile as the fast reader takes it: header made whole, then decoded by libjpeg-turbo."""
    from wsi_engine.errors import SlideError
    from wsi_engine.readers.jpeg import Colour, JpegError, TileHeaders, table_segments
    from wsi_engine.readers.turbo import _decompress

    with suppress(JpegError):
        table_segments(given)
    pixels = np.empty((64, 64, 3), np.uint8)
    try:
        start, whole = TileHeaders(b"", Colour.YCBCR, 64, 64).rewrite(given)
        _decompress(whole + given[len(start) :], pixels)
    except (JpegError, ValueError) as error:  # as the reader does
        raise SlideError("damaged") from error
