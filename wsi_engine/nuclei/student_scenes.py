"""Painted tissue for the student: scenes in concentrations of stain, with the exact label of every nucleus.

A scene is not meant to look like one organ. It is drawn at random over far more than real tissue shows (density of
nuclei, their size, shape, chromatin and staining, the ground they lie on, things that look like nuclei and are none),
so that what a network learns from it is what all of that has in common: a nucleus is a closed, smooth, bounded body.

Source of the idea: L. Hou et al., "Robust histopathology image analysis: to label or to synthesize?", CVPR 2019;
J. Tobin et al., "Domain randomization", IROS 2017.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float32]
Rng = np.random.Generator

_RIMS = (0.5, 0.7, 0.9, 1.2, 1.6, 2.4)
"""Widths in pixels over which the stain of a nucleus fades: most lie in the focal plane, some do not."""

SCENE_MPP = 0.5
"""Micrometres per pixel of a scene."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A painted field.

    ``density`` float32 (H, W, 3): concentrations of haematoxylin, eosin and a third pigment; ``labels`` int32 (H, W):
    nuclei 1 … n, 0 elsewhere.
    """

    density: Floats
    labels: NDArray[np.int32]


@dataclass(frozen=True)
class _Kind:
    """Nuclei of one kind: sizes in µm, stain in optical density."""

    radius: float
    spread: float
    elongation: float
    depth: float
    vesicular: float
    grain: float
    share: float
    crowding: float
    eosin: float


def paint_scene(rng: Rng, side: int) -> Scene:
    """Draw a scene of ``side`` × ``side`` pixels at 0.5 µm; all chance comes from ``rng``."""
    haematoxylin, eosin, third = _paint_ground(rng, side)
    labels = np.zeros((side, side), np.int32)
    _scatter_decoys(rng, haematoxylin, eosin, third)
    if rng.random() < 0.45:
        _open_vacuoles(rng, haematoxylin, eosin)
    kinds = [_draw_kind(rng) for _ in range(int(rng.integers(1, 4)))]
    regions = _noise(rng, side, float(rng.uniform(12, 40)))
    flow = _noise(rng, side, float(rng.uniform(15, 60))) * float(rng.uniform(0.2, 1.5)) + float(rng.uniform(0, np.pi))
    cuts = np.quantile(regions, np.linspace(0, 1, len(kinds) + 1)[1:-1])
    which = np.digitize(regions, cuts)
    order = [(kind, y, x) for kind in range(len(kinds)) for y, x in _places(rng, kinds[kind], which == kind)]
    if rng.random() < 0.6:
        _paint_cells(rng, order, kinds, haematoxylin, eosin)
    halo = float(rng.uniform(0, 0.4)) if rng.random() < 0.5 else 0.0
    for count, row in enumerate(rng.permutation(len(order)), start=1):
        kind, y, x = order[row]
        angle = float(flow[int(y), int(x)] + rng.normal(0, 0.35))
        _paint_nucleus(rng, kinds[kind], (y, x, angle), count, haematoxylin, eosin, labels, halo)
    density = np.stack([haematoxylin, eosin, third], axis=-1)
    return Scene(np.maximum(density, 0).astype(np.float32), _drop_slivers(labels))


def add_nuclei(
    rng: Rng, haematoxylin: Floats, eosin: Floats, labels: NDArray[np.int32], level: float, most: int
) -> None:
    """Paint up to ``most`` nuclei of one kind over a ground (H, W) that is there, and label them from the greatest on.

    ``level``: haematoxylin of the usual nucleus of that ground, which those of a scene have at about 0.75.
    """
    kind = _draw_kind(rng)
    kind = replace(kind, depth=kind.depth * level / 0.75)
    height, width = labels.shape
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    spread = 2 * kind.radius / SCENE_MPP * np.sqrt(most) * float(rng.uniform(0.4, 1.5))
    direction, number = float(rng.uniform(0, np.pi)), int(labels.max(initial=0))
    for one in range(1, most + 1):
        place = (y + float(rng.normal(0, spread)), x + float(rng.normal(0, spread)), direction + rng.normal(0, 0.35))
        if 0 <= place[0] < height and 0 <= place[1] < width:
            _paint_nucleus(rng, kind, place, number + one, haematoxylin, eosin, labels, 0.1)


def _noise(rng: Rng, side: int, sigma: float, stretch: float = 1.0) -> Floats:
    """Gaussian noise of a grain (pixels), mean 0 and deviation 1; ``stretch`` draws it out in a random direction."""
    coarse = max(1, int(sigma / 3))
    small = -(-side // coarse) + 8
    noise = rng.standard_normal((small, small)).astype(np.float32)
    sigmas = (sigma / coarse, sigma / coarse * stretch)
    noise = ndimage.gaussian_filter(noise, sigmas, mode="wrap")
    if stretch > 1:
        noise = ndimage.rotate(noise, float(rng.uniform(0, 180)), reshape=False, order=1, mode="grid-wrap")
    if coarse > 1:
        noise = ndimage.zoom(noise, coarse, order=1)
    noise = noise[:side, :side]
    return np.asarray((noise - noise.mean()) / (noise.std() + 1e-6), dtype=np.float32)


def _paint_ground(rng: Rng, side: int) -> tuple[Floats, Floats, Floats]:
    """Concentrations of haematoxylin, eosin and pigment of tissue without nuclei, with gaps of empty glass."""
    eosin_level, eosin_grain = rng.uniform(0.05, 0.75), rng.uniform(0.0, 0.16)
    basic_level, basic_grain = rng.choice([rng.uniform(0, 0.12), rng.uniform(0.05, 0.45)]), rng.uniform(0, 0.1)
    stretch = float(rng.uniform(1, 8))
    fibres = _noise(rng, side, float(rng.uniform(1.0, 3.5)), stretch)
    eosin = eosin_level * (1 + 0.35 * _noise(rng, side, float(rng.uniform(6, 30)))) + eosin_grain * fibres
    common = _noise(rng, side, float(rng.uniform(2, 12)))
    basic = basic_level * (1 + 0.3 * _noise(rng, side, float(rng.uniform(8, 40)))) + basic_grain * common
    fine = _noise(rng, side, float(rng.uniform(0.6, 1.5)))
    basic += float(rng.uniform(0, 0.05)) * fine
    eosin += float(rng.uniform(0, 0.1)) * fine
    third = float(rng.uniform(0, 0.04)) * _noise(rng, side, 4.0)
    if rng.random() < 0.65:
        field = _noise(rng, side, float(rng.uniform(3, 25))) + 0.3 * _noise(rng, side, 2.0)
        edge = np.quantile(field, rng.uniform(0.02, 0.8 if rng.random() < 0.3 else 0.4))
        tissue = 1 / (1 + np.exp(-np.clip((field - edge) * rng.uniform(3, 25), -30, 30)))
        tissue = np.maximum(tissue, float(rng.choice([0.0, rng.uniform(0, 0.4)])))
        eosin, basic = eosin * tissue, basic * tissue
    return basic.astype(np.float32), eosin.astype(np.float32), third.astype(np.float32)


def _scatter_decoys(rng: Rng, haematoxylin: Floats, eosin: Floats, third: Floats) -> None:
    """Paint what is no nucleus: red cells, blurred nuclei of another focal plane, crumbs, strands and pigment."""
    side = len(eosin)
    area = (side * SCENE_MPP / 100) ** 2  # in squares of 100 µm
    if rng.random() < 0.35:
        level = float(rng.uniform(0.3, 1.3))
        for _ in range(rng.poisson(12 * area)):
            _stamp(eosin, rng, float(rng.uniform(2.2, 4.0)), level * float(rng.uniform(0.7, 1.3)), 1.3, 0.5)
    if rng.random() < 0.4:
        for _ in range(rng.poisson(4 * area)):
            _stamp(haematoxylin, rng, float(rng.uniform(2, 7)), float(rng.uniform(0.04, 0.2)), 2.0, 5.0)
    if rng.random() < 0.4:
        for _ in range(rng.poisson(8 * area)):
            _stamp(haematoxylin, rng, float(rng.uniform(0.4, 1.0)), float(rng.uniform(0.1, 0.8)), 1.5, 0.5)
    if rng.random() < 0.5:
        strands = np.exp(-((_noise(rng, side, float(rng.uniform(5, 20)), 2.0) / rng.uniform(0.03, 0.12)) ** 2))
        eosin += strands * float(rng.uniform(0, 0.6))
        haematoxylin += strands * float(rng.uniform(0, 0.3))
    if rng.random() < 0.1:
        for _ in range(rng.poisson(5 * area)):
            _stamp(third, rng, float(rng.uniform(0.5, 4)), float(rng.uniform(0.3, 1.0)), 2.0, 1.0)


def _open_vacuoles(rng: Rng, haematoxylin: Floats, eosin: Floats) -> None:
    """Empty round holes with a sharp rim: fat, foam, mucus, torn cells."""
    side = len(eosin)
    usual, rim = float(np.exp(rng.uniform(np.log(1.0), np.log(10.0)))), float(rng.uniform(-0.1, 0.4))
    share = float(rng.uniform(0.02, 0.5))
    emptied = float(rng.uniform(0.6, 1.0))
    for _ in range(min(600, int(share * (side * SCENE_MPP) ** 2 / (np.pi * usual**2)) + 1)):
        radius = usual * float(np.exp(rng.normal(0, 0.35))) / SCENE_MPP
        shape = (radius, float(rng.uniform(1, 1.6)), float(rng.uniform(0, np.pi)))
        window, depth, _ = _body(rng, tuple(rng.uniform(0, side, 2)), shape, side, margin=2.0, bumps=0.12)
        if window is None:
            continue
        inside = emptied / (1 + np.exp(-np.clip(4 * depth, -30, 30)))
        haematoxylin[window] *= 1 - inside
        eosin[window] = eosin[window] * (1 - inside) + rim * np.exp(-((depth + 0.5) ** 2))


def _stamp(layer: Floats, rng: Rng, radius_um: float, level: float, elongation: float, soft: float) -> None:
    """Add one body at a random place to a layer; ``soft`` is the width of its rim in pixels."""
    y, x = rng.uniform(0, len(layer), 2)
    shape = (radius_um / SCENE_MPP, float(rng.uniform(1, elongation)), float(rng.uniform(0, np.pi)))
    window, depth, _ = _body(rng, (y, x), shape, len(layer), margin=soft, bumps=0.08)
    if window is not None:
        layer[window] += level / (1 + np.exp(-np.clip(4 * depth / soft, -30, 30)))


def _draw_kind(rng: Rng) -> _Kind:
    """A kind of nuclei: small round dark ones, long thin ones, or large ones that may be pale inside."""
    style = rng.random()
    common = {"spread": float(rng.uniform(0.05, 0.3)), "grain": float(rng.uniform(0, 0.45))}
    packing = {
        "share": float(rng.beta(1.3, 1.6)) * 0.95,
        "crowding": float(rng.uniform(0.6, 1.3)),
        "eosin": float(rng.uniform(0, 1.2)) if rng.random() < 0.5 else 0.0,
    }
    if style < 0.33:
        return _Kind(
            rng.uniform(1.8, 3.6), elongation=1.25, depth=rng.uniform(0.35, 1.4), vesicular=0, **common, **packing
        )
    if style < 0.58:
        elongation = rng.uniform(1.6, 4.0)
        return _Kind(
            rng.uniform(1.8, 4.0),
            elongation=elongation,
            depth=rng.uniform(0.25, 1.2),
            vesicular=0.2,
            **common,
            **packing,
        )
    vesicular = rng.uniform(0, 0.95)
    return _Kind(
        rng.uniform(3.0, 7.5),
        elongation=rng.uniform(1.1, 1.8),
        depth=rng.uniform(0.25, 1.1),
        vesicular=vesicular,
        **common,
        **packing,
    )


def _places(rng: Rng, kind: _Kind, region: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Centres of nuclei of a kind within its region, apart by ``crowding`` diameters; some of the darts are missing."""
    side = len(region)
    step = 2 * kind.radius / SCENE_MPP * kind.crowding
    jitter = float(rng.uniform(0.1, 0.5))
    rows = np.arange(-0.5, side / step + 0.5)
    grid = np.stack(np.meshgrid(rows, rows, indexing="ij"), -1).reshape(-1, 2)
    grid[:, 1] += 0.5 * (np.round(grid[:, 0]) % 2)
    centres = (grid + rng.normal(0, jitter, grid.shape) * 0.6 + rng.uniform(0, 1, 2)) * step
    inside = (centres >= 0).all(1) & (centres < side).all(1)
    centres = centres[inside]
    lumps = _noise(rng, side, float(rng.uniform(4, 30)))
    wanted = lumps > np.quantile(lumps, 1 - kind.share)
    cells = centres.astype(int)
    kept = region[cells[:, 0], cells[:, 1]] & wanted[cells[:, 0], cells[:, 1]] & (rng.random(len(cells)) < 0.93)
    return [(float(y), float(x)) for y, x in centres[kept]]


