"""A short training of scale attention, and tissue for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsi_engine.models.scale_attention import ScaleAttentionSettings
from wsi_engine.nuclei.scale_settings import ScaleTrainingSettings
from wsi_engine.synthetic import RUIFROK_JOHNSTON, SlideSpec, Stains, SyntheticSlide

TINY = ScaleTrainingSettings(
    epochs=2, batches=2, batch_size=4, crop_px=32, classifier_weights="random", sheet_crops=1, checkpoint_batches=1,
    network=ScaleAttentionSettings(width=4, dilations=(1, 2)), device="cpu", precision="fp32", workers=2,
)  # fmt: skip


def paint_tissue(side: int = 320, seed: int = 4, stains: Stains = RUIFROK_JOHNSTON) -> NDArray[np.uint8]:
    spec = SlideSpec(width=1600, height=1200, mpp=0.25, coverage=1, seed=seed, stains=stains)
    return SyntheticSlide(spec).paint(600, 400, side, side)


def write_pictures(path: Path) -> Path:
    """Two pictures of tissue in a folder, one with an annotation that cannot be read."""
    for name, seed in (("a", 4), ("b", 5)):
        Image.fromarray(paint_tissue(seed=seed)).save(path / f"{name}.png")
    (path / "a_label.png").write_bytes(b"never read")
    return path
