"""Reads PNG, JPEG and plain TIFF pictures and NumPy arrays, whole, as slides of one level."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from wsi_engine.clock import StageClock
from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.readers import magic
from wsi_engine.readers.base import Level, Metadata, RGBImage
from wsi_engine.readers.window import check_window, white_image

MAX_PIXELS = 1 << 30
"""Largest picture that is taken into memory (3 GiB as RGB)."""

_CONVERT = "convert the picture to 8 bits per channel"


class ImageReader:
    """Reads a picture that fits in memory.

    Transparent pixels are put on white; grey becomes RGB. The orientation that a camera notes in EXIF is
    ignored: pixels come as they are stored. PNG and JPEG never give a scale, because photo software writes
    72 or 300 dpi whatever was photographed; a TIFF gives that of its OME or ImageJ description or of its
    resolution tags.

    Args:
        source: path of a PNG, JPEG or TIFF file, or an array, uint8, (H, W, 3), (H, W) or (H, W, 4).
        clock: where the seconds of reading go, all under "decode".

    Raises:
        SlideError: the file is no such picture, is damaged, or is larger than :data:`MAX_PIXELS`.
        SettingsError: the array has another shape or dtype.
    """

    name = "image"

    def __init__(self, source: str | os.PathLike[str] | NDArray[np.uint8], clock: StageClock | None = None) -> None:
        self.clock = StageClock() if clock is None else clock
        self._metadata = Metadata(vendor="image")
        with self.clock.measure("decode"):
            if isinstance(source, np.ndarray):
                self._where, pixels = "the array", _check_array(source)
            else:
                self._where = os.fspath(source)
                pixels, self._metadata = _load_file(self._where)
            self._pixels: RGBImage | None = to_rgb(pixels)
        height, width = pixels.shape[:2]
        self._levels = (Level(width, height, 1.0),)

    @property
    def levels(self) -> tuple[Level, ...]:
        """The one level."""
        return self._levels

    @property
    def metadata(self) -> Metadata:
        """What the file says about itself."""
        return self._metadata

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGBImage:
        """Pixels of a rectangle: uint8 (height, width, 3), white outside the picture.

        Raises:
            SlideError: the reader is closed or there is no such level.
            SettingsError: width or height is less than 1.
        """
        inside = check_window(self._levels, level, x, y, width, height)
        pixels = self._pixels
        if pixels is None:
            raise SlideError(f"cannot read {self._where}: it was closed; open it again")
        with self.clock.measure("decode"):
            part = pixels[inside.top : max(inside.top, inside.bottom), inside.left : max(inside.left, inside.right)]
            if part.shape[:2] == (height, width):
                return part.copy()
            image = white_image(width, height)
            if not inside.empty:
                image[inside.top - y : inside.bottom - y, inside.left - x : inside.right - x] = part
            return image

    def expect(self, level: int, boxes: NDArray[np.int64]) -> AbstractContextManager[None]:
        """Do nothing: the picture is in memory."""
        return nullcontext()

    def close(self) -> None:
        """Give the picture's memory back; later reads raise SlideError."""
        self._pixels = None


def _check_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    shapes = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in {3, 4})
    if array.dtype != np.uint8 or not shapes or not array.size:
        raise SettingsError(
            f"an array of {array.dtype} {array.shape} is no picture; pass uint8 of shape (height, width, 3), "
            "(height, width) or (height, width, 4), values 0 to 255"
        )
    return array