def _paint_cells(
    rng: Rng, order: list[tuple[int, float, float]], kinds: list[_Kind], haematoxylin: Floats, eosin: Floats
) -> None:
    """Paint cytoplasm around the places of nuclei and at some where none will lie, its borders brighter or darker."""
    side = len(eosin)
    basic, acid, rim = rng.uniform(-0.05, 0.3), rng.uniform(-0.1, 0.4), rng.uniform(-0.3, 0.3)
    size = float(rng.uniform(1.3, 2.6))
    extra = [(row[0], *rng.uniform(0, side, 2)) for row in order if rng.random() < 0.3]
    for kind, y, x in order + extra:
        radius = kinds[kind].radius / SCENE_MPP * size * float(np.exp(rng.normal(0, 0.15)))
        shape = (radius, float(rng.uniform(1, 1.8)), float(rng.uniform(0, np.pi)))
        window, depth, _ = _body(rng, (y, x), shape, side, margin=2.0, bumps=0.15)
        if window is None:
            continue
        inside = 1 / (1 + np.exp(-np.clip(2 * depth, -30, 30)))
        border = np.exp(-(depth**2))
        haematoxylin[window] += (inside * basic + border * rim * 0.5) * float(rng.uniform(0.5, 1.2)) * 0.7
        eosin[window] += (inside * acid + border * rim) * float(rng.uniform(0.5, 1.2)) * 0.7


