"""What a synthetic slide is asked to show, and the outlines that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SettingsError
from wsi_engine.kernels.paint_scene import CELL_PITCH, GLAND_PITCH, GLAND_SLOTS, OUTLINE

_SALT_STEP = 1000
_STROKE_STEPS = 24
_PEN_DENSITIES = ((2.1, 0.55, 1.5), (2.4, 1.3, 0.25), (1.9, 1.8, 1.6))
"""Green, blue and black ink: optical density in red, green and blue."""


@dataclass(frozen=True)
class Stains:
    """Optical densities (red, green, blue) of the two stains; each is normalised to length 1 before use."""

    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name, vector in (("haematoxylin", self.haematoxylin), ("eosin", self.eosin)):
            if len(vector) != 3 or min(vector) < 0 or not 0 < math.hypot(*vector) < math.inf:
                raise SettingsError(f"the {name} vector is {vector}: give three densities of 0 or more, not all 0")


RUIFROK_JOHNSTON = Stains((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))
"""Ruifrok and Johnston, Quantification of histochemical staining by color deconvolution, 2001."""

MACENKO = Stains((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581))
"""Reference vectors of Macenko's normalisation (ISBI 2009): a warmer eosin, as many scanners show it."""


@dataclass(frozen=True)
class Ellipse:
    """An ellipse in level-0 pixels; ``angle`` turns it, in degrees, from x towards y."""

    x: float
    y: float
    rx: float
    ry: float
    angle: float = 0.0

    def __post_init__(self) -> None:
        if not (self.rx > 0 and self.ry > 0):
            raise SettingsError(f"an ellipse has semi-axes {self.rx} and {self.ry}: give numbers above 0")


