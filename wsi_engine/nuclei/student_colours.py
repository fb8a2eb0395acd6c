"""Staining of painted scenes: from concentrations to a picture."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsi_engine.kernels.stains import EOSIN, HAEMATOXYLIN
from wsi_engine.nuclei.stain import PIGMENT

Floats = NDArray[np.float32]
Rng = np.random.Generator

_SPREAD = 0.12
"""Deviation of each component of a stain vector."""


def draw_stains(rng: Rng) -> NDArray[np.float64]:
    """Unit rows (3, 3) of haematoxylin, eosin and a brown pigment, each turned away from its usual direction."""
    eosin = np.array(EOSIN) * rng.uniform(0.6, 1.0) + np.array((0.2, 0.75, 0.55)) * rng.uniform(0, 0.6)
    purple = rng.uniform(0, 0.9) if rng.random() < 0.5 else 0.0
    blue = np.array(HAEMATOXYLIN) * (1 - purple) + np.array((0.42, 0.86, 0.28)) * purple
    if rng.random() < 0.15:  # one hue for all: what counts is density
        eosin = 0.7 * blue + 0.3 * eosin
    rows = np.array([blue, eosin / np.linalg.norm(eosin), PIGMENT]) + rng.normal(0, _SPREAD, (3, 3))
    rows[0, 0] = max(rows[0, 0], 0.35)
    rows = np.clip(rows, 0.02, None)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def stain_scene(rng: Rng, density: Floats) -> NDArray[np.uint8]:
    """Picture, uint8 (H, W, 3), of concentrations (H, W, 3) under stain vectors, light and exposure drawn at random."""
    stains = draw_stains(rng).astype(np.float32)
    strength = np.exp(rng.normal(0, 0.25, 3)).astype(np.float32) * np.float32(np.exp(rng.normal(-0.35, 0.3)))
    optical = (density * strength) @ stains
    if rng.random() < 0.25:  # stain or gelatine all over the glass
        optical += rng.uniform(0, 0.2, 3).astype(np.float32)
    light = rng.uniform(215, 255) * (1 - rng.uniform(0, 0.06, 3))
    return to_bytes(light.astype(np.float32) * np.power(np.float32(10), -optical))


def recompress(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """The picture after JPEG of a quality."""
    held = io.BytesIO()
    Image.fromarray(image).save(held, "JPEG", quality=quality)
    return np.asarray(Image.open(held))


def to_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rounded and clipped to 0 … 255."""
    return np.asarray(np.clip(values + 0.5, 0, 255), dtype=np.uint8)
