"""Where the tissue is: saturation against the white of the glass, cleaned by area."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsi_engine.errors import SettingsError
from wsi_engine.kernels.filters import median_blur, rgb_saturation
from wsi_engine.kernels.otsu import otsu_threshold
from wsi_engine.readers.base import RGBImage
from wsi_engine.slide import Slide


@dataclass(frozen=True)
class TissueSettings:
    """Settings of :func:`detect_tissue`.

    ``mpp`` is the scale of the raster looked at (a slide coarser than this is looked at as it is).
    ``threshold`` is the least saturation of tissue, 0–255; None finds it by Otsu's method, kept within
    ``otsu_range``: a slide without glass would otherwise be split in the middle of its tissue, and one
    without tissue in the middle of its noise. ``median_px`` and ``close_px`` are sides in raster pixels.
    Areas are in mm²; ``max_holes`` keeps the largest holes of the slide and fills the others (None: no bound).

    Source of the steps: CLAM (Lu et al., Nature BME 2021, Methods, "segmentation"); its areas are in units of 512²
    level-0 pixels, which mean different sizes on different scanners, so they are physical here.
    """

    mpp: float = 8.0
    threshold: float | None = None
    otsu_range: tuple[float, float] = (10.0, 30.0)
    median_px: int = 7
    close_px: int = 4
    min_tissue_mm2: float = 0.02
    min_hole_mm2: float = 0.01
    max_holes: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mpp <= 8:
            raise SettingsError(f"the tissue raster's mpp must be above 0 and at most 8, not {self.mpp}")
        if self.threshold is not None and not 0 <= self.threshold <= 255:
            raise SettingsError(f"the saturation threshold must be within 0–255, not {self.threshold}")
        if not 0 <= self.otsu_range[0] <= self.otsu_range[1] <= 255:
            raise SettingsError(f"the range of Otsu's threshold must ascend within 0–255, not {self.otsu_range}")
        if self.median_px < 1 or self.median_px % 2 == 0:
            raise SettingsError(f"the median filter's side must be odd, not {self.median_px}")
        if self.close_px < 0 or min(self.min_tissue_mm2, self.min_hole_mm2) < 0:
            raise SettingsError("sizes and areas of the tissue filters must not be negative")
        if self.max_holes is not None and self.max_holes < 0:
            raise SettingsError(f"the number of holes kept must not be negative, not {self.max_holes}")

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self) | {"otsu_range": list(self.otsu_range)}


@dataclass(frozen=True)
class FilterCount:
    """How much tissue there was before and after one filter: raster pixels and connected regions."""

    filter: str
    pixels_before: int
    pixels_after: int
    regions_before: int
    regions_after: int


@dataclass(frozen=True)
class TissueMask:
    """Tissue of one slide as a raster that starts at the slide's top-left corner.

    ``mask`` is bool (H, W), ``mpp`` its micrometres per pixel. ``threshold`` is the saturation used, and
    ``counts`` what each filter left; both are empty for a mask that came from elsewhere.
    """

    mask: NDArray[np.bool_]
    mpp: float
    threshold: float | None = None
    counts: tuple[FilterCount, ...] = ()

    def __post_init__(self) -> None:
        if self.mask.dtype != np.bool_ or self.mask.ndim != 2:
            raise SettingsError(f"a tissue mask is a bool raster (H, W), not {self.mask.dtype} {self.mask.shape}")
        if not self.mpp > 0:
            raise SettingsError(f"a tissue mask's mpp must be positive, not {self.mpp}")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the raster and its scale."""
        head = repr((self.mask.shape, float(self.mpp))).encode()
        return hashlib.sha256(head + np.packbits(self.mask).tobytes()).hexdigest()

    @property
    def area_mm2(self) -> float:
        """Area of the tissue in mm²."""
        return float(np.count_nonzero(self.mask)) * self.mpp**2 / 1e6

    def emptied_by(self) -> str | None:
        """The filter that left no tissue, or None while there is some."""
        if self.mask.any():
            return None
        return next((count.filter for count in self.counts if count.pixels_after == 0), "given mask")


