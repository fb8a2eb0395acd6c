"""Stain vectors estimated from the picture itself."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels.stains import complete_stains

LEAST_TISSUE = 100
"""Fewest stained pixels that an estimate is made from."""

_LEAST_ANGLE = math.radians(2)
"""Colours spread over less than this come from one stain, or from noise on one colour."""


@compiled
def _moments_loop(rgb: NDArray[np.uint8], density: NDArray[np.float64], beta: float, sums: NDArray[np.float64]) -> int:
    """Add to ``sums`` (3, 3) the products of the densities of stained pixels (N, 3); returns how many there are."""
    stained = 0
    for i in range(rgb.shape[0]):
        r, g, b = density[0, rgb[i, 0]], density[1, rgb[i, 1]], density[2, rgb[i, 2]]
        if not r * r + g * g + b * b >= beta * beta:  # NaN is not
            continue
        stained += 1
        sums[0, 0] += r * r
        sums[0, 1] += r * g
        sums[0, 2] += r * b
        sums[1, 1] += g * g
        sums[1, 2] += g * b
        sums[2, 2] += b * b
    return stained


@compiled
def _angles_loop(
    rgb: NDArray[np.uint8],
    density: NDArray[np.float64],
    beta: float,
    plane: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """Fill ``out`` with the angle of each stained pixel in the plane whose axes are the rows of ``plane`` (2, 3)."""
    found = 0
    for i in range(rgb.shape[0]):
        r, g, b = density[0, rgb[i, 0]], density[1, rgb[i, 1]], density[2, rgb[i, 2]]
        if not r * r + g * g + b * b >= beta * beta:  # NaN is not
            continue
        along = r * plane[0, 0] + g * plane[0, 1] + b * plane[0, 2]
        across = r * plane[1, 0] + g * plane[1, 1] + b * plane[1, 2]
        out[found] = math.atan2(across, along)
        found += 1


def estimate_stains(
    rgb: NDArray[np.uint8],
    *,
    beta: float = 0.15,
    alpha: float = 1.0,
    white: float | tuple[float, float, float] = 255.0,
) -> NDArray[np.float64]:
    """Vectors of haematoxylin and eosin from a picture that holds both, ready for ``unmix_stains``.

    Optical densities of two stains lie in a plane through the origin, between the two vectors. The plane is the one of
    the two greatest singular values; the vectors are its extreme directions, which leave ``alpha`` percent of the
    stained pixels outside on either side. The one with more red density is haematoxylin. A vector may have a slightly
    negative component. Pen marks, pigment and blood are taken for stains: leave them out.

    A pixel is stained where its vector of densities (to the base 10) is at least ``beta`` long, so that eosin, which
    hardly absorbs red, is kept; and where no channel is 0, for how dense such a pixel is cannot be told. Densities
    count from ``white``: what the glass itself absorbs would turn both vectors towards grey, the pale one most (eosin
    by some 4 degrees where empty glass is at 243).

    Args:
        rgb: uint8 (..., 3), at least 100 stained pixels.
        beta: least length of the density vector of a stained pixel, above 0.
        alpha: percent of pixels outside the vectors on either side, from 0 to below 50.
        white: value of empty glass, one or R, G, B, above 0 up to 255.

    Returns:
        float64 (3, 3), unit rows haematoxylin, eosin, and the residual at right angles to both.

    Raises:
        TypeError: ``rgb`` is not uint8.
        ValueError: the last axis of ``rgb`` is not 3, ``beta``, ``alpha`` or ``white`` is out of range, there is too
            little tissue, or all of it has one colour.

    Time: N pixels. Source: M. Macenko et al., "A method for normalizing histology slides for quantitative analysis",
    ISBI 2009, section 2.2.
    """
    rgb = np.asarray(rgb)
    if rgb.dtype != np.uint8:
        raise TypeError(f"estimate_stains takes uint8 pixels, not {rgb.dtype}")
    if rgb.ndim < 1 or rgb.shape[-1] != 3:
        raise ValueError(f"estimate_stains takes an array of shape (..., 3), not {rgb.shape}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"estimate_stains needs a beta above 0, not {beta}")
    if not 0 <= alpha < 50:
        raise ValueError(f"estimate_stains needs an alpha from 0 to below 50 percent, not {alpha}")
    levels = np.asarray(white, np.float64)
    if levels.shape not in ((), (3,)) or not ((levels > 0) & (levels <= 255)).all():
        raise ValueError(f"estimate_stains needs a white above 0 up to 255, one value or three, not {white}")
    density = -np.log10(np.maximum(np.arange(256), 1) / np.broadcast_to(levels, 3)[:, None])  # (3, 256)
    density[:, 0] = np.nan  # how dense is not known
    pixels = np.ascontiguousarray(rgb).reshape(-1, 3)
    sums = np.zeros((3, 3))
    stained = _moments_loop(pixels, density, float(beta), sums)
    if stained < LEAST_TISSUE:
        raise ValueError(
            f"estimate_stains needs at least {LEAST_TISSUE} stained pixels, and {stained} of {len(pixels)} have an "
            f"optical density of {beta} or more: give a picture with more tissue or a lower beta"
        )
    plane = _main_plane(sums)
    angles = np.empty(stained)
    _angles_loop(pixels, density, float(beta), plane, angles)
    low, high = np.percentile(angles, [alpha, 100 - alpha])
    if high - low < _LEAST_ANGLE:
        raise ValueError(
            f"estimate_stains needs two stains, and the colours of the tissue lie within "
            f"{math.degrees(high - low):.1f} degrees of one another"
        )
    ends = [math.cos(angle) * plane[0] + math.sin(angle) * plane[1] for angle in (low, high)]
    haematoxylin, eosin = sorted(ends, key=lambda vector: -vector[0])
    return complete_stains(tuple(haematoxylin), tuple(eosin))


def _main_plane(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows (2, 3): the direction along which the densities are longest, pointing to more density, and the second."""
    upper = np.triu(sums, 1)
    _, vectors = np.linalg.eigh(sums + upper.T)
    first, second = vectors[:, 2], vectors[:, 1]
    return np.ascontiguousarray([first if first.sum() > 0 else -first, second])
