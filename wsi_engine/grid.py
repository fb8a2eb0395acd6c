"""Where the tiles are: a lattice at an exact scale, and the part of it that covers tissue."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import ScaleError, SettingsError
from wsi_engine.kernels.filters import summed_area
from wsi_engine.slide import Slide
from wsi_engine.tissue import TissueMask, TissueSettings, detect_tissue

MAX_UPSAMPLING = 2.0
"""How many times finer than its finest level a slide may be asked for; beyond, most of a tile would be invented."""

TissueChoice: TypeAlias = Literal["otsu"] | TissueSettings | TissueMask | None


@dataclass(frozen=True)
class GridSettings:
    """Settings of a grid: what the user chose, before any slide is looked at.

    ``tile_px`` is the side of a tile and ``stride_px`` the step to the next, both in output pixels of ``mpp``
    micrometres (None: a tile's side, so that tiles touch). A tile is kept when at least the part ``min_tissue`` of
    its area is tissue; what lies outside the slide is none.
    """

    mpp: float = 0.5
    tile_px: int = 256
    stride_px: int | None = None
    min_tissue: float = 0.25

    def __post_init__(self) -> None:
        if not (self.mpp > 0 and math.isfinite(self.mpp)):
            raise SettingsError(f"--mpp must be a positive number of micrometres per pixel, not {self.mpp}")
        if not 1 <= self.tile_px <= 16_384:
            raise SettingsError(f"--tile-px must be within 1–16384 pixels, not {self.tile_px}")
        if self.stride_px is not None and not self.stride_px >= 1:
            raise SettingsError(f"--stride-px must be at least 1 pixel, not {self.stride_px}")
        if not 0 <= self.min_tissue <= 1:
            raise SettingsError(f"--min-tissue must be within 0–1, not {self.min_tissue}")

    @property
    def step_px(self) -> int:
        """Output pixels from one tile to the next."""
        return self.tile_px if self.stride_px is None else self.stride_px

    @property
    def name(self) -> str:
        """Short name of the grid, such as ``256px_0.5mpp`` or ``256px_0.5mpp_stride128``."""
        overlap = "" if self.step_px == self.tile_px else f"_stride{self.step_px}"
        return f"{self.tile_px}px_{self.mpp:g}mpp{overlap}"


class TileScale(NamedTuple):
    """How large tiles are and at what scale.

    Attributes:
        mpp: micrometres per tile pixel.
        tile_px: side of a tile in its pixels.
        stride_px: from tile to tile, in tile pixels.
    """

    mpp: float
    tile_px: int
    stride_px: int

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TileScale:
        """From what :meth:`TileGrid.to_json` wrote."""
        return cls(float(value["mpp"]), int(value["tile_px"]), int(value["stride_px"]))


@dataclass(frozen=True)
class TileGrid:
    """The tiles of one slide, in the order in which they are read and stored.

    ``origins`` is int64 (N, 2): level-0 x, y of each tile's top-left corner, row by row from the top, so that a
    reader that keeps one row of compressed tiles decodes each of them once. A tile spans ``tile_size_level0``
    level-0 pixels (x, y), in general no whole number; the field of view is exact all the same.
    ``lattice_tiles`` is how many there were before tissue was asked for.
    """

    origins: NDArray[np.int64] = field(repr=False)
    tile_px: int
    stride_px: int
    mpp: float
    tile_size_level0: tuple[float, float]
    lattice_tiles: int

    def __len__(self) -> int:
        return len(self.origins)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the geometry and every origin: two grids with one digest name the same pixels."""
        head = {"tile_px": self.tile_px, "mpp": float(self.mpp), "tile_size_level0": list(self.tile_size_level0)}
        origins = np.ascontiguousarray(self.origins, "<i8").tobytes()
        return hashlib.sha256(json.dumps(head, sort_keys=True).encode() + origins).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Everything but the origins as plain JSON values, with the digest."""
        return {
            "tile_px": self.tile_px,
            "stride_px": self.stride_px,
            "mpp": self.mpp,
            "tile_size_level0": list(self.tile_size_level0),
            "counts": {"lattice": self.lattice_tiles, "kept": len(self)},
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], origins: NDArray[np.int64]) -> TileGrid:
        """The grid that :meth:`to_json` described; its digest is computed anew."""
        width, height = value["tile_size_level0"]
        return cls(
            origins=origins,
            tile_px=int(value["tile_px"]),
            stride_px=int(value["stride_px"]),
            mpp=float(value["mpp"]),
            tile_size_level0=(float(width), float(height)),
            lattice_tiles=int(value["counts"]["lattice"]),
        )


def lay_grid(
    slide: Slide,
    mpp: float = 0.5,
    tile_px: int = 256,
    stride_px: int | None = None,
    tissue: TissueChoice = "otsu",
    min_tissue: float = 0.25,
) -> TileGrid:
    """Lay tiles over a slide.

    Tiles start at the slide's corner and step by ``stride_px``; the last column and row reach past the edge
    where the slide's size is no multiple, so that nothing is left out (the pixels outside are white).

    Args:
        slide: an open slide.
        mpp: micrometres per tile pixel.
        tile_px: side of a tile.
        stride_px: step from tile to tile; None for ``tile_px``.
        tissue: ``"otsu"`` detects tissue with the default settings; settings or a mask of one's own can be given;
            None keeps every tile.
        min_tissue: least part of a tile's area that must be tissue, 0–1; at 0 any tissue at all is enough.

    Raises:
        ScaleError: the slide's scale is missing or not believable, or its finest level is more than
            :data:`MAX_UPSAMPLING` times coarser than asked for.
        SettingsError: a number is out of range.
    """
    settings = GridSettings(mpp, tile_px, stride_px, min_tissue)
    detector = tissue_settings(tissue)
    mask = tissue if isinstance(tissue, TissueMask) else None
    return lay_grid_on(slide, settings, detect_tissue(slide, detector) if detector else mask)


def lay_grid_on(slide: Slide, settings: GridSettings, mask: TissueMask | None) -> TileGrid:
    """:func:`lay_grid` with the settings checked and the tissue found; None for ``mask`` keeps every tile."""
    if max(slide.mpp) > settings.mpp * MAX_UPSAMPLING:
        raise ScaleError(
            f"{slide.path} has {max(slide.mpp):g} µm per pixel at its finest, too coarse for tiles of "
            f"{settings.mpp:g}: ask for --mpp {max(slide.mpp) / MAX_UPSAMPLING:.3g} or more"
        )
    per_px = slide.sampling(settings.mpp).size_level0
    size = per_px[0] * settings.tile_px, per_px[1] * settings.tile_px
    step = per_px[0] * settings.step_px, per_px[1] * settings.step_px
    xs, ys = (_starts(n, d, s) for n, d, s in zip(slide.dimensions, size, step, strict=True))
    if mask is not None:
        covered = _coverage(mask, slide.mpp, xs, ys, size)
        keep = covered >= settings.min_tissue if settings.min_tissue > 0 else covered > 0
    else:
        keep = np.ones((len(ys), len(xs)), bool)
    rows, columns = np.nonzero(keep)
    return TileGrid(
        origins=np.stack([xs[columns], ys[rows]], axis=1),
        tile_px=settings.tile_px,
        stride_px=settings.step_px,
        mpp=float(settings.mpp),
        tile_size_level0=size,
        lattice_tiles=keep.size,
    )


def tissue_settings(choice: TissueChoice) -> TissueSettings | None:
    """The settings that a choice of tissue stands for: the defaults for ``"otsu"``, None where none are used.

    Raises:
        SettingsError: the choice is none of those of :func:`lay_grid`.
    """
    if isinstance(choice, TissueSettings):
        return choice
    if isinstance(choice, str):
        if choice != "otsu":
            raise SettingsError(f'tissue must be "otsu", settings, a mask or None, not {choice!r}')
        return TissueSettings()
    return None


def _starts(extent: int, size: float, step: float) -> NDArray[np.int64]:
    """Level-0 starts along one axis, of the fewest tiles that leave out no pixel (with strides up to a tile)."""
    count = max(0, math.ceil((extent - size) / step - 1e-9)) + 1
    starts: NDArray[np.int64] = np.rint(np.arange(count) * step).astype(np.int64)
    kept: NDArray[np.int64] = starts[starts < extent]
    return kept


def _coverage(
    mask: TissueMask,
    slide_mpp: tuple[float, float],
    xs: NDArray[np.int64],
    ys: NDArray[np.int64],
    size: tuple[float, float],
) -> NDArray[np.float64]:
    """Part of each tile's area that is tissue, (rows, columns), exact to the raster's pixels.

    A summed-area table interpolated linearly gives the exact integral of the raster up to any position.
    """
    table = summed_area(mask.mask)
    to_mask = slide_mpp[0] / mask.mpp, slide_mpp[1] / mask.mpp
    x0, x1 = xs * to_mask[0], (xs + size[0]) * to_mask[0]
    y0, y1 = ys * to_mask[1], (ys + size[1]) * to_mask[1]
    tissue = _integral(table, x1, y1) - _integral(table, x0, y1) - _integral(table, x1, y0) + _integral(table, x0, y0)
    tile_area = size[0] * to_mask[0] * size[1] * to_mask[1]
    covered = np.asarray(tissue / tile_area, np.float64)
    covered[covered < 1e-9] = 0.0  # rounding of the differences must not count as tissue
    return covered


def _integral(table: NDArray[np.int64], xs: NDArray[np.floating], ys: NDArray[np.floating]) -> NDArray[np.float64]:
    """Integral of the raster over [0, x) × [0, y) for every y and x: (len(ys), len(xs))."""
    x, y = np.clip(xs, 0, table.shape[1] - 1), np.clip(ys, 0, table.shape[0] - 1)
    x_low = np.minimum(x.astype(np.int64), table.shape[1] - 2)
    y_low = np.minimum(y.astype(np.int64), table.shape[0] - 2)
    fx, fy = (x - x_low)[None, :], (y - y_low)[:, None]
    rows = table[y_low], table[y_low + 1]
    upper = rows[0][:, x_low] * (1 - fx) + rows[0][:, x_low + 1] * fx
    lower = rows[1][:, x_low] * (1 - fx) + rows[1][:, x_low + 1] * fx
    return np.asarray(upper * (1 - fy) + lower * fy, np.float64)
