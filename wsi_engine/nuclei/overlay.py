"""A picture to judge a segmentation by: the slide with its nuclei, and the most crowded place at full resolution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsi_engine.errors import SettingsError
from wsi_engine.nuclei.instances import InstanceSet
from wsi_engine.picture import draw_scale_bar
from wsi_engine.readers.base import RGBImage
from wsi_engine.slide import Slide

OUTLINE = (0, 210, 60)
"""Of nuclei."""

FRAME = (220, 30, 30)
"""Around the place that is shown at full resolution."""

INSET_PX = 800
"""Side of the picture at full resolution."""

_CELL_UM = 100.0
_FINE_MPP = 1.5
"""Up to this scale the overview shows outlines, beyond it a dot for each nucleus."""

_DOT_SHARE = 0.7
_GAP_PX = 12


def draw_nuclei(slide: Slide, nuclei: InstanceSet, long_side: int = 1600) -> RGBImage:
    """Draw a slide with its nuclei, and beside it the most crowded place at the method's resolution.

    Args:
        slide: an open slide.
        nuclei: its nuclei.
        long_side: pixels along the longer side of the slide's picture.

    Returns:
        uint8 (H, W, 3).

    Raises:
        SettingsError: ``long_side`` is below 16.
        SlideError: the slide cannot be read.
    """
    if long_side < 16:
        raise SettingsError(f"a picture's long side must be at least 16 pixels, not {long_side}")
    extent = max(n * m for n, m in zip(slide.dimensions, slide.mpp, strict=True))
    mpp = max(extent / long_side, nuclei.record.method_mpp)
    picture = Image.fromarray(slide.read_overview(mpp))
    per_px = mpp / slide.mpp[0], mpp / slide.mpp[1]
    if mpp <= _FINE_MPP:
        _draw_outlines(picture, nuclei, np.arange(len(nuclei)), (0.0, 0.0), per_px, 1)
    else:
        picture = _draw_dots(picture, nuclei, per_px)
    draw_scale_bar(picture, mpp)
    if not len(nuclei):
        return np.asarray(picture)
    inset, corner, side = _draw_inset(slide, nuclei)
    left, top = (c / p for c, p in zip(corner, per_px, strict=True))
    box = (left, top, left + side[0] / per_px[0], top + side[1] / per_px[1])
    ImageDraw.Draw(picture).rectangle(box, outline=FRAME, width=3)
    return _put_beside(picture, inset)


def find_crowded(nuclei: InstanceSet, side: tuple[float, float]) -> tuple[int, int]:
    """Corner, in level-0 pixels, of a rectangle of ``side`` around the cell of 100 µm with the most nuclei.

    The rectangle is moved into the slide. The first such cell in rows from the top is taken.
    """
    cell = np.array([_CELL_UM / m for m in nuclei.record.mpp])
    places = (nuclei.centroid // cell).astype(np.int64)
    across = int(places[:, 0].max()) + 1
    best = int(np.bincount(places[:, 1] * across + places[:, 0]).argmax())
    centre = (np.array([best % across, best // across]) + 0.5) * cell
    limit = np.maximum(np.array(nuclei.record.dimensions) - side, 0)
    x, y = np.clip(centre - np.array(side) / 2, 0, limit).astype(int)
    return int(x), int(y)


def _draw_inset(slide: Slide, nuclei: InstanceSet) -> tuple[Image.Image, tuple[int, int], tuple[float, float]]:
    """The most crowded place with outlines, its corner and its size in level-0 pixels."""
    mpp = nuclei.record.method_mpp
    per_px = mpp / slide.mpp[0], mpp / slide.mpp[1]
    width, height = (max(1, min(INSET_PX, int(n / p))) for n, p in zip(slide.dimensions, per_px, strict=True))
    side = width * per_px[0], height * per_px[1]
    corner = find_crowded(nuclei, side)
    picture = Image.fromarray(slide.read_region(*corner, width, height, mpp))
    reach = 60 / min(slide.mpp)  # no nucleus is longer than 60 µm
    near = (nuclei.centroid > np.array(corner) - reach) & (nuclei.centroid < np.array(corner) + side + reach)
    _draw_outlines(picture, nuclei, np.flatnonzero(near.all(axis=1)), corner, per_px, 2)
    draw_scale_bar(picture, mpp)
    return picture, corner, side


def _draw_outlines(
    picture: Image.Image,
    nuclei: InstanceSet,
    chosen: NDArray[np.int64],
    corner: tuple[float, float],
    per_px: tuple[float, float],
    width: int,
) -> None:
    pen = ImageDraw.Draw(picture)
    for k in chosen.tolist():
        ring = (nuclei.contour(k) - corner) / per_px
        pen.line([*map(tuple, ring.tolist()), tuple(ring[0].tolist())], fill=OUTLINE, width=width)


def _draw_dots(picture: Image.Image, nuclei: InstanceSet, per_px: tuple[float, float]) -> Image.Image:
    """The picture with the pixel under each centroid coloured."""
    pixels = np.array(picture)
    columns, rows = (nuclei.centroid / per_px).astype(np.int64).T
    marked = np.zeros(pixels.shape[:2], bool)
    marked[np.minimum(rows, len(pixels) - 1), np.minimum(columns, pixels.shape[1] - 1)] = True
    pixels[marked] = np.rint(pixels[marked] * (1 - _DOT_SHARE) + np.array(OUTLINE) * _DOT_SHARE).astype(np.uint8)
    return Image.fromarray(pixels)


def _put_beside(picture: Image.Image, inset: Image.Image) -> RGBImage:
    width, height = picture.width + _GAP_PX + inset.width, max(picture.height, inset.height)
    page = Image.new("RGB", (width, height), (255, 255, 255))
    page.paste(picture, (0, 0))
    page.paste(inset, (picture.width + _GAP_PX, 0))
    ImageDraw.Draw(page).rectangle((picture.width + _GAP_PX, 0, width - 1, inset.height - 1), outline=FRAME, width=3)
    return np.asarray(page)
