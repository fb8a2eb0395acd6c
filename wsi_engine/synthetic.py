"""Slides with known truth: H&E-like tissue drawn from a seed, and plain test pictures.

The tissue follows Beer and Lambert's law with the stain vectors of Ruifrok and Johnston: stroma with fibres, glands,
nuclei of four kinds and tumour regions. Every pixel and every label is a function of its place and the seed, so a
slide of any size is drawn in bounded memory and truth can be asked for any rectangle.

Example:
    >>> from wsi_engine.synthetic import SlideSpec, SyntheticSlide
    >>> slide = SyntheticSlide(SlideSpec(width=2000, height=1500, seed=3))
    >>> slide.paint(900, 700, 256, 256).shape
    (256, 256, 3)
    >>> slide.truth.labels(900, 700, 256, 256).dtype
    dtype('int32')

"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsi_engine.errors import SettingsError
from wsi_engine.kernels import paint as kernels
from wsi_engine.kernels import paint_scene
from wsi_engine.readers.base import RGBImage
from wsi_engine.synthetic_pictures import (
    paint_constant,
    paint_ihc,
    paint_marks,
    paint_ramp,
    write_ihc_slide,
    write_marks,
)
from wsi_engine.synthetic_scene import MACENKO, RUIFROK_JOHNSTON, Ellipse, Scene, SlideSpec, Stains, lay_scene
from wsi_engine.tiffwriter import TiffLayout, write_pyramid

__all__ = [
    "KINDS",
    "MACENKO",
    "RUIFROK_JOHNSTON",
    "Ellipse",
    "NucleusTable",
    "SlideSpec",
    "SlideTruth",
    "Stains",
    "SyntheticSlide",
    "paint_constant",
    "paint_ihc",
    "paint_marks",
    "paint_ramp",
    "write_ihc_slide",
    "write_marks",
    "write_slide",
]

KINDS = ("epithelial", "lymphocyte", "fibroblast", "tumour")
"""Names of the kinds of nuclei; ``NucleusTable.kind`` counts in this order."""

_JPEG = TiffLayout()
_LATTICE_UM = 2.0
_GLASS = (0.047, 0.05, 0.042)
_HALO_UM = 0.5
_BLUR_SIGMA_UM = 1.5


@dataclass(frozen=True, eq=False)
class NucleusTable:
    """Nuclei of a rectangle, M rows.

    ``id`` int64 as in the labels; ``x``, ``y`` float64 centre of the shape in level-0 pixels; ``kind`` int64, index
    into :data:`KINDS`; ``radius`` float64, √(a·b) of its semi-axes in µm.
    """

    id: NDArray[np.int64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    kind: NDArray[np.int64]
    radius: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.id)


@dataclass(frozen=True)
class _Rectangle:
    """A rectangle of level-0 pixels, and the same in µm."""

    x: int
    y: int
    width: int
    height: int
    mpp: float

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise SettingsError(f"a rectangle of {self.width} x {self.height} px holds nothing: give 1 or more")

    @property
    def origin(self) -> NDArray[np.int64]:
        return np.array([self.x, self.y], np.int64)

    @property
    def box(self) -> NDArray[np.float64]:
        return np.array([self.x, self.y, self.x + self.width, self.y + self.height], np.float64) * self.mpp

    def grow(self, margin: int) -> _Rectangle:
        return _Rectangle(self.x - margin, self.y - margin, self.width + 2 * margin, self.height + 2 * margin, self.mpp)


class SlideTruth:
    """What is where on a synthetic slide; each method takes a rectangle ``x, y, width, height`` in level-0 pixels."""

    def __init__(self, spec: SlideSpec) -> None:
        self.spec = spec
        self.scene: Scene = lay_scene(spec)

    def labels(self, x: int, y: int, width: int, height: int) -> NDArray[np.int32]:
        """Instances: int32 (height, width), 0 outside nuclei; a nucleus has one id in every rectangle."""
        area = self._rectangle(x, y, width, height)
        nuclei = self._nuclei(area, self._glands(area))
        owners = _draw(nuclei, area, 0.0)[1]
        ids = np.append(nuclei[:, paint_scene.ID], 0).astype(np.int32)
        return ids[owners]

    def nuclei(self, x: int, y: int, width: int, height: int) -> NucleusTable:
        """Nuclei whose centre lies in the rectangle, by id."""
        area = self._rectangle(x, y, width, height)
        rows = self._nuclei(area, self._glands(area))
        px, py = rows[:, 0] / self.spec.mpp, rows[:, 1] / self.spec.mpp
        inside = (px >= x) & (px < x + width) & (py >= y) & (py < y + height)
        rows = rows[inside][np.argsort(rows[inside, paint_scene.ID])]
        return NucleusTable(
            id=rows[:, paint_scene.ID].astype(np.int64),
            x=rows[:, 0] / self.spec.mpp,
            y=rows[:, 1] / self.spec.mpp,
            kind=rows[:, paint_scene.KIND].astype(np.int64),
            radius=np.sqrt(rows[:, 2] * rows[:, 3]),
        )

    def tissue(self, x: int, y: int, width: int, height: int) -> NDArray[np.bool_]:
        """Inside the outline of the tissue, lumens included: bool (height, width)."""
        return self._fields(self._rectangle(x, y, width, height))[..., paint_scene.TISSUE] > 0

    def tumour(self, x: int, y: int, width: int, height: int) -> NDArray[np.bool_]:
        """Inside a tumour region, its septa of stroma included: bool (height, width)."""
        fields = self._fields(self._rectangle(x, y, width, height))
        return np.minimum(fields[..., paint_scene.TUMOUR], fields[..., paint_scene.TISSUE]) > 0

    def pen(self, x: int, y: int, width: int, height: int) -> NDArray[np.bool_]:
        """Under pen ink: bool (height, width)."""
        return self._strokes(self._rectangle(x, y, width, height))[0] > 0

    def blur(self, x: int, y: int, width: int, height: int) -> NDArray[np.bool_]:
        """Out of focus, at least by half: bool (height, width)."""
        return self._defocus(self._rectangle(x, y, width, height)) >= 0.5

    def _rectangle(self, x: int, y: int, width: int, height: int) -> _Rectangle:
        return _Rectangle(x, y, width, height, self.spec.mpp)

    def _glands(self, area: _Rectangle) -> NDArray[np.float64]:
        margin = 2 * (paint_scene.REACH + paint_scene.CELL_PITCH) * np.array([-1, -1, 1, 1])
        cells = np.array(self.spec.gland_cells, np.int64)
        scene = self.scene
        found = kernels.list_glands(
            area.box + margin, cells, scene.pieces, scene.tumours, self.spec.gland_density, scene.salt
        )
        return found

    def _nuclei(self, area: _Rectangle, glands: NDArray[np.float64]) -> NDArray[np.float64]:
        spec, scene = self.spec, self.scene
        size = np.array([spec.width, spec.height]) * spec.mpp
        cells = np.array(spec.gland_cells, np.int64)
        return kernels.list_nuclei(
            area.box, size, glands, cells, scene.pieces, scene.tumours, spec.nuclei_density, scene.salt
        )

    def _fields(self, area: _Rectangle) -> NDArray[np.float32]:
        """The scene's fields at every pixel: float32 (height, width, FIELDS)."""
        step = max(1, round(_LATTICE_UM / self.spec.mpp))
        first = area.origin // step
        last = (area.origin + np.array([area.width - 1, area.height - 1])) // step + 1
        columns, rows = last - first + 1
        lattice = np.zeros((paint_scene.FIELDS, rows, columns), np.float32)
        lattice[paint_scene.TUMOUR] = kernels.FAR
        scene = self.scene
        paint_scene.fill_fields(lattice, first, step, self.spec.mpp, scene.pieces, scene.tumours, scene.salt)
        out = np.empty((area.height, area.width, paint_scene.FIELDS), np.float32)
        for k in range(paint_scene.FIELDS):
            kernels.spread_field(lattice[k], first, step, area.origin, out[..., k])
        return out

    def _strokes(self, area: _Rectangle) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Depth (µm) under pen ink and the pen, -1 where there is none."""
        strokes, box = self.scene.strokes, area.box
        reach = strokes[:, 4]
        low, high = np.minimum(strokes[:, :2], strokes[:, 2:4]), np.maximum(strokes[:, :2], strokes[:, 2:4])
        near = ((high + reach[:, None] > box[:2]) & (low - reach[:, None] < box[2:])).all(axis=1)
        depths = np.zeros((area.height, area.width), np.float32)
        pens = np.full(depths.shape, -1, np.int32)
        if near.any():
            kernels.stroke_depth(strokes[near], area.origin, area.mpp, depths, pens)
        return depths, pens

    def _defocus(self, area: _Rectangle) -> NDArray[np.float32]:
        """How far out of focus each pixel is: float32 (height, width), 0 sharp to 1."""
        weight = np.zeros((area.height, area.width), np.float32)
        xs = (area.x + np.arange(area.width) + 0.5) * area.mpp
        ys = (area.y + np.arange(area.height) + 0.5) * area.mpp
        for x, y, radius in self.scene.blurs:
            if x + radius > xs[0] and x - radius < xs[-1] and y + radius > ys[0] and y - radius < ys[-1]:
                inside = 1 - np.hypot(xs - x, (ys - y)[:, None]) / radius
                np.maximum(weight, np.clip(4 * inside, 0, 1), out=weight, casting="same_kind")
        return weight


class SyntheticSlide:
    """A synthetic H&E slide: ``paint`` draws any rectangle, ``truth`` knows what is there."""

    def __init__(self, spec: SlideSpec) -> None:
        self.spec = spec
        self.truth = SlideTruth(spec)
        vectors = np.array([spec.stains.haematoxylin, spec.stains.eosin], np.float64)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        self._stains = np.vstack([_GLASS, vectors])

    def paint(self, x: int, y: int, width: int, height: int) -> RGBImage:
        """Level-0 pixels of a rectangle: uint8 (height, width, 3). Safe to call from several threads."""
        truth, mpp = self.truth, self.spec.mpp
        area = _Rectangle(x, y, width, height, mpp)
        defocus = truth._defocus(area)
        if defocus.any():
            sigma = _BLUR_SIGMA_UM / mpp
            margin = int(4 * sigma + 0.5) + 1
            wide = self._render(area.grow(margin))
            soft = ndimage.gaussian_filter(wide, (sigma, sigma, 0), truncate=4.0)
            inner = np.s_[margin:-margin, margin:-margin]
            weight = defocus[..., None]
            rgb = wide[inner] * (1 - weight) + soft[inner] * weight
        else:
            rgb = self._render(area)
        depths, pens = truth._strokes(area)
        salt = truth.scene.salt
        if (pens >= 0).any():
            kernels.ink(rgb, depths, pens, truth.scene.inks, area.origin, mpp, salt)
        out = np.empty((height, width, 3), np.uint8)
        kernels.digitise(rgb, area.origin, self.spec.grain, salt, out)
        return out

    def _render(self, area: _Rectangle) -> NDArray[np.float32]:
        """Tissue without pen, blur and noise: float32 (height, width, 3), 0 to 255."""
        truth = self.truth
        fields = truth._fields(area)
        glands = truth._glands(area)
        nuclei = truth._nuclei(area, glands)
        gland_depths, gland_owners = _draw(glands, area, 2.0)
        depths, owners = _draw(nuclei, area, _HALO_UM)
        rgb = np.empty((area.height, area.width, 3), np.float32)
        kernels.render(
            rgb,
            fields,
            gland_depths,
            gland_owners,
            glands,
            depths,
            owners,
            nuclei,
            self._stains,
            area.origin,
            area.mpp,
            truth.scene.salt,
        )
        return rgb


def _draw(
    outlines: NDArray[np.float64], area: _Rectangle, margin: float
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Depth (µm) and row of the outline at every pixel of a rectangle; row -1 where there is none."""
    depths = np.full((area.height, area.width), kernels.FAR, np.float32)
    owners = np.full((area.height, area.width), -1, np.int32)
    kernels.draw_depths(outlines, area.origin, area.mpp, margin, depths, owners)
    return depths, owners


def write_slide(path: str | os.PathLike[str], spec: SlideSpec, layout: TiffLayout = _JPEG) -> SlideTruth:
    """Draw a synthetic slide into a pyramidal TIFF and return its truth.

    Raises:
        SettingsError: the layout cannot hold a slide of this size.
        SlideError: the file cannot be written.

    """
    slide = SyntheticSlide(spec)
    write_pyramid(path, spec.width, spec.height, slide.paint, mpp=spec.mpp, layout=layout)
    return slide.truth
