"""Plain test pictures of any size: one colour, ramps, marks at known places, and a real IHC picture made endless."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SettingsError
from wsi_engine.pyramid import Paint
from wsi_engine.readers.base import RGBImage
from wsi_engine.tiffwriter import TiffLayout, write_pyramid

_GROUND = 235
_MARK = 30
_JPEG = TiffLayout()
_LOSSLESS = TiffLayout(compression="lzw")


def paint_constant(colour: tuple[int, int, int]) -> Paint:
    """A painter of one colour."""

    def paint(x: int, y: int, width: int, height: int) -> RGBImage:
        return np.full((height, width, 3), colour, np.uint8)

    return paint


def paint_ramp(width: int, height: int) -> Paint:
    """A painter of linear ramps over a slide: red rises with x, green with y, blue with both, from 0 to 255."""

    def paint(x: int, y: int, w: int, h: int) -> RGBImage:
        across = np.clip((x + np.arange(w) + 0.5) / width, 0, 1)[None, :]
        down = np.clip((y + np.arange(h) + 0.5) / height, 0, 1)[:, None]
        bands = np.broadcast_arrays(across, down, (across + down) / 2)
        values: RGBImage = np.rint(255 * np.stack(bands, axis=-1)).astype(np.uint8)
        return values

    return paint


def paint_marks(mpp: float, positions_um: Sequence[tuple[float, float]], radius_um: float = 6.0) -> Paint:
    """A painter of dark discs on a light ground.

    Edge pixels are grey by the part that is covered, about, so that a disc's centre of mass is its position to a
    small part of a pixel. Positions are (x, y) in µm from the corner of level 0's first pixel.
    """
    centres = np.asarray(positions_um, np.float64).reshape(-1, 2) / mpp
    radius = radius_um / mpp

    def paint(x: int, y: int, width: int, height: int) -> RGBImage:
        cover = np.zeros((height, width))
        for cx, cy in centres - (x, y):
            x0, x1 = max(0, int(cx - radius - 2)), min(width, int(cx + radius + 3))
            y0, y1 = max(0, int(cy - radius - 2)), min(height, int(cy + radius + 3))
            if x0 < x1 and y0 < y1:
                far = np.hypot(np.arange(x0, x1) + 0.5 - cx, (np.arange(y0, y1) + 0.5 - cy)[:, None])
                part = cover[y0:y1, x0:x1]
                np.maximum(part, np.clip(radius - far + 0.5, 0, 1), out=part)
        grey = np.rint(_GROUND + (_MARK - _GROUND) * cover).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)

    return paint


def write_marks(
    path: str | os.PathLike[str],
    mpp: float,
    positions_um: Sequence[tuple[float, float]],
    *,
    radius_um: float = 6.0,
    margin_um: float = 40.0,
    layout: TiffLayout = _LOSSLESS,
) -> None:
    """Write a slide of dark discs at known places; it ends ``margin_um`` beyond the outermost.

    Raises:
        SettingsError: there are no positions, or the disc is smaller than a pixel.
        SlideError: the file cannot be written.

    """
    if not len(positions_um):
        raise SettingsError("a slide of marks needs at least one position")
    if not radius_um > mpp:
        raise SettingsError(f"marks of {radius_um} µm are smaller than a pixel of {mpp} µm: give a larger radius")
    width, height = (np.ceil((np.max(positions_um, axis=0) + margin_um) / mpp)).astype(int)
    write_pyramid(path, int(width), int(height), paint_marks(mpp, positions_um, radius_um), mpp=mpp, layout=layout)


def paint_ihc(width: int, height: int, seed: int = 0) -> Paint:
    """A painter that grows scikit-image's immunohistochemistry picture (H-DAB, 512 x 512) to any size.

    Along each axis the picture is walked to and fro between turning points that the seed chooses near its edges, so
    there is no seam and no fixed period.
    """
    from skimage.data import immunohistochemistry  # noqa: PLC0415

    picture: RGBImage = immunohistochemistry()  # type: ignore[no-untyped-call]
    columns = _walk(width, picture.shape[1], np.random.default_rng([seed, 0]))
    rows = _walk(height, picture.shape[0], np.random.default_rng([seed, 1]))

    def paint(x: int, y: int, w: int, h: int) -> RGBImage:
        return np.ascontiguousarray(picture[rows[y : y + h, None], columns[None, x : x + w]])

    return paint


def _walk(length: int, size: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """``length`` neighbouring indices into ``size`` that turn back at random points near both ends."""
    legs: list[NDArray[np.intp]] = []
    place, done, forward = int(rng.integers(size // 2)), 0, True
    while done < length:
        turn = int(rng.integers(3 * size // 4, size)) if forward else int(rng.integers(size // 4))
        leg = np.arange(place, turn) if forward else np.arange(place, turn, -1)
        legs.append(leg)
        place, done, forward = turn, done + len(leg), not forward
    return np.concatenate(legs)[:length]


def write_ihc_slide(
    path: str | os.PathLike[str],
    width: int,
    height: int,
    mpp: float = 0.25,
    layout: TiffLayout = _JPEG,
    seed: int = 0,
) -> None:
    """Write a slide of real texture: scikit-image's immunohistochemistry picture grown by :func:`paint_ihc`.

    Raises:
        SettingsError: the layout cannot hold a slide of this size.
        SlideError: the file cannot be written.

    """
    write_pyramid(path, width, height, paint_ihc(width, height, seed), mpp=mpp, layout=layout)
