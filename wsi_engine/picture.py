"""Pictures of a slide for people: an overview with the tissue's outline and the grid."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.grid import TileGrid
from wsi_engine.readers.base import RGBImage
from wsi_engine.slide import Slide
from wsi_engine.tissue import TissueMask

OUTLINE = (0, 120, 60)
GRID = (40, 60, 160)


def draw_overview(
    slide: Slide, grid: TileGrid | None = None, tissue: TissueMask | None = None, long_side: int = 1600
) -> RGBImage:
    """Draw a slide with the outline of its tissue (green), the tiles of a grid (blue) and a scale bar.

    Args:
        slide: an open slide whose scale is known.
        grid: tiles to draw.
        tissue: tissue to outline.
        long_side: pixels along the picture's longer side.

    Returns:
        uint8, (H, W, 3).

    Raises:
        ScaleError: the slide's scale is missing or not believable.
        SlideError: the slide cannot be read.
    """
    if long_side < 16:
        raise SettingsError(f"a picture's long side must be at least 16 pixels, not {long_side}")
    mpp = max(n * m for n, m in zip(slide.dimensions, slide.mpp, strict=True)) / long_side
    picture = Image.fromarray(slide.read_overview(mpp))
    to_picture = slide.mpp[0] / mpp, slide.mpp[1] / mpp
    if grid is not None:
        _draw_tiles(picture, grid, to_picture)
    if tissue is not None:
        picture = _draw_outline(picture, tissue, mpp)
    draw_scale_bar(picture, mpp)
    return np.asarray(picture)


def save_picture(picture: RGBImage, path: str | os.PathLike[str]) -> None:
    """Write a picture as PNG; a reader never sees half of it.

    Raises:
        SlideError: the file cannot be written.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        Image.fromarray(picture).save(draft, format="PNG")
        os.replace(draft, target)
    except OSError as error:
        raise SlideError(f"cannot write the picture {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _draw_tiles(picture: Image.Image, grid: TileGrid, to_picture: tuple[float, float]) -> None:
    pen = ImageDraw.Draw(picture)
    width, height = grid.tile_size_level0
    for x, y in grid.origins.tolist():
        corner = x * to_picture[0], y * to_picture[1]
        opposite = (x + width) * to_picture[0], (y + height) * to_picture[1]
        pen.rectangle((*corner, *opposite), outline=GRID)


def _draw_outline(picture: Image.Image, tissue: TissueMask, mpp: float) -> Image.Image:
    """Colour the pixels just inside the border of the tissue, about two deep."""
    width, height = picture.size
    rows = np.minimum(((np.arange(height) + 0.5) * mpp / tissue.mpp).astype(int), tissue.mask.shape[0] - 1)
    columns = np.minimum(((np.arange(width) + 0.5) * mpp / tissue.mpp).astype(int), tissue.mask.shape[1] - 1)
    mask = tissue.mask[rows][:, columns]
    pixels = np.array(picture)
    pixels[mask & ~_inner(_inner(mask))] = OUTLINE
    return Image.fromarray(pixels)


def _inner(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a mask whose four neighbours lie in it too; outside the picture counts as inside."""
    padded = np.pad(mask, 1, constant_values=True)
    return padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def draw_scale_bar(picture: Image.Image, mpp: float) -> None:
    """A bar of a round length, about a sixth of the picture's width, at the lower left."""
    longest = picture.width * mpp / 6
    power = 10.0 ** np.floor(np.log10(longest))
    length = next(step * power for step in (5, 2, 1) if step * power <= longest)
    label = f"{length / 1000:g} mm"  # not µm: Pillow's own font has no µ
    x, y = picture.width // 50 + 4, picture.height - picture.height // 50 - 6
    pen = ImageDraw.Draw(picture)
    box = pen.textbbox((x, y - 8), label, anchor="lb", font_size=18)
    right = max(x + length / mpp, box[2])
    pen.rectangle((x - 6, box[1] - 6, right + 6, y + 8), fill=(255, 255, 255))
    pen.rectangle((x, y - 2, x + length / mpp, y + 2), fill=(0, 0, 0))
    pen.text((x, y - 8), label, anchor="lb", fill=(0, 0, 0), font_size=18)