def _body(
    rng: Rng,
    centre: tuple[float, float],
    shape: tuple[float, float, float],
    size: int | tuple[int, ...],
    *,
    margin: float,
    bumps: float,
) -> tuple[tuple[slice, slice] | None, Floats, Floats]:
    """Window of a lumpy ellipse, the depth of each pixel below its outline in pixels, and its share of the radius.

    ``shape``: mean radius in pixels, ratio of the axes, angle.
    """
    radius, elongation, angle = shape
    long, short = radius * np.sqrt(elongation), radius / np.sqrt(elongation)
    reach = int(long * 1.25 + 2 * margin + 2)
    top, left = int(centre[0]) - reach, int(centre[1]) - reach
    height, width = (size, size) if isinstance(size, int) else size
    window = (slice(max(top, 0), min(top + 2 * reach, height)), slice(max(left, 0), min(left + 2 * reach, width)))
    empty = np.zeros((0, 0), np.float32)
    if window[0].stop <= window[0].start or window[1].stop <= window[1].start:
        return None, empty, empty
    dy = np.arange(window[0].start, window[0].stop, dtype=np.float32)[:, None] - np.float32(centre[0])
    dx = np.arange(window[1].start, window[1].stop, dtype=np.float32)[None] - np.float32(centre[1])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = (dx * cos + dy * sin) / np.float32(long), (dy * cos - dx * sin) / np.float32(short)
    v = v + np.float32(rng.normal(0, 0.15 * (elongation > 1.5))) * (u * u - 0.5)  # bent
    theta = np.arctan2(v, u)
    outline = np.ones_like(theta)
    for wave in (2, 3, 4, 5):
        outline = outline + np.float32(rng.normal(0, bumps / wave)) * np.cos(
            wave * theta + np.float32(rng.uniform(0, 6.3))
        )
    share = np.hypot(u, v) / outline
    return window, ((1 - share) * np.float32(short)).astype(np.float32), share.astype(np.float32)


