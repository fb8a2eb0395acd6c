"""Write tiled pyramidal TIFFs of any size in bounded memory, laid out as slide scanners do."""

from __future__ import annotations

import itertools
import math
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tifffile

from wsi_engine import tilecodec
from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.pyramid import Paint, Pyramid
from wsi_engine.readers.base import RGBImage
from wsi_engine.tilecodec import TileCodec

_CLASSIC_LIMIT = 2**32 - 2**24
_SMALLEST_SIDE = 512
_LIBRARY = "Aperio Image Library v12.0.0"
_CODEC_NAMES = {"jpeg": "JPEG/{colour} Q={quality}", "jpeg2000": "J2K/KDU Q={quality}", "lzw": "LZW", "none": "RAW"}


@dataclass(frozen=True)
class TiffLayout:
    """How a pyramidal TIFF is laid out.

    Attributes:
        tile_px: side of a tile, a multiple of 16.
        compression: ``"jpeg"``, ``"jpeg2000"`` (33003 for YCbCr, 33005 for RGB), ``"lzw"`` or ``"none"``.
        photometric: colours inside JPEG and JPEG 2000 tiles: ``"ycbcr"`` (JPEG 4:2:0) or ``"rgb"`` (no transform,
            no Adobe marker). LZW and plain tiles are always RGB.
        quality: 1 to 100. JPEG 2000 is lossless at 100, else coded to 20 + quality/4 dB.
        levels: number of levels; None adds levels while the smaller side is 512 px or more.
        level_step: size of a level over the size of the next: 2, 4, 8 or 16.
        pyramid: ``"flat"``, one directory per level as Aperio, or ``"subifd"``, levels inside the first directory.
        bigtiff: 64-bit offsets; None takes them when the uncompressed pyramid could pass 4 GB.
        share_tables: JPEG tables stand once in tag 347 instead of in each tile.

    """

    tile_px: int = 256
    compression: Literal["jpeg", "jpeg2000", "lzw", "none"] = "jpeg"
    photometric: Literal["ycbcr", "rgb"] = "ycbcr"
    quality: int = 85
    levels: int | None = None
    level_step: int = 2
    pyramid: Literal["flat", "subifd"] = "flat"
    bigtiff: bool | None = None
    share_tables: bool = True

    def __post_init__(self) -> None:
        if self.tile_px < 16 or self.tile_px % 16:
            raise SettingsError(f"tile_px is {self.tile_px}: give a multiple of 16")
        if self.compression not in _CODEC_NAMES:
            raise SettingsError(f"compression is {self.compression!r}: give one of {', '.join(_CODEC_NAMES)}")
        if self.photometric not in {"ycbcr", "rgb"}:
            raise SettingsError(f"photometric is {self.photometric!r}: give 'ycbcr' or 'rgb'")
        if not 1 <= self.quality <= 100:
            raise SettingsError(f"quality is {self.quality}: give a number from 1 to 100")
        if self.levels is not None and self.levels < 1:
            raise SettingsError(f"levels is {self.levels}: give 1 or more, or None")
        if self.level_step not in {2, 4, 8, 16}:
            raise SettingsError(f"level_step is {self.level_step}: give 2, 4, 8 or 16")
        if self.pyramid not in {"flat", "subifd"}:
            raise SettingsError(f"pyramid is {self.pyramid!r}: give 'flat' or 'subifd'")

    def codec(self) -> TileCodec:
        """The codec that compresses the tiles of this layout."""
        ycbcr = self.photometric == "ycbcr"
        if self.compression == "jpeg":
            return tilecodec.jpeg_codec(self.tile_px, self.quality, ycbcr, self.share_tables)
        if self.compression == "jpeg2000":
            tag = tilecodec.COMPRESSION_APERIO_JPEG2000_YCBCR if ycbcr else tilecodec.COMPRESSION_APERIO_JPEG2000_RGB
            colours = tilecodec.PHOTOMETRIC_YCBCR if ycbcr else tilecodec.PHOTOMETRIC_RGB
            return TileCodec(tag, colours, self.quality)
        tag = tilecodec.COMPRESSION_LZW if self.compression == "lzw" else tilecodec.COMPRESSION_NONE
        return TileCodec(tag, tilecodec.PHOTOMETRIC_RGB, self.quality)

    def level_sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        """(width, height) of each level; sizes are rounded down, as scanners do.

        Raises:
            SettingsError: a level would have no pixels.

        """
        sizes = [(width, height)]
        while len(sizes) < self.levels if self.levels is not None else min(sizes[-1]) >= _SMALLEST_SIDE:
            sizes.append((sizes[-1][0] // self.level_step, sizes[-1][1] // self.level_step))
        if min(sizes[-1]) < 1:
            raise SettingsError(f"a slide of {width} x {height} px has no {len(sizes)} levels: ask for fewer")
        return sizes


def write_pyramid(
    path: str | os.PathLike[str],
    width: int,
    height: int,
    paint: Paint,
    *,
    mpp: float,
    layout: TiffLayout = TiffLayout(),
    description: str | None = None,
    objective: float | None = None,
    workers: int = 2,
) -> None:
    """Write a tiled pyramidal TIFF whose level-0 pixels come from ``paint``.

    ``paint`` is called once for each rectangle, from up to ``workers`` threads at once. The file appears
    under its name only when it is complete, and the same input gives the same bytes.

    Args:
        path: the file to write; ``.svs`` or ``.tif``.
        width: level-0 pixels.
        height: level-0 pixels.
        paint: gives uint8 (h, w, 3) for (x, y, w, h) in level-0 pixels.
        mpp: micrometres per level-0 pixel, kept exactly in the description and in the resolution tags.
        layout: tiles, compression and pyramid.
        description: text of the first directory; None writes one as Aperio does when the pyramid is flat.
        objective: power named in the description, by default 10 / mpp; for display only.
        workers: threads that paint and compress.

    Raises:
        SettingsError: a size or the layout cannot be written, or ``paint`` gives the wrong shape.
        SlideError: the file cannot be written.

    """
    path = Path(path)
    if width < 1 or height < 1:
        raise SettingsError(f"the slide {path.name} would be {width} x {height} px: give sizes of 1 or more")
    if not (math.isfinite(mpp) and mpp > 0):
        raise SettingsError(f"the slide {path.name} would have {mpp} µm per pixel: give a number above 0")
    if workers < 1:
        raise SettingsError(f"workers is {workers}: give 1 or more")
    sizes = layout.level_sizes(width, height)
    texts = _descriptions(sizes, mpp, layout, description, objective)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        pyramid = Pyramid(
            sizes,
            paint,
            codec=layout.codec(),
            tile_px=layout.tile_px,
            step=layout.level_step,
            workers=workers,
            temp=path.parent,
        )
        with closing(pyramid):
            _write_file(partial, pyramid, layout, mpp, texts)
        os.replace(partial, path)
    except OSError as error:
        raise SlideError(f"the slide {path} cannot be written: {error.strerror or error}; check the folder") from error
    finally:
        partial.unlink(missing_ok=True)


def _write_file(partial: Path, pyramid: Pyramid, layout: TiffLayout, mpp: float, texts: list[str]) -> None:
    """Write the directories in the order in which scanners and viewers expect them."""
    sizes = pyramid.sizes
    # LZW can make noise longer than it was: leave room.
    bigtiff = 3 * sum(w * h for w, h in sizes) * 3 // 2 > _CLASSIC_LIMIT if layout.bigtiff is None else layout.bigtiff
    aperio = layout.pyramid == "flat" and texts[0].startswith("Aperio")
    tiles = _limit(pyramid.level0_tiles(), *(level.tiles for level in pyramid.levels), bigtiff=bigtiff)
    codec = pyramid.codec
    jpeg = codec.compression == tilecodec.COMPRESSION_JPEG
    ycbcr = codec.photometric == tilecodec.PHOTOMETRIC_YCBCR
    with tifffile.TiffWriter(partial, bigtiff=bigtiff) as writer:
        for index, ((width, height), text) in enumerate(zip(sizes, texts, strict=True)):
            writer.write(
                itertools.islice(tiles, math.ceil(width / layout.tile_px) * math.ceil(height / layout.tile_px)),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(layout.tile_px, layout.tile_px),
                photometric="ycbcr" if ycbcr and not jpeg else "rgb",
                compression=codec.compression,
                compressionargs={"outcolorspace": codec.photometric} if jpeg else None,
                predictor=codec.compression == tilecodec.COMPRESSION_LZW,
                jpegtables=codec.tables,
                subsampling=((2, 2) if ycbcr else (1, 1)) if jpeg else None,
                subfiletype=0 if index == 0 or aperio else 1,
                subifds=len(sizes) - 1 if index == 0 and layout.pyramid == "subifd" else None,
                resolution=(1e4 / (mpp * layout.level_step**index),) * 2,
                resolutionunit="CENTIMETER",
                description=text.encode(),
                software="wsi-engine",
                metadata=None,
            )
            if index == 0 and aperio:  # readers of Aperio files take the second directory for the thumbnail
                _write_thumbnail(writer, pyramid.thumbnail, f"{width}x{height}")


def _write_thumbnail(writer: tifffile.TiffWriter, image: RGBImage, of_size: str) -> None:
    writer.write(
        image,
        photometric="rgb",
        compression="jpeg",
        description=f"{_LIBRARY}\r\n{of_size} -> {image.shape[1]}x{image.shape[0]} - ",
        software="wsi-engine",
        metadata=None,
    )


def _limit(first: Iterator[bytes], *others: Callable[[], Iterator[bytes]], bigtiff: bool) -> Iterator[bytes]:
    """Pass on the tiles of all levels, and stop before 32-bit offsets run out."""
    written = 0
    for tile in itertools.chain(first, itertools.chain.from_iterable(source() for source in others)):
        written += len(tile)
        if written > _CLASSIC_LIMIT and not bigtiff:
            raise SettingsError("the slide passes 4 GB, more than a classic TIFF can hold: use bigtiff=True")
        yield tile


def _descriptions(
    sizes: list[tuple[int, int]], mpp: float, layout: TiffLayout, description: str | None, objective: float | None
) -> list[str]:
    """Text of each level's directory; ``mpp`` is written with all its digits."""
    colour = {"ycbcr": "YCC", "rgb": "RGB"}[layout.photometric]
    codec = _CODEC_NAMES[layout.compression].format(colour=colour, quality=layout.quality)
    full = f"{sizes[0][0]}x{sizes[0][1]}"
    tile = f"({layout.tile_px}x{layout.tile_px})"
    power = f"{10 / mpp if objective is None else objective:.3g}"
    scale = f"AppMag = {power}|MPP = {np.format_float_positional(mpp, min_digits=4)}"
    if layout.pyramid == "subifd":
        texts = [f"wsi-engine|{scale}", *(f"{full} -> {w}x{h}" for w, h in sizes[1:])]
    else:
        texts = [f"{_LIBRARY}\r\n{full} [0,0 {full}] {tile} {codec}|{scale}"]
        texts += [f"{_LIBRARY}\r\n{full} [0,0 {full}] {tile} -> {w}x{h} {codec}" for w, h in sizes[1:]]
    return texts if description is None else [description, *texts[1:]]
