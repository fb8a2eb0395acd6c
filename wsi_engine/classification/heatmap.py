"""Where a model looks: attention as ranks, drawn over the slide, and as tiles for QuPath.

Attention weights of one slide span orders of magnitude, so what is drawn is each tile's percentile among the slide's
tiles, as in CLAM (Lu et al., Nature BME 2021, Methods, "interpretability").
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.grid import TileGrid
from wsi_engine.picture import draw_scale_bar
from wsi_engine.readers.base import RGBImage
from wsi_engine.slide import Slide
from wsi_engine.slide_record import SlideRecord
from wsi_engine.tissue import TissueMask

OPACITY = 0.55
"""Of the colours over the slide: tissue stays visible under them."""

_VIRIDIS = ((68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
            (110, 206, 88), (181, 222, 43), (253, 231, 37))  # fmt: skip
"""The colour map viridis at even steps: even to the eye, and ordered by brightness for the colour-blind."""

QUARTERS = ("lowest quarter", "lower quarter", "upper quarter", "highest quarter")
"""Names of the four classes that tiles for QuPath have."""

_TISSUE_GREY = 205
_FOOTER = 62
_LEAST_WIDTH = 520


@dataclass(frozen=True)
class HeatmapText:
    """What is written under a heatmap: which slide, and what was predicted."""

    title: str
    low: str = "low attention"
    high: str = "high attention"


def rank_percentiles(values: ArrayLike) -> NDArray[np.float64]:
    """Percentile rank of each value among all: (N,) to float64 (N,) within 0–1.

    (number below + half the number equal) / N, itself included: ties share their mean rank, all equal gives 0.5
    (``scipy.stats.percentileofscore`` with kind "mean").

    Raises:
        SettingsError: the values are not finite numbers in one row.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise SettingsError(f"ranks are of finite numbers in one row, not of shape {array.shape} or with NaN")
    _, place, counts = np.unique(array, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = ((np.cumsum(counts) - counts / 2) / max(1, len(array)))[place]
    return ranks


def average_tiles(
    grid: TileGrid, values: NDArray[np.float64], size: tuple[int, int], per_px: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Tiles laid into a raster, averaged where they overlap.

    Args:
        grid: N tiles.
        values: float (N,).
        size: width and height of the raster.
        per_px: level-0 pixels per pixel of the raster, x and y.

    Returns:
        float64 (H, W), 0 where there is no tile, and bool (H, W), where there is one. A tile covers at least one pixel.
    """
    width, height = size
    low = np.rint(grid.origins / per_px).astype(np.int64)  # (N, 2) x, y
    # whole pixels, or tiles that touch would leave a seam where their origins were rounded apart
    high = np.rint((grid.origins + np.ceil(grid.tile_size_level0)) / per_px).astype(np.int64)
    limits = np.array([width, height])
    low = np.clip(low, 0, limits - 1)
    high = np.minimum(np.maximum(high, low + 1), limits)
    # each rectangle by its four corners; summing along both axes fills it, whatever its size
    corners = np.zeros((2, height + 1, width + 1))
    for x, y, sign in ((low, low, 1), (high, low, -1), (low, high, -1), (high, high, 1)):
        np.add.at(corners[0], (y[:, 1], x[:, 0]), sign * values)
        np.add.at(corners[1], (y[:, 1], x[:, 0]), sign)
    total, count = corners.cumsum(axis=1).cumsum(axis=2)[:, :-1, :-1]
    count = np.rint(count)
    return np.where(count > 0, total / np.maximum(count, 1), 0.0), count > 0


def colour(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Numbers within 0–1 as colours from dark violet to yellow: (…) to uint8 (…, 3)."""
    table = np.array(_VIRIDIS, np.float64)
    steps = np.linspace(0, 1, len(table))
    return np.stack([np.rint(np.interp(values, steps, table[:, k])) for k in range(3)], axis=-1).astype(np.uint8)


def draw_heatmap(
    percentiles: NDArray[np.float64],
    grid: TileGrid,
    record: SlideRecord,
    slide: Slide | None = None,
    tissue: TissueMask | None = None,
    text: HeatmapText | None = None,
    long_side: int = 1600,
) -> RGBImage:
    """Draw attention over a slide, with a scale bar, and under it a colour bar.

    Args:
        percentiles: float (N,) within 0–1, of :func:`rank_percentiles`.
        grid: the N tiles.
        record: the slide's size and scale.
        slide: the open slide; without it tissue is drawn grey on white.
        tissue: where tissue is; looked at only without a slide.
        text: what is written under it; None for no words but those at the colour bar.
        long_side: pixels along the longer side of the slide.

    Returns:
        uint8 (H, W, 3): the slide's picture, at least 520 wide, and 62 rows under it.

    Raises:
        SettingsError: ``long_side`` is below 16, or there is not one number for each tile.
        SlideError: the slide cannot be read.
    """
    if long_side < 16:
        raise SettingsError(f"a picture's long side must be at least 16 pixels, not {long_side}")
    if percentiles.shape != (len(grid),):
        raise SettingsError(f"{len(grid)} tiles need as many percentiles, not an array of shape {percentiles.shape}")
    mpp = max(n * m for n, m in zip(record.dimensions, record.mpp, strict=True)) / long_side
    ground = slide.read_overview(mpp) if slide else _draw_tissue(record, tissue, mpp)
    height, width = ground.shape[:2]
    heat, covered = average_tiles(grid, percentiles, (width, height), (mpp / record.mpp[0], mpp / record.mpp[1]))
    mixed = ground[covered] * (1 - OPACITY) + colour(heat[covered]) * OPACITY
    painted = ground.copy()
    painted[covered] = np.rint(mixed).astype(np.uint8)
    picture = Image.fromarray(painted)
    draw_scale_bar(picture, mpp)
    return np.asarray(_add_footer(picture, text or HeatmapText("")))


def write_tiles_geojson(
    path: str | os.PathLike[str],
    grid: TileGrid,
    attention: NDArray[np.float32],
    percentiles: NDArray[np.float64],
    predicted: str,
) -> None:
    """Write tiles for QuPath (0.4 or newer), each a detection with its attention, in level-0 pixels.

    Tiles are classified by the quarter of the percentiles they are in and carry its colour; the measurement
    ``attention`` is the weight and ``attention percentile`` within 0–100. Written tile by tile into a file that appears
    whole or not at all; ids follow from the grid, so that the same tiles keep them.

    Args:
        path: a ``.geojson`` file, replaced.
        grid: N tiles.
        attention: float (N,), weights that sum to 1.
        percentiles: float (N,) within 0–1.
        predicted: the slide's class, kept with each tile's name.

    Raises:
        SlideError: the file cannot be written.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(draft, "w", encoding="utf-8") as stream:
            stream.write('{"type":"FeatureCollection","features":[')
            for number, feature in enumerate(_list_features(grid, attention, percentiles, predicted)):
                stream.write(("," if number else "") + "\n" + feature)
            stream.write("\n]}\n")
        os.replace(draft, target)
    except OSError as error:
        raise SlideError(f"cannot write the tiles {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _list_features(
    grid: TileGrid, attention: NDArray[np.float32], percentiles: NDArray[np.float64], predicted: str
) -> Iterator[str]:
    """Each tile as one GeoJSON Feature on one line."""
    colours = colour((np.arange(4) + 0.5) / 4).tolist()
    quarters = [{"name": f"attention: {name}", "color": rgb} for name, rgb in zip(QUARTERS, colours, strict=True)]
    space = uuid.UUID(grid.digest[:32])
    width, height = grid.tile_size_level0
    for row, (x, y) in enumerate(grid.origins.tolist()):
        right, below = round(x + width), round(y + height)
        rank = float(percentiles[row])
        feature = {
            "type": "Feature",
            "id": str(uuid.uuid5(space, str(row))),
            "geometry": {"type": "Polygon", "coordinates": [[[x, y], [right, y], [right, below], [x, below], [x, y]]]},
            "properties": {
                "objectType": "detection",
                "name": predicted,
                "classification": quarters[min(3, int(4 * rank))],
                "measurements": {"attention": float(attention[row]), "attention percentile": round(100 * rank, 4)},
            },
        }
        yield json.dumps(feature, separators=(",", ":"))


def _draw_tissue(record: SlideRecord, tissue: TissueMask | None, mpp: float) -> RGBImage:
    """White glass of the slide's size, with tissue in grey."""
    width, height = (
        max(1, math.ceil(n * m / mpp - 1e-9)) for n, m in zip(record.dimensions, record.mpp, strict=True)
    )  # fmt: skip
    canvas = np.full((height, width, 3), 255, np.uint8)
    if tissue is not None:
        rows = np.minimum(((np.arange(height) + 0.5) * mpp / tissue.mpp).astype(int), tissue.mask.shape[0] - 1)
        columns = np.minimum(((np.arange(width) + 0.5) * mpp / tissue.mpp).astype(int), tissue.mask.shape[1] - 1)
        canvas[tissue.mask[rows][:, columns]] = _TISSUE_GREY
    return canvas


def _add_footer(picture: Image.Image, text: HeatmapText) -> Image.Image:
    """The picture with a colour bar and a line of text under it."""
    width = max(picture.width, _LEAST_WIDTH)
    page = Image.new("RGB", (width, picture.height + _FOOTER), (255, 255, 255))
    page.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(page)
    top = picture.height
    title = text.title
    while len(title) > 1 and pen.textlength(title, font_size=16) > width - 24:
        title = title[:-2] + "…"
    pen.text((12, top + 18), title, anchor="lm", fill=(0, 0, 0), font_size=16)
    middle = top + 44
    left = 12 + pen.textlength(text.low, font_size=14) + 10
    right = min(width - 12 - pen.textlength(text.high, font_size=14) - 10, left + 300)
    steps = max(2, int(right - left))
    ramp = np.broadcast_to(colour(np.linspace(0, 1, steps)), (14, steps, 3))
    # as the tiles look: the same colours on white glass
    shown = np.rint(ramp * OPACITY + 255 * (1 - OPACITY)).astype(np.uint8)
    page.paste(Image.fromarray(shown), (int(left), middle - 7))
    pen.text((12, middle), text.low, anchor="lm", fill=(0, 0, 0), font_size=14)
    pen.text((left + steps + 10, middle), text.high, anchor="lm", fill=(0, 0, 0), font_size=14)
    return page
