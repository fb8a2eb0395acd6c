"""A contact sheet of attention: crops at each scale, and where the network looks on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsi_engine.readers.base import RGBImage

_GAP, _TITLE = 6, 22
_OUTLINE = (255, 210, 0)


def draw_attention_sheet(
    pixels: NDArray[np.uint8],
    attention: NDArray[np.float32],
    scales: NDArray[np.int64],
    names: Sequence[str],
    title: str,
) -> RGBImage:
    """Draw a block of two rows for each scale: the crops with attention's outline at one half, then attention in grey.

    Args:
        pixels: uint8 (B, S, S, 3).
        attention: float (B, S, S) within 0-1; 1 is white.
        scales: (B,) number of each crop's scale.
        names: of the scales, for their titles.
        title: of the sheet.

    Returns:
        uint8 (H, W, 3).
    """
    side = pixels.shape[1]
    columns = int(np.bincount(scales, minlength=len(names)).max())
    block = _TITLE + 2 * (side + _GAP)
    page = Image.new("RGB", (max(_GAP + columns * (side + _GAP), 420), _TITLE + len(names) * block), (255, 255, 255))
    pen = ImageDraw.Draw(page)
    pen.text((_GAP, _TITLE // 2), title, anchor="lm", fill=(0, 0, 0), font_size=15)
    for number, name in enumerate(names):
        top = _TITLE + number * block
        pen.text((_GAP, top + _TITLE // 2), name, anchor="lm", fill=(0, 0, 0), font_size=13)
        for column, row in enumerate(np.flatnonzero(scales == number)):
            left, upper = _GAP + column * (side + _GAP), top + _TITLE
            page.paste(Image.fromarray(_outline(pixels[row], attention[row] > 0.5)), (left, upper))
            grey = np.rint(np.clip(attention[row], 0, 1) * 255).astype(np.uint8)
            page.paste(Image.fromarray(grey), (left, upper + side + _GAP))
    return np.asarray(page)


def _outline(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The pixels with the inner border of a mask coloured."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    out = pixels.copy()
    out[mask & ~inner] = _OUTLINE
    return out