@dataclass(frozen=True)
class SlideSpec:
    """A synthetic H&E slide.

    Attributes:
        width: level-0 pixels.
        height: level-0 pixels.
        mpp: micrometres per level-0 pixel; nuclei and glands keep their size in µm.
        seed: 0 to 2**31 - 1; the same spec and seed give the same slide.
        coverage: fraction of the slide that tissue covers, about; 0 is an empty slide, 1 has no background.
        pieces: number of separate pieces of tissue.
        tumours: number of tumour regions at random places in the tissue.
        tumour_ellipses: further tumour regions at given places; their edges become ragged.
        nuclei_density: 0 to 1, chance that a place for a nucleus outside glands is taken.
        gland_density: 0 to 1, chance that a place for a gland is taken.
        pen_marks: number of pen strokes beside or over the tissue.
        blur_regions: number of discs that are out of focus.
        stains: colours of the two stains.
        grain: r.m.s. noise of the camera in grey levels.

    """

    width: int
    height: int
    mpp: float = 0.25
    seed: int = 0
    coverage: float = 0.6
    pieces: int = 1
    tumours: int = 1
    tumour_ellipses: tuple[Ellipse, ...] = ()
    nuclei_density: float = 1.0
    gland_density: float = 0.8
    pen_marks: int = 0
    blur_regions: int = 0
    stains: Stains = RUIFROK_JOHNSTON
    grain: float = 1.2

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise SettingsError(f"the slide would be {self.width} x {self.height} px: give sizes of 1 or more")
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise SettingsError(f"mpp is {self.mpp}: give micrometres per pixel above 0")
        if not 0 <= self.seed < 2**31:
            raise SettingsError(f"seed is {self.seed}: give a whole number from 0 to 2147483647")
        for name in ("coverage", "nuclei_density", "gland_density"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} is {getattr(self, name)}: give a number from 0 to 1")
        for name, least in (("pieces", 1), ("tumours", 0), ("pen_marks", 0), ("blur_regions", 0), ("grain", 0)):
            if not getattr(self, name) >= least:
                raise SettingsError(f"{name} is {getattr(self, name)}: give {least} or more")
        across, down = self.gland_cells
        cells = (self.width * self.mpp / CELL_PITCH + 1) * (self.height * self.mpp / CELL_PITCH + 1)
        if across * down * GLAND_SLOTS + cells >= 2**31:
            raise SettingsError(f"{self.width} x {self.height} px at {self.mpp} µm hold more nuclei than 32-bit labels")

    @property
    def gland_cells(self) -> tuple[int, int]:
        """Number of places for glands along x and y."""
        return int(self.width * self.mpp // GLAND_PITCH) + 1, int(self.height * self.mpp // GLAND_PITCH) + 1


@dataclass(frozen=True, eq=False)
class Scene:
    """Outlines (µm) of one slide, as the kernels take them.

    ``pieces`` and ``tumours`` are (n, 12) outlines, ``strokes`` (s, 6) pen segments with half width and pen,
    ``inks`` (p, 3) densities, ``blurs`` (b, 3) discs x, y, radius.
    """

    pieces: NDArray[np.float64]
    tumours: NDArray[np.float64]
    strokes: NDArray[np.float64]
    inks: NDArray[np.float64]
    blurs: NDArray[np.float64]
    salt: int


def lay_scene(spec: SlideSpec) -> Scene:
    """Choose the outlines of a slide from its seed."""
    rng = np.random.default_rng(spec.seed)
    size = spec.width * spec.mpp, spec.height * spec.mpp
    pieces = _lay_pieces(rng, size, spec)
    random_tumours = [_lay_tumour(rng, pieces[k % len(pieces)]) for k in range(spec.tumours if len(pieces) else 0)]
    given = [
        _outline(rng, e.x * spec.mpp, e.y * spec.mpp, e.rx * spec.mpp, e.ry * spec.mpp, math.radians(e.angle), 0.04)
        for e in spec.tumour_ellipses
    ]
    tumours = np.array([*random_tumours, *given]).reshape(-1, OUTLINE)
    strokes = [row for k in range(spec.pen_marks) for row in _lay_stroke(rng, size, k)]
    radius = 0.13 * min(size)
    blurs = [
        (rng.uniform(0.25, 0.75) * size[0], rng.uniform(0.25, 0.75) * size[1], radius) for _ in range(spec.blur_regions)
    ]
    return Scene(
        pieces,
        tumours,
        np.array(strokes).reshape(-1, 6),
        np.array([_PEN_DENSITIES[k % len(_PEN_DENSITIES)] for k in range(spec.pen_marks)]).reshape(-1, 3),
        np.array(blurs).reshape(-1, 3),
        spec.seed * _SALT_STEP,
    )


def _outline(
    rng: np.random.Generator, x: float, y: float, a: float, b: float, turn: float, wobble: float
) -> list[float]:
    return [x, y, a, b, math.cos(turn), math.sin(turn), *rng.uniform(-wobble, wobble, 6).tolist()]


def _lay_pieces(rng: np.random.Generator, size: tuple[float, float], spec: SlideSpec) -> NDArray[np.float64]:
    """Pieces of tissue side by side along the longer side of the slide."""
    if spec.coverage == 0:
        return np.empty((0, OUTLINE))
    if spec.coverage == 1:
        return np.array([_outline(rng, size[0] / 2, size[1] / 2, *(4 * max(size),) * 2, 0.0, 0.0)])
    along = 0 if size[0] >= size[1] else 1
    rows = []
    for k in range(spec.pieces):
        centre, half = [size[0] / 2, size[1] / 2], [size[0] / 2, size[1] / 2]
        half[along] /= spec.pieces
        centre[along] = (2 * k + 1) * half[along]
        scale = math.sqrt(4 * spec.coverage / math.pi)
        rows.append(_outline(rng, centre[0], centre[1], half[0] * scale, half[1] * scale, 0.0, 0.05))
    return np.array(rows)


def _lay_tumour(rng: np.random.Generator, piece: NDArray[np.float64]) -> list[float]:
    """A tumour region in one piece of tissue, off its centre."""
    angle, away = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 0.5)
    reach = np.minimum(piece[2:4], 1e5)
    x, y = piece[0] + away * reach[0] * math.cos(angle), piece[1] + away * reach[1] * math.sin(angle)
    a, b = rng.uniform(0.34, 0.46, 2) * min(reach)
    return _outline(rng, x, y, a, b, rng.uniform(0, math.pi), 0.07)


def _lay_stroke(rng: np.random.Generator, size: tuple[float, float], pen: int) -> list[list[float]]:
    """One pen stroke: a quadratic curve as short segments."""
    points = np.array([[rng.uniform(0.06, 0.94) * size[0], rng.uniform(0.06, 0.94) * size[1]] for _ in range(3)])
    points[0, pen % 2] = rng.uniform(0.03, 0.1) * size[pen % 2]
    t = np.linspace(0, 1, _STROKE_STEPS + 1)[:, None]
    curve = (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2]
    half_width = min(120.0, 0.012 * min(size))
    return [[*curve[k], *curve[k + 1], half_width, float(pen)] for k in range(_STROKE_STEPS)]