def _paint_nucleus(
    rng: Rng,
    kind: _Kind,
    place: tuple[float, float, float],
    number: int,
    haematoxylin: Floats,
    eosin: Floats,
    labels: NDArray[np.int32],
    halo_share: float,
) -> None:
    """Paint one nucleus over what is there, with its halo, chromatin and nucleoli, and label it."""
    radius = kind.radius * float(np.exp(rng.normal(0, kind.spread))) / SCENE_MPP
    elongation = max(1.0, 1 + (kind.elongation - 1) * float(rng.uniform(0.3, 1.5)))
    bumps = float(rng.uniform(0.02, 0.16))
    window, depth, share = _body(rng, place[:2], (radius, elongation, place[2]), labels.shape, margin=3.0, bumps=bumps)
    if window is None:
        return
    cover = 1 / (1 + np.exp(-np.clip(4 * depth / _RIMS[int(rng.integers(len(_RIMS)))], -30, 30)))
    level = max(0.14, kind.depth * float(np.exp(rng.normal(0, 0.2))))
    stain = level * _chromatin(rng, kind, depth, share)
    if rng.random() < halo_share:  # retraction: a bright halo
        halo = np.exp(-(((depth + 1.2) / float(rng.uniform(0.7, 2.0))) ** 2)) * float(rng.uniform(0.2, 0.9))
        haematoxylin[window] *= 1 - halo
        eosin[window] *= 1 - halo
    through = float(rng.uniform(0.0, 0.7))  # how much of what lies below shows
    haematoxylin[window] = haematoxylin[window] * (1 - cover * (1 - through)) + cover * stain
    eosin[window] = eosin[window] * (1 - cover * float(rng.uniform(0.1, 0.9))) + cover * stain * kind.eosin
    labels[window][depth > 0] = number


