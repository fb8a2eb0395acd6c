"""Draw a synthetic slide: nuclei by rectangle with their labels, and stained tissue by optical density.

Every pixel is a function of its place alone, so that rectangles which overlap agree to the bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled
from wsi_engine.kernels.paint_scene import (
    CELL_PITCH,
    DARKNESS,
    FIBRE,
    GAP,
    GLAND_PITCH,
    GLAND_SLOTS,
    ID,
    KIND,
    NEST,
    NUCLEUS,
    OUTLINE,
    REACH,
    TEXTURE,
    TINT,
    TISSUE,
    TUMOUR,
    TUMOUR_CELL,
    choose_kind,
    depth_inside,
    fill_gland_nuclei,
    fill_nucleus,
    find_gland,
    hash_unit,
    noise,
    thin_out,
)

FAR = -100.0
"""Depth (µm) where there is nothing."""


@compiled
def list_glands(
    box: NDArray[np.float64],
    cells: NDArray[np.int64],
    pieces: NDArray[np.float64],
    tumours: NDArray[np.float64],
    frequency: float,
    seed: int,
) -> NDArray[np.float64]:
    """Glands that may touch ``box`` (x0, y0, x1, y1; µm): (G, 14) outline, lumen fraction, first nucleus id.

    ``cells`` (2) is the number of gland cells along x and y of the whole slide.
    """
    j0, j1 = max(0, int(box[1] // GLAND_PITCH) - 1), min(cells[1], int(box[3] // GLAND_PITCH) + 2)
    i0, i1 = max(0, int(box[0] // GLAND_PITCH) - 2), min(cells[0], int(box[2] // GLAND_PITCH) + 2)
    out = np.empty((max(0, j1 - j0) * max(0, i1 - i0), OUTLINE + 2), np.float64)
    count = 0
    for j in range(j0, j1):
        for i in range(i0, i1):
            if find_gland(out[count], i, j, pieces, tumours, frequency, seed):
                out[count, OUTLINE + 1] = 1 + (j * cells[0] + i) * GLAND_SLOTS
                count += 1
    return out[:count]


@compiled
def list_nuclei(
    box: NDArray[np.float64],
    size: NDArray[np.float64],
    glands: NDArray[np.float64],
    gland_cells: NDArray[np.int64],
    pieces: NDArray[np.float64],
    tumours: NDArray[np.float64],
    density: float,
    seed: int,
) -> NDArray[np.float64]:
    """Nuclei that may touch ``box`` (µm): (M, NUCLEUS). ``size`` (2) is the slide's width and height in µm."""
    reach = REACH + CELL_PITCH
    c0, r0 = int((box[0] - reach) // CELL_PITCH) - 2, int((box[1] - reach) // CELL_PITCH) - 2
    c1, r1 = int((box[2] + reach) // CELL_PITCH) + 3, int((box[3] + reach) // CELL_PITCH) + 3
    across = int(size[0] // CELL_PITCH) + 1
    nuclei = np.zeros((r1 - r0, c1 - c0, NUCLEUS), np.float64)
    rank = np.full((r1 - r0, c1 - c0), -1.0)
    first_id = 1 + gland_cells[0] * gland_cells[1] * GLAND_SLOTS
    for r in range(r1 - r0):
        for c in range(c1 - c0):
            i, j = c0 + c, r0 + r
            x = (i + hash_unit(i, j, seed + 20)) * CELL_PITCH
            y = (j + hash_unit(i, j, seed + 21)) * CELL_PITCH
            if x < 0.0 or y < 0.0 or x >= size[0] or y >= size[1]:
                continue
            kind = choose_kind(x, y, pieces, tumours, density, hash_unit(i, j, seed + 22), seed)
            taken = kind < 0
            for g in range(glands.shape[0]):
                taken = taken or depth_inside(glands[g], x, y) > -6.0
            if not taken:
                row = nuclei[r, c]
                row[0], row[1] = x, y
                fill_nucleus(row, kind, i, j, seed)
                row[ID] = first_id + j * across + i
                rank[r, c] = hash_unit(i, j, seed + 23) + (1.0 if kind == TUMOUR_CELL else 0.0)
    keep = np.zeros(rank.shape, np.bool_)
    thin_out(nuclei, rank, keep)
    out = np.empty((keep.sum() + glands.shape[0] * GLAND_SLOTS, NUCLEUS), np.float64)
    count = 0
    for g in range(glands.shape[0]):
        count += fill_gland_nuclei(glands[g], int(glands[g, OUTLINE + 1]), seed, out[count:])
    for r in range(keep.shape[0]):
        for c in range(keep.shape[1]):
            if keep[r, c]:
                out[count] = nuclei[r, c]
                count += 1
    return out[:count]


@compiled
def draw_depths(
    outlines: NDArray[np.float64],
    origin: NDArray[np.int64],
    mpp: float,
    margin: float,
    depths: NDArray[np.float32],
    owners: NDArray[np.int32],
) -> None:
    """Depth (µm) inside the outline in which each pixel lies deepest, and that outline's row.

    ``depths`` (H, W) starts as FAR and ``owners`` as -1; ``origin`` is the first pixel's x, y. Pixels up to
    ``margin`` µm outside an outline are filled too. Equal depths go to the outline of the lower row.
    """
    height, width = depths.shape
    for k in range(outlines.shape[0]):
        outline = outlines[k]
        reach = 1.32 * max(outline[2], outline[3]) + margin
        x0 = max(0, int(np.floor((outline[0] - reach) / mpp)) - origin[0])
        x1 = min(width, int(np.ceil((outline[0] + reach) / mpp)) - origin[0])
        y0 = max(0, int(np.floor((outline[1] - reach) / mpp)) - origin[1])
        y1 = min(height, int(np.ceil((outline[1] + reach) / mpp)) - origin[1])
        for y in range(y0, y1):
            for x in range(x0, x1):
                depth = depth_inside(outline, (origin[0] + x + 0.5) * mpp, (origin[1] + y + 0.5) * mpp)
                if depth > -margin and np.float32(depth) > depths[y, x]:
                    depths[y, x] = depth
                    owners[y, x] = k


@compiled
def spread_field(
    lattice: NDArray[np.float32],
    first: NDArray[np.int64],
    step: int,
    origin: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:
    """Bilinear values of a lattice at every pixel of ``out`` (H, W); node k stands at pixel k · ``step``."""
    for y in range(out.shape[0]):
        row = (origin[1] + y) // step
        fy = (origin[1] + y - row * step) / step
        top, bottom = lattice[row - first[1]], lattice[row - first[1] + 1]
        for x in range(out.shape[1]):
            column = (origin[0] + x) // step
            fx = (origin[0] + x - column * step) / step
            c = column - first[0]
            above = top[c] * (1.0 - fx) + top[c + 1] * fx
            below = bottom[c] * (1.0 - fx) + bottom[c + 1] * fx
            out[y, x] = above * (1.0 - fy) + below * fy


@compiled
def ramp(value: float) -> float:
    """Smooth step from 0 at -0.5 to 1 at 0.5."""
    t = min(1.0, max(0.0, value + 0.5))
    return t * t * (3.0 - 2.0 * t)


@compiled
def stain_ground(x: float, y: float, field: NDArray[np.float32], seed: int) -> tuple[float, float]:
    """Haematoxylin and eosin of stroma or tumour cytoplasm at a point, from its values of the six fields."""
    fine, grain = noise(x, y, 2.4, seed + 30), noise(x, y, 0.9, seed + 31)
    strand = np.sin(field[FIBRE])
    thread = np.sin(3.1 * field[FIBRE] + 1.5 * fine)
    gap = ramp((-strand + 1.1 * field[GAP] - 1.05) / 0.6)
    eosin = 0.50 + 0.10 * field[TINT] + 0.12 * strand + 0.05 * thread + 0.06 * fine + 0.04 * grain
    eosin *= 1.0 - 0.82 * gap
    haematoxylin = (0.075 + 0.02 * fine) * (1.0 - 0.8 * gap)
    nest = ramp(min(field[TUMOUR], field[NEST]) / 5.0)
    if nest > 0.0:
        cloud, pale = noise(x, y, 7.0, seed + 33), ramp((noise(x, y, 11.0, seed + 34) - 0.55) / 0.5)
        haematoxylin += nest * (0.24 + 0.05 * field[TINT] + 0.07 * cloud + 0.05 * fine - 0.1 * pale - haematoxylin)
        eosin += nest * (0.41 + 0.06 * field[TINT] + 0.08 * cloud + 0.06 * fine + 0.04 * grain - 0.2 * pale - eosin)
    return haematoxylin, eosin


@compiled
def stain_nucleus(x: float, y: float, depth: float, nucleus: NDArray[np.float64], seed: int) -> float:
    """Haematoxylin inside a nucleus: chromatin in clumps, a darker membrane, nucleoli in tumour cells."""
    salt = seed + 40 + int(nucleus[ID]) % 977
    clumps = 0.6 * noise(x, y, 1.9, salt) + 0.5 * noise(x, y, 0.8, salt + 1)
    dark = nucleus[DARKNESS] * (1.0 + nucleus[TEXTURE] * clumps + 0.22 * ramp(0.6 - depth))
    if nucleus[KIND] == TUMOUR_CELL:
        dark += 0.55 * ramp((noise(x, y, 2.6, salt + 2) - 0.62) / 0.2) * ramp(depth - 1.5)
    return float(dark)


@compiled
def render(
    rgb: NDArray[np.float32],
    fields: NDArray[np.float32],
    gland_depths: NDArray[np.float32],
    gland_owners: NDArray[np.int32],
    glands: NDArray[np.float64],
    depths: NDArray[np.float32],
    owners: NDArray[np.int32],
    nuclei: NDArray[np.float64],
    stains: NDArray[np.float64],
    origin: NDArray[np.int64],
    mpp: float,
    seed: int,
) -> None:
    """Fill ``rgb`` (H, W, 3), 0 to 255, by Beer and Lambert's law: I = 255 · exp(-(c_H · v_H + c_E · v_E)).

    ``fields`` (H, W, FIELDS); ``stains`` (3, 3): optical density of glass, and per unit of each stain.
    """
    for row in range(rgb.shape[0]):
        y = (origin[1] + row + 0.5) * mpp
        for column in range(rgb.shape[1]):
            x = (origin[0] + column + 0.5) * mpp
            field = fields[row, column]
            haematoxylin, eosin = 0.0, 0.0
            cover = ramp(field[TISSUE] / 7.0)
            if cover > 0.0:
                haematoxylin, eosin = stain_ground(x, y, field, seed)
                g = gland_owners[row, column]
                if g >= 0:
                    deep = gland_depths[row, column]
                    lumen = deep - (1.0 - glands[g, OUTLINE]) * min(glands[g, 2], glands[g, 3])
                    body = ramp(deep / 2.0)
                    pale = ramp((lumen + 5.0 + 2.0 * field[GAP]) / 9.0)
                    mottle = noise(x, y, 3.1, seed + 32)
                    haematoxylin += body * (0.19 - 0.12 * pale + 0.04 * mottle - haematoxylin)
                    eosin += body * (0.44 - 0.16 * pale + 0.07 * mottle - eosin)
                    eosin += 0.16 * (1.0 - min(1.0, abs(deep + 0.6)))
                    empty = 1.0 - 0.95 * ramp((lumen + 1.2 * mottle) / 2.5)
                    haematoxylin, eosin = haematoxylin * empty, eosin * empty
                k = owners[row, column]
                if k >= 0:
                    deep = depths[row, column]
                    inside = ramp(deep / 0.9)
                    haematoxylin += inside * (stain_nucleus(x, y, deep, nuclei[k], seed) - haematoxylin)
                    eosin *= 1.0 - 0.45 * inside
                haematoxylin, eosin = haematoxylin * cover, max(0.0, eosin * cover)
            for band in range(3):
                density = stains[0, band] + haematoxylin * stains[1, band] + eosin * stains[2, band]
                rgb[row, column, band] = 255.0 * np.exp(-density)


@compiled
def stroke_depth(
    strokes: NDArray[np.float64],
    origin: NDArray[np.int64],
    mpp: float,
    depths: NDArray[np.float32],
    pens: NDArray[np.int32],
) -> None:
    """Depth (µm) inside the pen strokes and which pen; ``strokes`` (S, 6): x0, y0, x1, y1, half width, pen."""
    for row in range(depths.shape[0]):
        y = (origin[1] + row + 0.5) * mpp
        for column in range(depths.shape[1]):
            x = (origin[0] + column + 0.5) * mpp
            for s in range(strokes.shape[0]):
                dx, dy = strokes[s, 2] - strokes[s, 0], strokes[s, 3] - strokes[s, 1]
                t = ((x - strokes[s, 0]) * dx + (y - strokes[s, 1]) * dy) / (dx * dx + dy * dy)
                t = min(1.0, max(0.0, t))
                gap = np.hypot(x - strokes[s, 0] - t * dx, y - strokes[s, 1] - t * dy)
                if strokes[s, 4] - gap > depths[row, column]:
                    depths[row, column] = strokes[s, 4] - gap
                    pens[row, column] = int(strokes[s, 5])


@compiled
def ink(
    rgb: NDArray[np.float32],
    depths: NDArray[np.float32],
    pens: NDArray[np.int32],
    colours: NDArray[np.float64],
    origin: NDArray[np.int64],
    mpp: float,
    seed: int,
) -> None:
    """Lay pen ink over ``rgb``; ``colours`` (P, 3) are optical densities."""
    for row in range(rgb.shape[0]):
        for column in range(rgb.shape[1]):
            if pens[row, column] >= 0:
                x, y = (origin[0] + column + 0.5) * mpp, (origin[1] + row + 0.5) * mpp
                amount = ramp(depths[row, column] / 12.0) * (1.0 + 0.2 * noise(x, y, 24.0, seed + 50))
                for band in range(3):
                    rgb[row, column, band] *= np.exp(-amount * colours[pens[row, column], band])


@compiled
def digitise(
    rgb: NDArray[np.float32], origin: NDArray[np.int64], grain: float, seed: int, out: NDArray[np.uint8]
) -> None:
    """Add the camera's noise (about ``grain`` levels r.m.s., the same in the three bands) and round to ``out``."""
    for row in range(rgb.shape[0]):
        y = origin[1] + row
        for column in range(rgb.shape[1]):
            x = origin[0] + column
            shake = hash_unit(x, y, seed + 60) + hash_unit(x, y, seed + 61) - 1.0  # triangular, r.m.s. 0.408
            for band in range(3):
                value = rgb[row, column, band] + 2.45 * grain * shake
                out[row, column, band] = np.uint8(min(255.0, max(0.0, value + 0.5)))
