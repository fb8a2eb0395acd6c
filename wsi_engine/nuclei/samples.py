"""Crops of tissue at several scales, from slides and plain pictures, for training without labels."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import InputError, ScaleError
from wsi_engine.inputs import find_slides
from wsi_engine.kernels.filters import summed_area
from wsi_engine.places import is_url
from wsi_engine.readers.base import RGBImage
from wsi_engine.slide import Slide, open_slide
from wsi_engine.tissue import TissueMask, TissueSettings, detect_tissue

log = logging.getLogger("wsi_engine")

Source = str | os.PathLike[str] | NDArray[np.uint8]

LABEL_ENDINGS = ("_label", "_foreground", "_mask")
"""Ends of names that mark a picture as the annotation of the one without; never read for training."""

SMALL_UM = 2000.0
"""A picture with a shorter side than this is looked at for tissue at 1 µm per pixel, without area filters."""

FINER_BY = 1.2
"""A slide may be this much coarser than a scale and still serve it; more would train on enlarged blur."""

_SMALL = TissueSettings(mpp=1.0, min_tissue_mm2=0.0, min_hole_mm2=0.0002)


def list_pictures(images_or_slides: Iterable[Source], mpp: float | None = None) -> list[tuple[Source, float | None]]:
    """What to train on: each picture with the scale that the user gave for it.

    Paths are files, folders and CSVs as for :func:`~wsi_engine.inputs.find_slides`. A picture whose name is that of
    another one with an ending of :data:`LABEL_ENDINGS` is an annotation and left out.

    Raises:
        InputError: nothing was named, or as :func:`~wsi_engine.inputs.find_slides`.
    """
    sources = list(images_or_slides)
    arrays: list[tuple[Source, float | None]] = [(one, mpp) for one in sources if isinstance(one, np.ndarray)]
    paths = [one for one in sources if not isinstance(one, np.ndarray)]
    if not sources:
        raise InputError("no image or slide was named: give files or folders")
    found = find_slides(paths, mpp) if paths else []
    return arrays + [(one.path, one.mpp) for one in found if not is_annotation(one.path)]


def is_annotation(path: str) -> bool:
    """Whether a picture is the annotation of another one beside it."""
    if is_url(path):
        return False
    here = Path(path)
    for ending in LABEL_ENDINGS:
        if here.stem.endswith(ending):
            stem = here.stem.removesuffix(ending)
            return any(other.stem == stem for other in here.parent.glob(f"{_literal(stem)}.*"))
    return False


def open_picture(source: Source, mpp: float | None, image_mpp: float | None) -> Slide:
    """Open a slide, or a plain picture whose scale, where it has none, is ``image_mpp``.

    Args:
        source: path or array.
        mpp: the scale that the user gave, for slides and pictures alike.
        image_mpp: micrometres per pixel of plain pictures that do not say; None: they must.

    Raises:
        ScaleError: the scale is missing or not believable.
        SlideError: it cannot be read.
    """
    with ExitStack() as opened:
        slide = opened.enter_context(open_slide(source, mpp))
        if mpp is None and slide.reader == "image" and slide.metadata.mpp is None:
            if image_mpp is None:
                raise ScaleError(
                    f"{slide.path} does not say how many micrometres its pixels measure: pass the true value with "
                    "--image-mpp (image_mpp in Python)"
                )
            opened.close()
            slide = opened.enter_context(open_slide(source, image_mpp))
        _ = slide.mpp  # raises where it is not known
        opened.pop_all()
        return slide


class CropSource:
    """A slide and the places where a crop at each scale lies on tissue."""

    def __init__(self, slide: Slide, scales: Sequence[float], crop_px: int, min_tissue: float) -> None:
        """Find the tissue and the places.

        Args:
            slide: open, of known scale; kept open.
            scales: micrometres per pixel of the crops.
            crop_px: side of a crop.
            min_tissue: least part of a crop that is tissue, to a pixel of the tissue's raster.

        Raises:
            SlideError: the slide cannot be read.
        """
        self.slide = slide
        self._crop_px = crop_px
        size_um = [n * m for n, m in zip(slide.dimensions, slide.mpp, strict=True)]
        tissue = detect_tissue(slide, _SMALL if min(size_um) < SMALL_UM else TissueSettings())
        self.has_tissue = bool(tissue.mask.any())
        self._raster_mpp = tissue.mpp
        sums = summed_area(tissue.mask)
        self._places = {mpp: self._find_places(sums, tissue, mpp, min_tissue) for mpp in scales}

    def places(self, mpp: float) -> int:
        """How many places of the tissue's raster there are for crops at a scale."""
        return len(self._places[mpp])

    def read(self, mpp: float, random: np.random.Generator) -> RGBImage:
        """A crop at a random place: uint8 (crop_px, crop_px, 3)."""
        places = self._places[mpp]
        place = places[int(random.integers(len(places)))] + random.random(2)  # (x, y) in raster pixels
        most = self._last_corner(mpp)
        x, y = (
            min(int(at * self._raster_mpp / own), last)
            for at, own, last in zip(place, self.slide.mpp, most, strict=True)
        )
        return self.slide.read_region(x, y, self._crop_px, self._crop_px, mpp=mpp)

    def fits(self, mpp: float) -> bool:
        """Whether a crop at a scale lies within the slide."""
        return min(self._last_corner(mpp)) >= 0

    def is_fine_enough(self, mpp: float) -> bool:
        """Whether a crop at a scale need not be enlarged."""
        return max(self.slide.mpp) <= mpp * FINER_BY

    def _last_corner(self, mpp: float) -> tuple[int, int]:
        """The last level-0 position (x, y) of a crop within the slide; negative where there is none."""
        (w, h), (mx, my) = self.slide.dimensions, self.slide.mpp
        side = self._crop_px * mpp
        return math.floor(w - side / mx + 1e-6), math.floor(h - side / my + 1e-6)

    def _find_places(
        self, sums: NDArray[np.int64], tissue: TissueMask, mpp: float, min_tissue: float
    ) -> NDArray[np.int64]:
        """Raster pixels (M, 2), x and y, in which the corner of a crop may lie, row by row."""
        if not self.fits(mpp) or not self.is_fine_enough(mpp):
            return np.empty((0, 2), np.int64)
        side = max(1, round(self._crop_px * mpp / tissue.mpp))
        last = [int(c * m / tissue.mpp) for c, m in zip(self._last_corner(mpp), self.slide.mpp, strict=True)]
        height, width = tissue.mask.shape
        x0, y0 = np.arange(min(last[0] + 1, width)), np.arange(min(last[1] + 1, height))
        x1, y1 = np.minimum(x0 + side, width), np.minimum(y0 + side, height)
        inside = sums[np.ix_(y1, x1)] - sums[np.ix_(y0, x1)] - sums[np.ix_(y1, x0)] + sums[np.ix_(y0, x0)]
        area = (y1 - y0)[:, None] * (x1 - x0)
        return np.argwhere(inside > min_tissue * area)[:, ::-1]