def _chromatin(rng: Rng, kind: _Kind, depth: Floats, share: Floats) -> Floats:
    """Stain within a nucleus relative to its level: grain, a pale inside with a rim, nucleoli."""
    white = rng.standard_normal(depth.shape).astype(np.float32)
    grain = ndimage.gaussian_filter(white, float(rng.uniform(0.5, 2.0)), mode="reflect")
    stain = 1 + kind.grain * grain / (grain.std() + 1e-6)
    pale = kind.vesicular * float(rng.uniform(0.5, 1.0))
    if pale > 0.1:
        rim = np.exp(-((np.maximum(depth, 0) / float(rng.uniform(0.8, 1.8))) ** 2))
        stain = stain * (1 - pale * (1 - rim))
        for _ in range(int(rng.integers(0, 4))):
            y, x = rng.uniform(0.25, 0.75, 2) * depth.shape
            far = np.hypot(np.arange(depth.shape[0])[:, None] - y, np.arange(depth.shape[1])[None] - x)
            stain = stain + float(rng.uniform(0.2, 0.8)) * np.exp(-((far / float(rng.uniform(0.8, 1.8))) ** 2)) * (
                share < 0.8
            )
    return np.asarray(np.clip(stain, 0.05, 2.0), dtype=np.float32)


def _drop_slivers(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Labels 1 … n of the nuclei that still show at least 12 pixels."""
    sizes = np.bincount(labels.ravel())
    kept = sizes >= 12
    kept[0] = False
    lookup = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return np.asarray(lookup[labels], dtype=np.int32)
