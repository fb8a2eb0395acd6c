"""Texture features of tiles: stains, optical density, colour, patterns, edges, nuclei.

Each tile is measured alone, in whole numbers or float64, so its features depend on its own pixels and nothing else.
Python only joins the compiled loops, which hold no interpreter lock.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels.blobs import measure_nuclei
from wsi_engine.kernels.patterns import (
    UNIFORM_CLASSES,
    count_binary_patterns,
    count_cooccurrence,
    measure_cooccurrence,
    measure_edges,
)
from wsi_engine.kernels.stains import HE_RESIDUAL, OPTICAL_DENSITY, inverse_of_stains

TEXTURE_DIM = 90
"""Number of features of a tile."""

SMALLEST_TILE = 8
"""Least side of a tile in pixels."""

PERCENTS: NDArray[np.int64] = np.array([5, 25, 50, 75, 95])
"""Percentiles of each stain's concentration."""

LOWEST, BINS = 1024, 2560
"""Histogram of concentrations: steps of 1/256 from −LOWEST/256; unit stain vectors give −3.28 … 4.80."""

STAIN_TABLE: NDArray[np.int32] = np.rint(
    OPTICAL_DENSITY[None, :, None] * inverse_of_stains(HE_RESIDUAL)[:, None, :] * 65536
).astype(np.int32)
"""What a byte of a channel adds to each stain, in 1/65536 of an optical density: int32 (channel, byte, stain)."""


@compiled
def _unmix_levels(
    tile: NDArray[np.uint8], table: NDArray[np.int32], haematoxylin: NDArray[np.int16]
) -> NDArray[np.int64]:
    """Histogram of each stain's concentration in steps of 1/256, and the map of the first stain.

    Returns:
        int64 (3, BINS).
    """
    counts = np.zeros((3, BINS), np.int64)
    for y in range(tile.shape[0]):
        for x in range(tile.shape[1]):
            red, green, blue = table[0, tile[y, x, 0]], table[1, tile[y, x, 1]], table[2, tile[y, x, 2]]
            first = (red[0] + green[0] + blue[0] + 128) >> 8
            haematoxylin[y, x] = first
            counts[0, LOWEST + first] += 1
            counts[1, LOWEST + ((red[1] + green[1] + blue[1] + 128) >> 8)] += 1
            counts[2, LOWEST + ((red[2] + green[2] + blue[2] + 128) >> 8)] += 1
    return counts


@compiled
def _describe_levels(counts: NDArray[np.int64], percents: NDArray[np.int64], out: NDArray[np.float64]) -> None:
    """Fill ``out`` (8,) with mean, standard deviation, skewness (within ±10) and the percentiles.

    A percentile is the least value at or below which that share of the pixels lies.
    """
    pixels, total = 0, 0
    for k in range(counts.size):
        pixels += counts[k]
        total += counts[k] * (k - LOWEST)
    mean = total / pixels
    squares = cubes = 0.0
    ranks = (percents * pixels + 99) // 100  # rounded up
    seen = 0
    for k in range(counts.size):
        if counts[k] == 0:
            continue
        value = k - LOWEST
        gap = value - mean
        squares += counts[k] * gap * gap
        cubes += counts[k] * gap * gap * gap
        for i in range(ranks.size):
            if seen < ranks[i] <= seen + counts[k]:
                out[3 + i] = value / 256
        seen += counts[k]
    deviation = math.sqrt(squares / pixels)
    out[0] = mean / 256
    out[1] = deviation / 256
    if deviation > 1e-9:
        out[2] = min(max(cubes / pixels / deviation**3, -10.0), 10.0)


