"""A tiny transformer, and a cohort of tiny slides whose label is written in a few of their tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from wsi_engine.encoders.base import EncoderCard
from wsi_engine.encoders.deep import DeepEncoder

SIDE, TILE = 96, 32
"""Pixels of a slide and of a tile: nine tiles a slide."""

TINY = EncoderCard(
    "tiny", "timm", "vit_tiny_patch16_224", TILE, 192, "cls", "open", mpp=0.5,
    options=(("img_size", TILE), ("depth", 2)), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip


def make_encoder(card: EncoderCard = TINY, weights: str = "random:3") -> DeepEncoder:
    """Random weights, on the CPU in fp32."""
    return DeepEncoder(card, weights, "cpu", "fp32")


def write_slides(folder: Path, slides: int = 16) -> Path:
    """``cohort.csv`` in a folder beside its slides (PNG, 0.5 µm per pixel by the column ``mpp``); returned.

    Every second slide is of class "high": stripes on two of its tiles run down instead of across.
    """
    rng = np.random.default_rng(8)
    (folder / "slides").mkdir(parents=True)
    lines = ["slide,slide_id,patient,grade,mpp"]
    across = np.where(np.arange(TILE) // 4 % 2, 60, -60)[:, None, None] * np.ones((1, TILE, 1))
    for number in range(slides):
        picture = np.array([200, 120, 160]) + rng.normal(0, 6, (SIDE, SIDE, 3))
        for tile in rng.choice(9, 3, replace=False):
            y, x = divmod(int(tile), 3)
            stripes = across.transpose(1, 0, 2) if number % 2 else across
            picture[y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE] += stripes
        path = folder / "slides" / f"s{number:02}.png"
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path)
        lines.append(f"slides/{path.name},s{number:02},p{number},{'high' if number % 2 else 'low'},0.5")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    return folder