def to_rgb(pixels: NDArray[np.uint8]) -> RGBImage:
    """Return (H, W, 3) from grey (H, W), RGB, or RGBA, the last composited on white."""
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape[2] == 3:
        return np.ascontiguousarray(pixels)
    image = np.empty((*pixels.shape[:2], 3), np.uint8)
    for row, source in zip(image, pixels, strict=True):  # by row, or a large picture would be in memory five times
        alpha = source[:, 3:].astype(np.uint32)
        row[:] = (source[:, :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return image


def _load_file(path: str) -> tuple[NDArray[np.uint8], Metadata]:
    """Return the pixels (H, W), (H, W, 3) or (H, W, 4) and the metadata of a picture file."""
    try:
        with open(path, "rb") as file:
            head = file.read(32)
        if head.startswith(magic.PNG):
            return _load_png(path, head), Metadata(vendor="image")
        if head.startswith(magic.JPEG):
            return _load_jpeg(path), Metadata(vendor="image")
        if head.startswith(magic.TIFF):
            return _load_tiff(path)
    except SlideError:
        raise
    except OSError as error:
        raise SlideError(f"cannot read {path}: {_one_line(error)}; check that the file is complete") from error
    except Exception as error:  # decoders raise errors of many kinds on broken files
        raise SlideError(f"cannot read {path}: the picture is damaged ({_one_line(error)})") from error
    raise SlideError(f"cannot read {path}: it is no PNG, JPEG or TIFF picture")


# The classes of one format are used instead of PIL.Image.open, whose guard against large pictures prints a
# warning above 89 million pixels and can be moved only for the whole process.


def _load_png(path: str, head: bytes) -> NDArray[np.uint8]:
    from PIL.PngImagePlugin import PngImageFile  # noqa: PLC0415

    if len(head) > 24 and head[24] > 8:  # the bit depth in the header; Pillow would drop the low byte silently
        raise SlideError(f"cannot read {path}: it stores {head[24]} bits per channel; {_CONVERT}")
    with PngImageFile(path) as picture:
        _check_size(path, *picture.size)
        clear = "A" in picture.mode or "transparency" in picture.info
        return np.asarray(picture.convert("RGBA" if clear else "RGB"))


def _load_jpeg(path: str) -> NDArray[np.uint8]:
    from PIL.JpegImagePlugin import JpegImageFile  # noqa: PLC0415

    with JpegImageFile(path) as picture:
        _check_size(path, *picture.size)
        return np.asarray(picture.convert("RGB"))


def _load_tiff(path: str) -> tuple[NDArray[np.uint8], Metadata]:
    from tifffile import PHOTOMETRIC, TiffFile, TiffPage  # noqa: PLC0415

    from wsi_engine.readers.tables import check_tiff  # noqa: PLC0415

    with TiffFile(path) as tiff:
        check_tiff(tiff, path)
        page = tiff.pages.first
        _check_size(path, page.imagewidth, page.imagelength)
        if page.dtype is None or page.dtype not in (np.uint8, np.bool_):
            raise SlideError(f"cannot read {path}: it stores {page.dtype} values; {_CONVERT}")
        pixels: NDArray[Any] = page.asarray()
        if page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, -1)
        if page.dtype == np.bool_:
            pixels = pixels.astype(np.uint8) * 255
        if page.photometric == PHOTOMETRIC.MINISWHITE:
            pixels = 255 - pixels
        elif page.photometric == PHOTOMETRIC.PALETTE and page.colormap is not None:
            pixels = (np.moveaxis(page.colormap, 0, -1)[pixels] >> 8).astype(np.uint8)
        elif page.photometric not in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR):
            kind = getattr(page.photometric, "name", page.photometric)
            raise SlideError(f"cannot read {path}: its colours are stored as {kind}; save it as RGB")
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[..., 0]
        if pixels.ndim not in {2, 3} or (pixels.ndim == 3 and pixels.shape[2] not in {3, 4}):
            raise SlideError(f"cannot read {path}: its pixels are {pixels.shape}, not grey, RGB or RGBA")
        assert isinstance(page, TiffPage)
        mpp, source = _tiff_scale(tiff, page)
        return pixels, Metadata(vendor="image", mpp=mpp, mpp_source=source)


def _tiff_scale(tiff: Any, page: Any) -> tuple[tuple[float, float] | None, str | None]:
    """Return micrometres per pixel (x, y) and where they were found, unchecked."""
    found = _ome_scale(tiff.ome_metadata) if tiff.is_ome else None
    if found:
        return found, "OME PhysicalSizeX"
    across, down = page.get_resolution()
    if not (across > 0 and down > 0) or (across, down) == (1, 1):  # 1 / 1: what writers put who know none
        return None, None
    if tiff.is_imagej and (tiff.imagej_metadata or {}).get("unit") in {"micron", "um", "µm", "\\u00B5m"}:
        return (1 / across, 1 / down), "ImageJ unit"
    unit = {2: 25_400.0, 3: 10_000.0}.get(int(page.resolutionunit))  # micrometres in an inch, in a centimetre
    return ((unit / across, unit / down), "TIFF resolution") if unit else (None, None)


def _ome_scale(text: str | None) -> tuple[float, float] | None:
    try:
        root = ElementTree.fromstring(text or "")
    except ElementTree.ParseError:
        return None
    pixels = root.find(".//{*}Pixels")
    if pixels is None or any(pixels.get(f"PhysicalSize{axis}Unit", "µm") != "µm" for axis in "XY"):
        return None
    try:
        return float(pixels.attrib["PhysicalSizeX"]), float(pixels.attrib["PhysicalSizeY"])
    except (KeyError, ValueError):
        return None


def _check_size(path: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SlideError(
            f"cannot read {path} as a picture: {width} x {height} pixels do not fit in memory; "
            "convert it to a tiled, pyramidal TIFF"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
