"""Colour deconvolution: how much of each stain a pixel holds.

Optical density is ``OD = −log10(I / 255)`` per channel, with I taken as at least 1, so 0 … 2.407. By Beer and Lambert
the density of a pixel is the sum over stains of concentration times the stain's vector; unmixing inverts that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled

HAEMATOXYLIN = (0.65, 0.70, 0.29)
"""Density of haematoxylin in R, G, B (Ruifrok & Johnston 2001, table 1)."""

EOSIN = (0.07, 0.99, 0.11)
"""Density of eosin in R, G, B (Ruifrok & Johnston 2001, table 1)."""

OPTICAL_DENSITY: NDArray[np.float64] = -np.log10(np.maximum(np.arange(256), 1) / 255.0)
"""Optical density of each byte value: float64 (256,)."""


def complete_stains(first: tuple[float, float, float], second: tuple[float, float, float]) -> NDArray[np.float64]:
    """Stain matrix of two stains: both as unit rows, then the unit row at right angles to them (the residual).

    Args:
        first: density of the first stain in R, G, B.
        second: density of the second stain in R, G, B, not parallel to the first.

    Returns:
        float64 (3, 3), a row per stain.
    """
    rows = np.array([first, second, np.cross(first, second)], dtype=np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


HE_RESIDUAL: NDArray[np.float64] = complete_stains(HAEMATOXYLIN, EOSIN)
"""Rows haematoxylin, eosin, residual; a positive residual is a brown or yellow that the two do not explain."""


def inverse_of_stains(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Matrix that takes optical densities (R, G, B) to concentrations: the inverse of the stain matrix.

    Args:
        vectors: (3, 3), a row per stain.

    Returns:
        float64 (3, 3), C-contiguous.

    Raises:
        ValueError: ``vectors`` is not (3, 3), not finite, or its rows are (nearly) dependent.
    """
    matrix = np.asarray(vectors, dtype=np.float64)
    if matrix.shape != (3, 3):
        raise ValueError(f"stain vectors must be an array of shape (3, 3), a row per stain, not {matrix.shape}")
    if not np.isfinite(matrix).all() or np.linalg.cond(matrix) > 1e6:
        raise ValueError("stain vectors must be finite and independent of one another; these cannot be inverted")
    return np.ascontiguousarray(np.linalg.inv(matrix))


@compiled
def _unmix_loop(
    rgb: NDArray[np.uint8], density: NDArray[np.float64], inverse: NDArray[np.float64], out: NDArray[np.float32]
) -> None:
    """Fill ``out`` (N, 3) with the concentrations of the pixels ``rgb`` (N, 3)."""
    for i in range(rgb.shape[0]):
        red, green, blue = density[rgb[i, 0]], density[rgb[i, 1]], density[rgb[i, 2]]
        for s in range(3):
            out[i, s] = red * inverse[0, s] + green * inverse[1, s] + blue * inverse[2, s]


def unmix_stains(rgb: NDArray[np.uint8], vectors: NDArray[np.float64] = HE_RESIDUAL) -> NDArray[np.float32]:
    """Concentration of each stain in each pixel.

    The vectors are used as given: with unit rows (as ``HE_RESIDUAL``) a concentration is an optical density along the
    stain's direction. Negative concentrations are kept; they say that the stains do not explain the colour.

    Args:
        rgb: uint8 (..., 3).
        vectors: (3, 3), a row per stain: its density in R, G, B.

    Returns:
        float32 (..., 3), a channel per row of ``vectors``.

    Raises:
        TypeError: ``rgb`` is not uint8.
        ValueError: the last axis of ``rgb`` is not 3, or ``vectors`` cannot be inverted.

    Source: A. C. Ruifrok and D. A. Johnston, "Quantification of histochemical staining by color deconvolution",
    Anal. Quant. Cytol. Histol. 23 (2001).
    """
    rgb = np.asarray(rgb)
    if rgb.dtype != np.uint8:
        raise TypeError(f"unmix_stains takes uint8 pixels, not {rgb.dtype}")
    if rgb.ndim < 1 or rgb.shape[-1] != 3:
        raise ValueError(f"unmix_stains takes an array of shape (..., 3), not {rgb.shape}")
    inverse = inverse_of_stains(vectors)
    flat = np.ascontiguousarray(rgb).reshape(-1, 3)
    out = np.empty(flat.shape, np.float32)
    _unmix_loop(flat, OPTICAL_DENSITY, inverse, out)
    return out.reshape(rgb.shape)