@compiled
def _measure_colour(
    tile: NDArray[np.uint8], density: NDArray[np.float64], grey: NDArray[np.uint8], out: NDArray[np.float64]
) -> None:
    """Fill ``grey`` (H, W) and ``out`` (30,): 16 bins of density, colour, and shares of white, tissue and dark."""
    pixels = tile.shape[0] * tile.shape[1]
    bins = np.zeros(16, np.int64)
    sums, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
    values = white = tissue = dark = np.int64(0)
    saturation = saturation_squares = cosine = sine = 0.0
    root3 = math.sqrt(3.0)
    for y in range(tile.shape[0]):
        for x in range(tile.shape[1]):
            r, g, b = np.int64(tile[y, x, 0]), np.int64(tile[y, x, 1]), np.int64(tile[y, x, 2])
            grey[y, x] = (77 * r + 150 * g + 29 * b + 128) >> 8
            mean_density = (density[r] + density[g] + density[b]) / 3
            bins[min(int(mean_density * 10), 15)] += 1
            tissue += mean_density > 0.15
            high, low = max(r, g, b), min(r, g, b)
            white += low >= 220
            dark += high <= 50
            values += high
            sums[0] += r
            sums[1] += g
            sums[2] += b
            squares[0] += r * r
            squares[1] += g * g
            squares[2] += b * b
            if high > low:
                share = (high - low) / high
                saturation += share
                saturation_squares += share * share
                along, across = float(2 * r - g - b), root3 * (g - b)
                length = math.sqrt(along * along + across * across)
                cosine += share * along / length
                sine += share * across / length
    for k in range(16):
        out[k] = bins[k] / pixels
    for c in range(3):
        mean = sums[c] / pixels
        out[16 + c] = mean / 255
        out[19 + c] = math.sqrt(max(0.0, squares[c] / pixels - mean * mean)) / 255
    mean_saturation = saturation / pixels
    out[22] = cosine / pixels
    out[23] = sine / pixels
    out[24] = mean_saturation
    out[25] = math.sqrt(max(0.0, saturation_squares / pixels - mean_saturation**2))
    out[26] = values / pixels / 255
    out[27], out[28], out[29] = white / pixels, tissue / pixels, dark / pixels


def _measure_tile(tile: NDArray[np.uint8], out: NDArray[np.float64]) -> None:
    """Fill ``out`` (90,) with the features of ``tile`` (H, W, 3), C-contiguous."""
    shape = tile.shape[:2]
    haematoxylin, grey = np.empty(shape, np.int16), np.empty(shape, np.uint8)
    levels = _unmix_levels(tile, STAIN_TABLE, haematoxylin)
    for stain in range(3):
        _describe_levels(levels[stain], PERCENTS, out[8 * stain : 8 * stain + 8])
    _measure_colour(tile, OPTICAL_DENSITY, grey, out[24:54])
    patterns = count_binary_patterns(grey, UNIFORM_CLASSES)
    out[54:64] = patterns / patterns.sum()
    out[64:70] = measure_cooccurrence(count_cooccurrence(grey, 1))
    out[70:76] = measure_cooccurrence(count_cooccurrence(grey, 4))
    out[76:81] = measure_edges(grey)
    out[81:90] = measure_nuclei(haematoxylin)


def texture_features(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Texture features of tiles; row b depends on tile b alone.

    Columns: 24 of stains (haematoxylin, eosin, residual: mean, standard deviation, skewness, percentiles 5, 25, 50,
    75, 95), 16 of the histogram of optical density, 14 of colour and of the shares of white, tissue and dark pixels,
    10 of local binary patterns, 6 of co-occurrence at distance 1 and 6 at distance 4, 5 of edges, 9 of nuclei.
    All are finite and below 1,000 for tiles of up to 4,096 px.

    Args:
        pixels: uint8 (B, H, W, 3), H and W at least 8.

    Returns:
        float32 (B, 90).

    Raises:
        TypeError: ``pixels`` is not uint8.
        ValueError: ``pixels`` is not (B, H, W, 3), or a tile is smaller than 8 × 8.

    Complexity: O(B·H·W).
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8:
        raise TypeError(f"texture_features takes uint8 pixels, not {pixels.dtype}")
    if pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"texture_features takes an array of shape (B, H, W, 3), not {pixels.shape}")
    if min(pixels.shape[1:3]) < SMALLEST_TILE:
        size = f"{pixels.shape[2]} × {pixels.shape[1]}"
        raise ValueError(f"texture_features needs tiles of at least {SMALLEST_TILE} × {SMALLEST_TILE} px, not {size}")
    out = np.zeros((len(pixels), TEXTURE_DIM))
    for tile, row in zip(pixels, out, strict=True):
        _measure_tile(np.ascontiguousarray(tile), row)
    return out.astype(np.float32)
