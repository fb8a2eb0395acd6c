"""The built-in encoder: named features of stain, colour, pattern, edges and nuclei, computed without weights."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import EncoderError, SettingsError

VERSION = "texture 1"
"""Part of the digest; to be raised when any feature changes its value."""

MOST_THREADS = 8
SMALLEST_TILE = 8

_STAINS = ("haematoxylin", "eosin", "residual")
_STATISTICS = ("mean", "std", "skewness", "p05", "p25", "p50", "p75", "p95")
_CHANNELS = ("red", "green", "blue")
_COOCCURRENCE = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation", "entropy")

FEATURE_NAMES: tuple[str, ...] = (
    *(f"{stain}_{statistic}" for stain in _STAINS for statistic in _STATISTICS),
    *(f"density_bin_{k:02d}" for k in range(16)),
    *(f"{channel}_mean" for channel in _CHANNELS),
    *(f"{channel}_std" for channel in _CHANNELS),
    "hue_cos_mean",
    "hue_sin_mean",
    "saturation_mean",
    "saturation_std",
    "value_mean",
    "white_fraction",
    "tissue_fraction",
    "dark_fraction",
    *(f"lbp_{k}" for k in range(9)),
    "lbp_mixed",
    *(f"glcm_{name}_d1" for name in _COOCCURRENCE),
    *(f"glcm_{name}_d4" for name in _COOCCURRENCE),
    "edge_mean",
    "edge_std",
    "edge_fraction",
    "edge_coherence",
    "laplacian_std",
    "nuclear_density",
    "nuclear_peak_density",
    "nuclear_area_fraction",
    "nuclear_diameter_mean",
    "nuclear_diameter_std",
    "nuclear_area_variation",
    "nuclear_eccentricity_mean",
    "nuclear_haematoxylin_mean",
    "nuclear_haematoxylin_contrast",
)
"""Names of the columns, in order; docs/texture.md says what each means."""

TEXTURE_CARD = EncoderCard(
    name="texture",
    builder="texture",
    architecture="texture",
    input_px=0,
    dim=len(FEATURE_NAMES),
    pooling="none",
    licence="Apache-2.0",
    feature_names=FEATURE_NAMES,
    weights="none",
    weights_digest=hashlib.sha256("\n".join((VERSION, *FEATURE_NAMES)).encode()).hexdigest(),
)
"""What the texture encoder is; its digest stands for the version of the features and their names."""


class TextureEncoder:
    """Named texture features of tiles of any size from 8 × 8 px.

    Lengths and areas are in pixels of the tile, so features compare only between tiles of one mpp.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Make the encoder.

        Args:
            threads: threads that share a batch; None for the usable cores, at most 8. Features do not depend on it.

        Raises:
            SettingsError: ``threads`` is below 1.
        """
        if threads is not None and threads < 1:
            raise SettingsError(f"threads must be at least 1, not {threads}")
        self._threads = min(_usable_cores(), MOST_THREADS) if threads is None else threads
        from wsi_engine.kernels.texture import texture_features  # noqa: PLC0415  # loads Numba, the card must not

        self._measure = texture_features

    def __repr__(self) -> str:
        return f"TextureEncoder(threads={self._threads})"

    @property
    def card(self) -> EncoderCard:
        """What this encoder is."""
        return TEXTURE_CARD

    @property
    def precision(self) -> str:
        """Arithmetic that the features are given in; sums are exact or float64."""
        return "fp32"

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features of a batch of RGB tiles.

        Args:
            pixels: uint8, (B, H, W, 3), H and W at least 8.

        Returns:
            float32, (B, 90), columns as ``card.feature_names``; row b depends on tile b alone.

        Raises:
            SettingsError: the pixels are of another kind or shape.
            EncoderError: the tiles are smaller than 8 × 8.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise SettingsError(f"tiles are uint8 of shape (B, H, W, 3), not {pixels.dtype} of shape {pixels.shape}")
        if min(pixels.shape[1:3]) < SMALLEST_TILE:
            size = f"{pixels.shape[2]} × {pixels.shape[1]}"
            raise EncoderError(f"encoder 'texture' needs tiles of at least 8 × 8 px, not {size}; ask for larger tiles")
        threads = min(self._threads, len(pixels))
        if threads <= 1:
            return self._measure(pixels)
        with ThreadPoolExecutor(threads) as pool:
            return np.concatenate(list(pool.map(self._measure, np.array_split(pixels, threads))))


def _usable_cores() -> int:
    """Cores this process may run on; all of them where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
