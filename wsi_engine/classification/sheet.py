"""A contact sheet: the tiles that a model looked at most, and least."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsi_engine.classification.heatmap import colour
from wsi_engine.errors import SettingsError
from wsi_engine.grid import TileGrid
from wsi_engine.readers.base import RGBImage
from wsi_engine.slide import Slide

LARGEST_PX, SMALLEST_PX = 256, 128
"""Side of a tile on the sheet: larger tiles are shrunk, smaller ones enlarged by a whole number."""

_GAP, _LABEL, _TITLE = 10, 24, 34
_FRAME = 4


def pick_ends(percentiles: NDArray[np.float64], top: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of the ``top`` most and least attended tiles, the extreme ones first; of equal ones the first row first.

    A slide of fewer than 2 · ``top`` tiles shares them between the two, so that no tile is on both sides.
    """
    order = np.argsort(-percentiles, kind="stable")
    most = min(top, math.ceil(len(order) / 2))
    least = min(top, len(order) // 2)
    return order[:most], order[len(order) - least :][::-1]


def draw_sheet(
    slide: Slide, grid: TileGrid, percentiles: NDArray[np.float64], top: int = 8, title: str = ""
) -> RGBImage:
    """Draw the most and the least attended tiles in two rows, each with its rank and percentile.

    Args:
        slide: the open slide.
        grid: N tiles; they are read at its mpp.
        percentiles: float (N,) within 0–1.
        top: tiles in a row, at most.
        title: said in front of both rows' titles, such as the slide's name.

    Returns:
        uint8 (H, W, 3).

    Raises:
        SettingsError: ``top`` is not positive, there is no tile, or not one number for each tile.
        SlideError: the slide cannot be read.
    """
    if top < 1:
        raise SettingsError(f"--top must be at least 1, not {top}")
    if len(grid) == 0 or percentiles.shape != (len(grid),):
        raise SettingsError(f"{len(grid)} tiles need as many percentiles, not an array of shape {percentiles.shape}")
    most, least = pick_ends(percentiles, top)
    side = _shown_side(grid.tile_px)
    cell = side + 2 * _FRAME
    lead = f"{title}: " if title else ""
    said = "attended tiles (rank · percentile)"
    rows = [(f"{lead}most {said}", most, 1, 1), (f"{lead}least {said}", least, len(grid), -1)]
    rows = [row for row in rows if len(row[1])]
    width = max(_GAP + (cell + _GAP) * len(most), 520)
    page = Image.new("RGB", (width, len(rows) * (_TITLE + cell + _LABEL + _GAP)), (255, 255, 255))
    pen = ImageDraw.Draw(page)
    for number, (words, tiles, first, step) in enumerate(rows):
        y = number * (_TITLE + cell + _LABEL + _GAP)
        pen.text((_GAP, y + _TITLE // 2 + 4), words, anchor="lm", fill=(0, 0, 0), font_size=18)
        for place, tile in enumerate(tiles):
            x, below = _GAP + place * (cell + _GAP), y + _TITLE
            rank = float(percentiles[tile])
            frame = tuple(colour(np.array(rank)).tolist())
            pen.rectangle((x, below, x + cell - 1, below + cell - 1), fill=frame)
            page.paste(_read_tile(slide, grid, int(tile), side), (x + _FRAME, below + _FRAME))
            label = f"{first + step * place} · {100 * rank:.1f} %"
            pen.text((x + cell / 2, below + cell + _LABEL / 2), label, anchor="mm", fill=(0, 0, 0), font_size=13)
    return np.asarray(page)


def _shown_side(tile_px: int) -> int:
    if tile_px >= LARGEST_PX:
        return LARGEST_PX
    return tile_px * max(1, -(-SMALLEST_PX // tile_px))


def _read_tile(slide: Slide, grid: TileGrid, row: int, side: int) -> Image.Image:
    x, y = grid.origins[row].tolist()
    tile = Image.fromarray(slide.read_region(x, y, grid.tile_px, grid.tile_px, mpp=grid.mpp))
    if side == grid.tile_px:
        return tile
    filter_ = Image.Resampling.LANCZOS if side < grid.tile_px else Image.Resampling.NEAREST
    return tile.resize((side, side), filter_)
