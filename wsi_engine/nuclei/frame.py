"""A slide at a method's scale: its lattice of pixels, and their values, whichever windows they are read in."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsi_engine.errors import ScaleError, SettingsError
from wsi_engine.kernels.resample import resample_area
from wsi_engine.readers.base import DirectReader, RGBImage
from wsi_engine.sampling import Sampling
from wsi_engine.slide import Slide
from wsi_engine.tissue import TissueMask

LEAST_SIDE = 32
"""Fewest rows and columns, at the method's scale, from which nuclei are told."""

FINEST_MPP, COARSEST_MPP = 0.1, 1.2
"""Micrometres per level-0 pixel between which nuclei are told: no slide is scanned finer, and at coarser ones they are
five pixels wide."""

_BLOCK = 128
"""Side of the blocks that pixels are resampled in. They lie on a lattice of the slide, so that a pixel comes out to the
last bit the same in every window; a window's own corner would move the rounding of all positions."""

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Frame:
    """The pixels that a method works on.

    Attributes:
        width: pixels of ``mpp`` that lie wholly within the slide, along x.
        height: the same along y.
        mpp: micrometres per pixel.
        per_px: level-0 pixels along one pixel, x and y.
    """

    width: int
    height: int
    mpp: float
    per_px: tuple[float, float]

    @property
    def area_mm2(self) -> float:
        """Area in mm²."""
        return self.width * self.height * self.mpp**2 / 1e6


def frame_slide(slide: Slide, mpp: float) -> Frame:
    """The pixels of a slide at ``mpp`` micrometres.

    Raises:
        ScaleError: the slide's scale is missing, not believable, or too coarse for nuclei.
        SettingsError: the slide is smaller than :data:`LEAST_SIDE` pixels at ``mpp``.
    """
    if max(slide.mpp) > COARSEST_MPP:
        raise ScaleError(
            f"{slide.path} has {max(slide.mpp):g} µm per pixel at its finest, and nuclei are told up to "
            f"{COARSEST_MPP} µm; check the scale, or scan at a higher power"
        )
    if min(slide.mpp) < FINEST_MPP:
        raise ScaleError(
            f"{slide.path} is said to have {min(slide.mpp):g} µm per pixel, finer than any slide scanner "
            f"({FINEST_MPP} µm); pass the true value with --slide-mpp (mpp= in Python)"
        )
    per_px = slide.sampling(mpp).size_level0
    width, height = (math.floor(n / s + _ROUNDING) for n, s in zip(slide.dimensions, per_px, strict=True))
    if min(width, height) < LEAST_SIDE:
        across, down = slide.dimensions
        raise SettingsError(
            f"{slide.path} of {across} × {down} pixels at {slide.mpp[0]:g} µm is {width} × {height} at {mpp:g} µm, and "
            f"nuclei are told from {LEAST_SIDE} on; give a larger picture, or check the scale"
        )
    return Frame(width, height, mpp, per_px)