def detect_tissue(slide: Slide, settings: TissueSettings | None = None, pool: Executor | None = None) -> TissueMask:
    """Find the tissue of a slide on a coarse overview of it, read by the threads of ``pool`` or of its own.

    Raises:
        ScaleError: the slide's scale is missing or not believable.
        SlideError: the slide cannot be read.
    """
    settings = settings or TissueSettings()
    mpp = max(settings.mpp, *slide.mpp)
    return find_tissue(slide.read_overview(mpp, pool), mpp, settings)


def find_tissue(overview: RGBImage, mpp: float, settings: TissueSettings | None = None) -> TissueMask:
    """Find the tissue on an overview: uint8 (H, W, 3) at ``mpp`` micrometres per pixel."""
    settings = settings or TissueSettings()
    saturation = median_blur(rgb_saturation(overview), settings.median_px)
    threshold = settings.threshold
    if threshold is None:
        threshold = float(np.clip(otsu_threshold(saturation), *settings.otsu_range))
    mask = saturation > threshold
    counts = [FilterCount("saturation", mask.size, int(mask.sum()), 1, _count_regions(mask))]
    px_per_mm2 = 1e6 / mpp**2
    filters: tuple[tuple[str, Callable[[NDArray[np.bool_]], NDArray[np.bool_]]], ...] = (
        ("closing", lambda m: _close_square(m, settings.close_px)),
        ("small tissue", lambda m: _drop_small(m, settings.min_tissue_mm2 * px_per_mm2)),
        ("small holes", lambda m: _fill_holes(m, settings.min_hole_mm2 * px_per_mm2, settings.max_holes)),
    )
    for name, apply in filters:
        after = apply(mask)
        counts.append(
            FilterCount(name, int(mask.sum()), int(after.sum()), counts[-1].regions_after, _count_regions(after))
        )
        mask = after
    return TissueMask(mask, mpp, threshold, tuple(counts))


_EIGHT = np.ones((3, 3), bool)


def _count_regions(mask: NDArray[np.bool_]) -> int:
    return int(ndimage.label(mask, _EIGHT)[1])


def _close_square(mask: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """Closing by a square; the mask is continued beyond its border so that tissue there is not eroded."""
    if side < 2:
        return mask
    square = np.ones((side, side), bool)
    padded = np.pad(mask, side, mode="edge")
    closed: NDArray[np.bool_] = ndimage.binary_closing(padded, square)[side:-side, side:-side]
    return closed | mask


def _drop_small(mask: NDArray[np.bool_], least: float) -> NDArray[np.bool_]:
    """Without the connected regions (by edge or corner) of fewer than ``least`` pixels."""
    labels, _ = ndimage.label(mask, _EIGHT)
    keep = np.bincount(labels.ravel()) >= least
    keep[0] = False
    kept: NDArray[np.bool_] = keep[labels]
    return kept


def _fill_holes(mask: NDArray[np.bool_], least: float, most: int | None) -> NDArray[np.bool_]:
    """Fill holes of fewer than ``least`` pixels, and all but the ``most`` largest of the others.

    A hole is a region of no tissue that does not reach the raster's border.
    """
    regions, _ = ndimage.label(~mask)
    sizes = np.bincount(regions.ravel())
    hole = sizes > 0
    hole[0] = False  # the tissue itself
    for border in (regions[0], regions[-1], regions[:, 0], regions[:, -1]):
        hole[border] = False
    keep = hole & (sizes >= least)
    if most is not None:
        by_size = np.argsort(-np.where(keep, sizes, 0), kind="stable")
        keep[by_size[most:]] = False
    filled: NDArray[np.bool_] = mask | (hole & ~keep)[regions]
    return filled