class CropSampler:
    """Crops from many sources; every one is a function of its seed, whatever was drawn before."""

    def __init__(self, sources: Sequence[CropSource], scales: Sequence[float]) -> None:
        self.sources = sources
        self.scales = tuple(scales)

    def read(self, scale: int, random: np.random.Generator) -> tuple[RGBImage, int]:
        """A crop at a scale (its number), uint8 (S, S, 3), and which source it is from, each as likely."""
        number = int(random.integers(len(self.sources)))
        return self.sources[number].read(self.scales[scale], random), number

    def close(self) -> None:
        """Close all slides."""
        for source in self.sources:
            source.slide.close()


def open_sampler(
    pictures: Sequence[tuple[Source, float | None]],
    scales: Sequence[float],
    crop_px: int,
    min_tissue: float = 0.9,
    image_mpp: float | None = None,
) -> CropSampler:
    """Open pictures and find where crops may be taken.

    A picture that cannot serve every scale is left out with a warning: if some gave crops at one scale only, the
    scale could be told from the stain.

    Raises:
        InputError: no picture serves every scale; the message says what most of them lack.
        ScaleError: a picture's scale is not known.
        SlideError: a picture cannot be read.
    """
    kept, reasons = [], []
    with ExitStack() as all_opened:
        for source, mpp in pictures:
            with ExitStack() as opened:
                slide = opened.enter_context(open_picture(source, mpp, image_mpp))
                crops = CropSource(slide, scales, crop_px, min_tissue)
                reason = _why_not(crops, scales, crop_px, min_tissue)
                if reason is None:
                    kept.append(crops)
                    all_opened.push(opened.pop_all())
                else:
                    reasons.append(f"{slide.path} {reason}")
        if not kept:
            raise InputError(reasons[0] if reasons else "no image or slide was named: give files or folders")
        all_opened.pop_all()
    for reason in reasons:
        log.warning("Left out: %s.", reason)
    return CropSampler(kept, scales)


def _why_not(crops: CropSource, scales: Sequence[float], crop_px: int, min_tissue: float) -> str | None:
    """What keeps a picture from serving every scale, to follow its name; None where nothing does."""
    slide = crops.slide
    for mpp in scales:
        if not crops.is_fine_enough(mpp):
            return f"has {max(slide.mpp):g} µm per pixel and crops at {mpp:g} are needed: give slides scanned finer"
    for mpp in sorted(scales, reverse=True):
        if not crops.fits(mpp):
            width, height = slide.dimensions
            need = [math.ceil(crop_px * mpp / own) for own in slide.mpp]
            return (
                f"has {width} × {height} px and a crop of {crop_px} px at {mpp:g} mpp needs {need[0]} × {need[1]}: "
                "give larger images or a smaller --crop-px"
            )
    if not crops.has_tissue:
        return "holds no tissue: give images of stained tissue"
    for mpp in scales:
        if not crops.places(mpp):
            return (
                f"has no place where {min_tissue:.0%} of a crop of {crop_px} px at {mpp:g} mpp is tissue: "
                "give larger pieces of tissue or a smaller --crop-px"
            )
    return None


def _literal(stem: str) -> str:
    """A name as a pattern that matches itself alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in stem)