class FrameReader:
    """Reads windows of a frame. May be used from several threads."""

    def __init__(self, slide: Slide, frame: Frame) -> None:
        self.frame = frame
        self._slide = slide
        self._sampling: Sampling = slide.sampling(frame.mpp)
        self._plain = self._sampling.scale == (1.0, 1.0)
        level = slide.levels[self._sampling.level]
        self._limits = level.width // self._sampling.reduce, level.height // self._sampling.reduce

    def read(self, x: int, y: int, width: int, height: int) -> RGBImage:
        """Pixels of a window within the frame: uint8 (height, width, 3).

        Raises:
            SlideError: the slide cannot be read.
        """
        if self._plain:
            return self._read_box(x, y, width, height)
        out = np.empty((height, width, 3), np.uint8)
        columns, rows = _blocks(x, x + width), _blocks(y, y + height)
        spans_x = [self._span(0, column, self.frame.width) for column in columns]
        spans_y = [self._span(1, row, self.frame.height) for row in rows]
        left, top = spans_x[0][0], spans_y[0][0]
        box = self._read_box(left, top, spans_x[-1][1] - left, spans_y[-1][1] - top)
        with self._slide.clock.measure("resample"):
            for row, (top_px, bottom_px) in zip(rows, spans_y, strict=True):
                for column, (left_px, right_px) in zip(columns, spans_x, strict=True):
                    part = box[top_px - top : bottom_px - top, left_px - left : right_px - left]
                    block = self._resample(part, column, row, left_px, top_px)
                    _copy_overlap(block, column * _BLOCK, row * _BLOCK, out, x, y)
        return out

    def expect(self, windows: NDArray[np.int64]) -> AbstractContextManager[None]:
        """Announce windows, int64 (N, 4): x, y, width, height, so that each compressed tile is decoded once."""
        boxes = np.empty((len(windows), 4), np.int64)
        for axis in (0, 1):
            limit = (self.frame.width, self.frame.height)[axis]
            if self._plain:
                boxes[:, axis], boxes[:, axis + 2] = windows[:, axis], windows[:, axis + 2]
                continue
            low = windows[:, axis] // _BLOCK
            high = (windows[:, axis] + windows[:, axis + 2] - 1) // _BLOCK
            spans = {int(k): self._span(axis, int(k), limit) for k in np.unique(np.concatenate([low, high]))}
            boxes[:, axis] = [spans[int(k)][0] for k in low]
            boxes[:, axis + 2] = [spans[int(k)][1] for k in high] - boxes[:, axis]
        backend, sampling = self._slide.backend, self._sampling
        if isinstance(backend, DirectReader):
            return backend.expect(sampling.level, boxes, sampling.reduce)
        return backend.expect(sampling.level, boxes)

    def _span(self, axis: int, block: int, extent: int) -> tuple[int, int]:
        """First read pixel that a block needs along an axis, and the one after the last."""
        scale = self._sampling.scale[axis]
        margin = 1.0 if scale < 1 else 0.0
        begin, end = block * _BLOCK * scale, min((block + 1) * _BLOCK, extent) * scale
        limit = self._limits[axis]
        low = min(max(math.floor(begin - margin + _ROUNDING), 0), limit - 1)
        return low, max(min(math.ceil(end + margin - _ROUNDING), limit), low + 1)

    def _resample(self, part: RGBImage, column: int, row: int, left: int, top: int) -> RGBImage:
        scale_x, scale_y = self._sampling.scale
        width = min(_BLOCK, self.frame.width - column * _BLOCK)
        height = min(_BLOCK, self.frame.height - row * _BLOCK)
        corner = column * _BLOCK * scale_x - left, row * _BLOCK * scale_y - top
        return resample_area(part, *corner, scale_x, scale_y, width, height)

    def _read_box(self, x: int, y: int, width: int, height: int) -> RGBImage:
        """Read pixels as they are."""
        backend, sampling = self._slide.backend, self._sampling
        if isinstance(backend, DirectReader):
            out = np.empty((height, width, 3), np.uint8)
            backend.read_into(out, sampling.level, x, y, sampling.reduce)
            return out
        return backend.read(sampling.level, x, y, width, height)


def _blocks(start: int, stop: int) -> range:
    """Numbers of the blocks that a stretch touches."""
    return range(start // _BLOCK, (stop - 1) // _BLOCK + 1)


def _copy_overlap(block: RGBImage, left: int, top: int, out: RGBImage, x: int, y: int) -> None:
    """Copy what a block at (left, top) has in common with a window at (x, y)."""
    x0, x1 = max(left, x), min(left + block.shape[1], x + out.shape[1])
    y0, y1 = max(top, y), min(top + block.shape[0], y + out.shape[0])
    out[y0 - y : y1 - y, x0 - x : x1 - x] = block[y0 - top : y1 - top, x0 - left : x1 - left]


class TissueRaster:
    """Which pixels of a frame are looked at: those whose centre lies on tissue, or one raster pixel beside it.

    The rim keeps nuclei whole that lie on the outline of the tissue, which is drawn in steps of the raster.
    """

    def __init__(self, frame: Frame, slide_mpp: tuple[float, float], tissue: TissueMask | None) -> None:
        self._frame = frame
        self._mask = None if tissue is None else ndimage.binary_dilation(tissue.mask, np.ones((3, 3), bool))
        self._step = (1.0, 1.0)
        if tissue is not None:
            self._step = tuple(p * m / tissue.mpp for p, m in zip(frame.per_px, slide_mpp, strict=True))  # type: ignore[assignment]

    def of(self, x: int, y: int, width: int, height: int) -> NDArray[np.bool_] | None:
        """The pixels of a window that are looked at: bool (height, width); None where all are."""
        if self._mask is None:
            return None
        rows, columns = self._places(y, height, 1), self._places(x, width, 0)
        out: NDArray[np.bool_] = self._mask[rows][:, columns]
        return out

    def any(self, x: int, y: int, width: int, height: int) -> bool:
        """Whether any pixel of a window is looked at."""
        if self._mask is None:
            return True
        rows, columns = self._places(y, height, 1), self._places(x, width, 0)
        return bool(self._mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].any())

    def _places(self, start: int, size: int, axis: int) -> NDArray[np.int64]:
        assert self._mask is not None
        limit = self._mask.shape[1 - axis] - 1
        places = ((start + np.arange(size) + 0.5) * self._step[axis]).astype(np.int64)
        out: NDArray[np.int64] = np.minimum(places, limit)
        return out
