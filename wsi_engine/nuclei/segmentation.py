"""Every nucleus of a slide or a picture, the same whatever the tiles: ``segment_nuclei``.

Tiles are read ahead by threads and put through the method; beside it, a thread joins components across the seams,
splits the complete ones into nuclei and measures them. At the end they are put in the order of the slide.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.grid import tissue_settings
from wsi_engine.nuclei.frame import Frame, FrameReader, TissueRaster, frame_slide
from wsi_engine.nuclei.instances import InstanceRecord, InstanceSet, assemble_instances
from wsi_engine.nuclei.method import NucleiMethod, create_method
from wsi_engine.nuclei.postprocessing import PostProcessing
from wsi_engine.nuclei.seams import LARGEST_PX, SeamJoiner
from wsi_engine.nuclei.sheets import SheetSplitter
from wsi_engine.nuclei.windows import WindowPlan
from wsi_engine.slide import Slide, open_slide
from wsi_engine.tissue import TissueMask, TissueSettings, detect_tissue

log = logging.getLogger("wsi_engine")

TissueOption: TypeAlias = Literal["auto", "otsu"] | TissueSettings | TissueMask | None

WHOLE_MM2 = 0.25
"""Pictures of up to this area are looked at whole under ``tissue="auto"``: they are cut out of tissue."""

TISSUE = TissueSettings(median_px=3)
"""How tissue is found where nuclei are looked for: also strands too thin for a tile, which a wider median loses."""

SAMPLES, SAMPLE_PX = 64, 256
"""Windows, and their side, that a method adapts to; a picture with no more pixels is one sample."""

DARK = 70
"""Median of the brightest channel, over the samples, below which a slide is taken for fluorescence."""

SPARSE, SPARSE_MM2 = 150, 0.05
"""Nuclei per mm² of tissue, of at least so many mm², below which the scale may be wrong: a warning is given."""


@dataclass(frozen=True)
class NucleiSettings:
    """How a slide is gone through; none of it changes the nuclei but ``tissue`` and ``largest_px``.

    Attributes:
        tile_px: side of what is read and put through the method at a time, in pixels of the method's scale; rounded up
            to whole windows of a method with a network (1,024 pixels for the student, 512 for scale attention).
        tissue: ``"otsu"`` looks at tissue alone (by :data:`TISSUE`), None at everything, ``"auto"`` at everything up to
            :data:`WHOLE_MM2` and else at tissue; settings or a mask of one's own can be given.
        allow_dark: take slides that look like fluorescence.
        workers: reading threads.
        largest_px: pixels of the bounding box up to which touching nuclei are split together.
    """

    tile_px: int = 1024
    tissue: TissueOption = "auto"
    allow_dark: bool = False
    workers: int = 2
    largest_px: int = LARGEST_PX

    def __post_init__(self) -> None:
        if not 64 <= self.tile_px <= 8192:
            raise SettingsError(f"--tile-px must be within 64–8192 pixels, not {self.tile_px}")
        if self.workers < 1:
            raise SettingsError(f"--workers must be at least 1, not {self.workers}")
        if self.largest_px < 1:
            raise SettingsError(f"the largest component must have at least 1 pixel, not {self.largest_px}")
        if self.tissue != "auto":
            tissue_settings(self.tissue)


class TileProgress(Protocol):
    """Told how a slide goes."""

    def slide_started(self, slide_id: str, tiles: int, done: int) -> None:
        """So many tiles will be gone through."""

    def tiles_done(self, tiles: int) -> None:
        """So many more are."""


def segment_nuclei(
    slide: Slide | str | os.PathLike[str] | NDArray[np.uint8],
    model: str | os.PathLike[str] | NucleiMethod = "builtin",
    mpp: float | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
    tile_px: int = 1024,
    tissue: TissueOption = "auto",
    allow_dark: bool = False,
    workers: int = 2,
    progress: TileProgress | None = None,
) -> InstanceSet:
    """Find and measure every nucleus of a slide or a picture.

    The nuclei are the same, to the last bit, whatever ``tile_px`` and the number of threads: pixels are read on one
    lattice, thresholds are found once per slide, and touching nuclei are split when all of them have been seen,
    whichever tiles they cross. A pixel is looked at when its centre is on tissue or within one pixel of the tissue's
    raster (8 µm) of it. Fields of touching nuclei whose bounding box has more than 2²⁴ pixels are cut along a lattice
    of 1,024 pixels, with a warning.

    Args:
        slide: an open slide, a path or URL, or an RGB picture, uint8 (H, W, 3).
        model: ``builtin``, a method's name (``student``, ``stain``, ``scale-attention``), a file of weights, or a
            :class:`~wsi_engine.nuclei.method.NucleiMethod`.
        mpp: micrometres per level-0 pixel, for pictures, and for slides whose header has none or a wrong one.
        weights: a file of weights for a method that has some; None for those that come with the engine.
        device: where networks run: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        tile_px: side of the tiles, in pixels of the method's scale; see :class:`NucleiSettings`.
        tissue: where to look; see :class:`NucleiSettings`.
        allow_dark: take slides that look like fluorescence, which the methods are not made for.
        workers: reading threads.
        progress: told how it goes.

    Returns:
        the nuclei; none, with a warning, where there is no tissue.

    Raises:
        ScaleError: the mpp is missing or not believable.
        SlideError: the slide cannot be read, or looks like fluorescence.
        SettingsError: a setting is out of range, the method is unknown, or the picture is too small to tell nuclei.
        ModelError: the weights are missing, damaged or of another model.
        EncoderError: there is no such device.

    Example:
        >>> from wsi_engine.synthetic import SlideSpec, SyntheticSlide
        >>> picture = SyntheticSlide(SlideSpec(512, 512, coverage=1)).paint(0, 0, 512, 512)
        >>> len(segment_nuclei(picture, "stain", mpp=0.25)) > 10
        True

    """
    method: NucleiMethod = create_method(model, weights, device)
    settings = NucleiSettings(tile_px, tissue, allow_dark, workers)
    if isinstance(slide, Slide) and mpp is not None:
        raise SettingsError("the mpp of an open slide is given to open_slide(mpp=), not here")
    with nullcontext(slide) if isinstance(slide, Slide) else open_slide(slide, mpp) as opened:
        prepared = PreparedSlide(opened, method, settings)
        return prepared.segment(progress)


class PreparedSlide:
    """A slide whose tissue is found, and what is needed to go through it.

    Raises:
        WsiError: as :func:`segment_nuclei`.
    """

    def __init__(
        self, slide: Slide, method: NucleiMethod, settings: NucleiSettings, slide_id: str | None = None
    ) -> None:
        self._slide, self._method, self._settings = slide, method, settings
        self.frame = frame_slide(slide, method.mpp)
        self.tissue = _find_tissue(slide, self.frame, settings.tissue)
        self._reader = FrameReader(slide, self.frame)
        self._raster = TissueRaster(self.frame, slide.mpp, self.tissue)
        self._plan = WindowPlan(self._reader, self._raster, method, settings.tile_px)
        self._per_px = self.frame.per_px[0] / method.detail, self.frame.per_px[1] / method.detail
        tissue = self.tissue
        self.record = InstanceRecord(
            slide=slide_id or slide.name,
            dimensions=slide.dimensions,
            mpp=slide.mpp,
            method=method.name,
            method_settings=method.to_json() | {"largest_px": settings.largest_px},
            fitted={},
            method_mpp=method.mpp / method.detail,
            tissue_mm2=self.frame.area_mm2 if tissue is None else tissue.area_mm2,
            tissue_digest="" if tissue is None else tissue.digest,
        )
        """What the nuclei will say of themselves, but for what is found on the way."""

    def segment(self, progress: TileProgress | None = None) -> InstanceSet:
        """Go through the slide."""
        if self.tissue is not None and not self.tissue.mask.any():
            self._refuse_dark([self._slide.read_overview(max(16.0, *self._slide.mpp))])
            log.warning("%s has no tissue, so no nuclei: look at it, or pass --tissue none", self._slide.path)
            return assemble_instances([], self._per_px, self.record)
        samples = _read_samples(self._reader, self.tissue, self._slide.mpp)
        self._refuse_dark(samples)
        fitted = self._method.fit(samples)
        if progress:
            progress.slide_started(self.record.slide, len(self._plan), 0)
        joiner = SeamJoiner(self._plan.keys, self._plan.side * self._method.detail, self._settings.largest_px)
        with PostProcessing(joiner, SheetSplitter(fitted, self._method.gap_px)) as behind:
            for windows in self._plan.stream(fitted, self._settings.workers):
                behind.take(windows)
                if progress:
                    progress.tiles_done(1)
        if joiner.cut:
            log.warning(
                "%s: %d fields of touching nuclei are larger than %d pixels and were cut along a lattice",
                self._slide.path, joiner.cut, self._settings.largest_px,
            )  # fmt: skip
        record = replace(self.record, fitted=fitted.to_json(), cut_components=joiner.cut)
        nuclei = assemble_instances(behind.chunks, self._per_px, record)
        self._warn_of_few(nuclei)
        return nuclei

    def _warn_of_few(self, nuclei: InstanceSet) -> None:
        area = self.record.tissue_mm2
        if area >= SPARSE_MM2 and len(nuclei) < SPARSE * area:
            log.warning(
                "%s: only %.0f nuclei per mm² of tissue: see whether %g µm per pixel is right, and the stain H&E",
                self._slide.path, len(nuclei) / area, self._slide.mpp[0],
            )  # fmt: skip

    def _refuse_dark(self, samples: Sequence[NDArray[np.uint8]]) -> None:
        brightest = np.concatenate([sample.max(axis=2).ravel() for sample in samples])
        if np.median(brightest) < DARK and not self._settings.allow_dark:
            raise SlideError(
                f"{self._slide.path} is dark like fluorescence, and nuclei are looked for in stained tissue on a "
                "bright ground; pass --allow-dark (allow_dark=True) to try all the same"
            )


def _find_tissue(slide: Slide, frame: Frame, choice: TissueOption) -> TissueMask | None:
    if choice == "auto":
        choice = "otsu" if frame.area_mm2 > WHOLE_MM2 else None
    if isinstance(choice, TissueMask) or choice is None:
        return choice
    return detect_tissue(slide, TISSUE if choice == "otsu" else choice)


def _read_samples(
    reader: FrameReader, tissue: TissueMask | None, slide_mpp: tuple[float, float]
) -> list[NDArray[np.uint8]]:
    """Pictures of tissue, evenly over the slide; the same whatever the tiles."""
    frame = reader.frame
    if frame.width * frame.height <= SAMPLES * SAMPLE_PX**2:
        return [reader.read(0, 0, frame.width, frame.height)]
    if tissue is None:
        side = int(SAMPLES**0.5)
        xs, ys = ((np.arange(side) + 0.5) / side * extent for extent in (frame.width, frame.height))
        centres = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    else:
        rows, columns = np.nonzero(tissue.mask)
        chosen = np.linspace(0, len(rows) - 1, min(SAMPLES, len(rows))).round().astype(np.int64)
        to_frame = [tissue.mpp / m / p for m, p in zip(slide_mpp, frame.per_px, strict=True)]
        centres = np.stack([columns[chosen] + 0.5, rows[chosen] + 0.5], axis=1) * to_frame
    limits = np.array([frame.width - SAMPLE_PX, frame.height - SAMPLE_PX])
    corners = np.clip(centres.astype(np.int64) - SAMPLE_PX // 2, 0, np.maximum(limits, 0))
    width, height = min(SAMPLE_PX, frame.width), min(SAMPLE_PX, frame.height)
    return [reader.read(x, y, width, height) for x, y in corners.tolist()]
