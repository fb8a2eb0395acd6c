"""Where things lie on a synthetic slide: outlines, glands and nuclei, each a function of place and seed alone.

Nothing here keeps state, so any rectangle of an endless plane can be asked for and always looks the same. All lengths
are µm. An outline is a row of 12 numbers: centre x, y; semi-axes a, b; cos and sin of its turn; then the cos and sin
amplitudes of the harmonics 2, 3 and 4 that make it irregular.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled

OUTLINE = 12
"""Numbers of an outline."""

FIELDS = 6
TISSUE, TUMOUR, NEST, FIBRE, TINT, GAP = range(FIELDS)
"""Rows of a field: depth inside tissue, tumour and tumour nest (µm), phase of fibres (rad), and two tones in -1..1."""

EPITHELIAL, LYMPHOCYTE, FIBROBLAST, TUMOUR_CELL = range(4)
"""Kinds of nuclei."""

GLAND_PITCH = 132.0
GLAND_SLOTS = 64
CELL_PITCH = 7.5
REACH = 11.0
"""No nucleus reaches further from its centre."""

NUCLEUS = OUTLINE + 4
KIND, DARKNESS, TEXTURE, ID = range(OUTLINE, NUCLEUS)
"""Columns of a nucleus after its outline; ids stay below 2**31 and are exact in a float64."""


@compiled
def hash_unit(i: int, j: int, seed: int) -> float:
    """Pseudo-random number in [0, 1) of an integer place (the finaliser of SplitMix64)."""
    z = np.uint64(i) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(j) * np.uint64(0xC2B2AE3D27D4EB4F)
    z += np.uint64(seed) * np.uint64(0xD6E8FEB86659FD93) + np.uint64(0x632BE59BD9B4E019)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return float(z >> np.uint64(40)) / 16777216.0


@compiled
def noise(x: float, y: float, scale: float, seed: int) -> float:
    """Smooth value noise in [-1, 1] whose features are about ``scale`` wide."""
    x, y = x / scale, y / scale
    i, j = int(np.floor(x)), int(np.floor(y))
    fx, fy = x - i, y - j
    fx, fy = fx * fx * (3.0 - 2.0 * fx), fy * fy * (3.0 - 2.0 * fy)
    top = hash_unit(i, j, seed) * (1.0 - fx) + hash_unit(i + 1, j, seed) * fx
    bottom = hash_unit(i, j + 1, seed) * (1.0 - fx) + hash_unit(i + 1, j + 1, seed) * fx
    return float(2.0 * (top * (1.0 - fy) + bottom * fy) - 1.0)


@compiled
def depth_inside(outline: NDArray[np.float64], x: float, y: float) -> float:
    """About how far (µm) a point lies inside an outline; 0 on it, negative outside."""
    dx, dy = x - outline[0], y - outline[1]
    u = (dx * outline[4] + dy * outline[5]) / outline[2]
    v = (dy * outline[4] - dx * outline[5]) / outline[3]
    rho = np.sqrt(u * u + v * v)
    least = min(outline[2], outline[3])
    if rho < 1e-9:
        return float(least)
    c1, s1 = u / rho, v / rho
    c2, s2 = c1 * c1 - s1 * s1, 2.0 * c1 * s1
    c3, s3 = c2 * c1 - s2 * s1, s2 * c1 + c2 * s1
    c4, s4 = c2 * c2 - s2 * s2, 2.0 * c2 * s2
    edge = 1.0 + outline[6] * c2 + outline[7] * s2 + outline[8] * c3 + outline[9] * s3 + outline[10] * c4
    return float((1.0 - rho / (edge + outline[11] * s4)) * least)


@compiled
def tissue_depth(x: float, y: float, pieces: NDArray[np.float64], seed: int) -> float:
    """Depth (µm) inside the nearest piece of tissue, with a ragged edge."""
    best = -1e9
    for k in range(pieces.shape[0]):
        size = min(pieces[k, 2], pieces[k, 3])
        coarse = 0.12 * size * noise(x, y, 0.45 * size + 1.0, seed + 1)
        best = max(best, depth_inside(pieces[k], x, y) + coarse)
    ragged = 30.0 * noise(x, y, 190.0, seed + 16) + 13.0 * noise(x, y, 62.0, seed + 2)
    return best + ragged + 5.0 * noise(x, y, 16.0, seed + 3)


@compiled
def tumour_depth(x: float, y: float, tumours: NDArray[np.float64], seed: int) -> float:
    """Depth (µm) inside the nearest tumour region."""
    best = -1e9
    for k in range(tumours.shape[0]):
        best = max(best, depth_inside(tumours[k], x, y))
    if best < -100.0:
        return best
    return best + 28.0 * noise(x, y, 130.0, seed + 4) + 9.0 * noise(x, y, 38.0, seed + 5)


@compiled
def nest_depth(x: float, y: float, seed: int) -> float:
    """Depth (µm) inside a nest of tumour cells; septa of stroma run between nests."""
    wide = noise(x, y, 95.0, seed + 6) + 0.45 * noise(x, y, 40.0, seed + 7)
    return 34.0 * (abs(wide) - 0.14)


@compiled
def fibre_phase(x: float, y: float, seed: int) -> float:
    """Phase (rad) whose lines of equal value are the fibres of the stroma."""
    bend = 22.0 * noise(x, y, 160.0, seed + 8) + 9.0 * noise(x, y, 60.0, seed + 9)
    return bend + 0.16 * (0.8 * x + 0.6 * y)


@compiled
def fill_fields(
    fields: NDArray[np.float32],
    first: NDArray[np.int64],
    step: int,
    mpp: float,
    pieces: NDArray[np.float64],
    tumours: NDArray[np.float64],
    seed: int,
) -> None:
    """Fill ``fields`` (FIELDS, rows, columns) at the lattice nodes whose first column and row are ``first``."""
    for r in range(fields.shape[1]):
        y = ((first[1] + r) * step + 0.5) * mpp
        for c in range(fields.shape[2]):
            x = ((first[0] + c) * step + 0.5) * mpp
            depth = tissue_depth(x, y, pieces, seed)
            fields[TISSUE, r, c] = depth
            if depth > -20.0:
                fields[TUMOUR, r, c] = tumour_depth(x, y, tumours, seed)
                fields[NEST, r, c] = nest_depth(x, y, seed)
                fields[FIBRE, r, c] = fibre_phase(x, y, seed) + 1.3 * noise(x, y, 14.0, seed + 10)
                fields[TINT, r, c] = 0.65 * noise(x, y, 420.0, seed + 11) + 0.35 * noise(x, y, 90.0, seed + 12)
                fields[GAP, r, c] = noise(x, y, 30.0, seed + 13)


@compiled
def find_gland(
    gland: NDArray[np.float64],
    i: int,
    j: int,
    pieces: NDArray[np.float64],
    tumours: NDArray[np.float64],
    frequency: float,
    seed: int,
) -> bool:
    """Whether gland cell (i, j) holds a gland; fills ``gland`` (13): its outline, and its lumen as a fraction."""
    salt = seed + 100
    crowd = 0.5 + 0.5 * noise(i * 1.0, j * 1.0, 3.7, salt)
    if hash_unit(i, j, salt + 1) > frequency * (0.45 + 0.9 * crowd):
        return False
    radius = 25.0 + 26.0 * hash_unit(i, j, salt + 2) ** 1.6
    free = GLAND_PITCH / 2 - 1.12 * radius - 4.0
    shift = GLAND_PITCH * hash_unit(j, 0, salt + 15)
    gland[0] = i * GLAND_PITCH + shift + GLAND_PITCH / 2 + free * (2.0 * hash_unit(i, j, salt + 3) - 1.0)
    gland[1] = j * GLAND_PITCH + GLAND_PITCH / 2 + free * (2.0 * hash_unit(i, j, salt + 4) - 1.0)
    if tissue_depth(gland[0], gland[1], pieces, seed) < radius + 8.0:
        return False
    if tumour_depth(gland[0], gland[1], tumours, seed) > -radius - 25.0:
        return False
    turn = np.pi * hash_unit(i, j, salt + 5)
    gland[2], gland[3] = radius, radius * (0.72 + 0.26 * hash_unit(i, j, salt + 6))
    gland[4], gland[5] = np.cos(turn), np.sin(turn)
    for k in range(6):
        gland[6 + k] = 0.05 * (2.0 * hash_unit(i, j, salt + 7 + k) - 1.0)
    gland[OUTLINE] = 0.28 + 0.24 * hash_unit(i, j, salt + 14)
    return True


@compiled
def fill_gland_nuclei(gland: NDArray[np.float64], first_id: int, seed: int, nuclei: NDArray[np.float64]) -> int:
    """Ring of epithelial nuclei along the base of a gland; returns how many rows of ``nuclei`` were filled."""
    salt = seed + 200
    count = min(GLAND_SLOTS, int(2.0 * np.pi * 0.8 * 0.5 * (gland[2] + gland[3]) / 6.3))
    for k in range(count):
        angle = 2.0 * np.pi * (k + 0.42 * (hash_unit(first_id, k, salt) - 0.5)) / count
        ring = 1.0 - (6.4 + 2.6 * hash_unit(first_id, k, salt + 1)) / gland[3]
        u, v = np.cos(angle) * ring * gland[2], np.sin(angle) * ring * gland[3]
        edge = 1.0
        for m in range(3):
            turn = (m + 2) * angle
            edge += gland[6 + 2 * m] * np.cos(turn) + gland[7 + 2 * m] * np.sin(turn)
        u, v = u * edge, v * edge
        row = nuclei[k]
        row[0] = gland[0] + u * gland[4] - v * gland[5]
        row[1] = gland[1] + u * gland[5] + v * gland[4]
        row[2] = 3.9 + 1.0 * hash_unit(first_id, k, salt + 2)
        row[3] = 2.5 + 0.6 * hash_unit(first_id, k, salt + 3)
        away = np.arctan2(row[1] - gland[1], row[0] - gland[0]) + 0.5 * (hash_unit(first_id, k, salt + 4) - 0.5)
        row[4], row[5] = np.cos(away), np.sin(away)
        for m in range(6):
            row[6 + m] = 0.04 * (2.0 * hash_unit(first_id, k, salt + 5 + m) - 1.0)
        row[KIND] = EPITHELIAL
        row[DARKNESS] = 0.92 + 0.28 * hash_unit(first_id, k, salt + 12)
        row[TEXTURE] = 0.24
        row[ID] = first_id + k
    return count


@compiled
def choose_kind(
    x: float, y: float, pieces: NDArray[np.float64], tumours: NDArray[np.float64], density: float, u: float, seed: int
) -> int:
    """Kind of a nucleus that might stand at a point outside glands, or -1; ``u`` in [0, 1) decides."""
    if tissue_depth(x, y, pieces, seed) < 6.0:
        return -1
    inside = tumour_depth(x, y, tumours, seed)
    if min(inside, nest_depth(x, y, seed)) > 2.0:
        return TUMOUR_CELL if u < density else -1
    crowd = noise(x, y, 210.0, seed + 14) + 0.5 * noise(x, y, 60.0, seed + 15) + (0.35 if inside > -60.0 else 0.0)
    lymphocytes = 0.03 + 0.75 * min(1.0, max(0.0, 1.7 * (crowd - 0.42)))
    if u < lymphocytes * density:
        return LYMPHOCYTE
    return FIBROBLAST if u < (lymphocytes + 0.24) * density else -1


@compiled
def fill_nucleus(row: NDArray[np.float64], kind: int, i: int, j: int, seed: int) -> None:
    """Shape and stain of the nucleus of cell (i, j); its centre stands in ``row`` already."""
    salt = seed + 300
    size, oval = hash_unit(i, j, salt), hash_unit(i, j, salt + 1)
    wobble, turn = 0.03, 2.0 * np.pi * hash_unit(i, j, salt + 2)
    row[KIND] = kind
    row[DARKNESS] = 1.0 + 0.3 * hash_unit(i, j, salt + 3)
    row[TEXTURE] = 0.2
    if kind == LYMPHOCYTE:
        row[2] = 2.6 + 0.7 * size
        row[3] = row[2] * (0.86 + 0.14 * oval)
        row[DARKNESS] += 0.32
        row[TEXTURE] = 0.26
    elif kind == FIBROBLAST:
        row[2], row[3] = 5.4 + 3.0 * size, 1.25 + 0.65 * oval
        slope_x = fibre_phase(row[0] + 4.0, row[1], seed) - fibre_phase(row[0] - 4.0, row[1], seed)
        slope_y = fibre_phase(row[0], row[1] + 4.0, seed) - fibre_phase(row[0], row[1] - 4.0, seed)
        turn = np.arctan2(slope_x, -slope_y) + 0.4 * (hash_unit(i, j, salt + 2) - 0.5)
        row[DARKNESS] -= 0.05
    else:
        row[2] = 4.6 + 2.6 * size * size + 0.6 * oval
        row[3] = row[2] * (0.66 + 0.3 * oval)
        row[DARKNESS] += 0.5 * hash_unit(i, j, salt + 4) - 0.3
        row[TEXTURE] = 0.38
        wobble = 0.08
    row[4], row[5] = np.cos(turn), np.sin(turn)
    for m in range(6):
        row[6 + m] = wobble * (2.0 * hash_unit(i, j, salt + 5 + m) - 1.0) * (0.5 if m > 3 else 1.0)


@compiled
def thin_out(nuclei: NDArray[np.float64], rank: NDArray[np.float64], keep: NDArray[np.bool_]) -> None:
    """Drop each nucleus that a neighbour of higher rank crowds (Matérn's hard-core process of type II).

    ``nuclei`` (rows, columns, NUCLEUS), one per cell; ``rank`` is negative where a cell is empty. The outer two rows
    and columns only crowd others.
    """
    for r in range(2, nuclei.shape[0] - 2):
        for c in range(2, nuclei.shape[1] - 2):
            if rank[r, c] < 0.0:
                continue
            keep[r, c] = True
            one = nuclei[r, c]
            for dr in range(-2, 3):
                for dc in range(-2, 3):
                    if rank[r + dr, c + dc] > rank[r, c]:
                        other = nuclei[r + dr, c + dc]
                        room = 0.43 * (one[2] + one[3] + other[2] + other[3])
                        if (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2 < room * room:
                            keep[r, c] = False
