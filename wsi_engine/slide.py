"""A slide that is open for reading: its size, its scale, and its pixels at any scale."""

from __future__ import annotations

import math
import os
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from wsi_engine.clock import StageClock
from wsi_engine.errors import ScaleError, SettingsError
from wsi_engine.fingerprint import fingerprint_source
from wsi_engine.places import is_url, local_path
from wsi_engine.readers import open_reader
from wsi_engine.readers.base import DirectReader, Level, Metadata, Reader, RGBImage
from wsi_engine.sampling import Sampling, choose_sampling
from wsi_engine.workers import usable_cores

if TYPE_CHECKING:
    Source = str | os.PathLike[str] | NDArray[np.uint8]

MPP_RANGE = (0.05, 50.0)
"""Micrometres per pixel that a microscope slide can have; anything else in a header is a mistake."""

MPP_ANISOTROPY = 0.10
"""Pixels whose sides differ by more than this part are taken for a mistake in the header."""

_OVERVIEW_BLOCK = 4096
"""Side, in pixels of the level read, of the blocks that an overview is put together from."""


def open_slide(
    source: Source,
    mpp: float | tuple[float, float] | None = None,
    reader: str = "auto",
) -> Slide:
    """Open a slide for reading.

    Args:
        source: path or URL of a slide or picture, or an RGB array, uint8, (H, W, 3).
        mpp: micrometres per level-0 pixel, one number or (x, y), for slides whose header has none or a
            wrong one; None takes the header's.
        reader: ``auto`` (the fastest that can read the file), ``turbo``, ``openslide``, ``tiffslide`` or ``image``.

    Raises:
        SlideError: no reader can read it; the message names those tried.
        SettingsError: ``mpp`` is not a positive number or the reader is unknown.
    """
    override = None if mpp is None else _as_pair(mpp)
    clock = StageClock()
    if not isinstance(source, np.ndarray):
        source = local_path(os.fspath(source))
    return Slide(source, open_reader(source, reader, clock), override, clock)


class Slide:
    """A slide that is open for reading. Use as a context manager, or call :meth:`close`.

    Positions are level-0 pixels from the top-left corner. All methods may be called from several threads.
    """

    def __init__(
        self, source: Source, reader: Reader, mpp_override: tuple[float, float] | None, clock: StageClock
    ) -> None:
        self._source = source
        self._reader = reader
        self._direct = reader if isinstance(reader, DirectReader) else None
        self._override = mpp_override
        self.clock = clock
        """Seconds spent reading, decoding and resampling so far."""

    @property
    def path(self) -> str:
        """Path or URL as given; ``<array>`` for an array."""
        return "<array>" if isinstance(self._source, np.ndarray) else os.fspath(self._source)

    @property
    def name(self) -> str:
        """File name without folder and last suffix; ``array`` for an array."""
        return "array" if isinstance(self._source, np.ndarray) else slide_name(self.path)

    @property
    def reader(self) -> str:
        """Name of the reader in use."""
        return self._reader.name

    @property
    def backend(self) -> Reader:
        """The reader itself, for what only one kind of reader can do."""
        return self._reader

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height of level 0 in pixels."""
        return self.levels[0].width, self.levels[0].height

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels from the finest to the coarsest."""
        return self._reader.levels

    @property
    def metadata(self) -> Metadata:
        """What the file says about itself."""
        return self._reader.metadata

    @property
    def mpp_source(self) -> str | None:
        """Where :attr:`mpp` comes from: a header field, ``override``, or None when there is none."""
        return "override" if self._override else self.metadata.mpp_source

    @cached_property
    def mpp(self) -> tuple[float, float]:
        """Micrometres per level-0 pixel, x and y.

        Raises:
            ScaleError: the header has none, one outside :data:`MPP_RANGE`, or one whose x and y differ by
                more than :data:`MPP_ANISOTROPY`, and none was given to :func:`open_slide`.
        """
        if self._override:
            return self._override
        return _believable(self.metadata.mpp, self.metadata.mpp_source, self.path)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that tells this slide's content from another's; see :mod:`wsi_engine.fingerprint`."""
        return fingerprint_source(self._source)

    def sampling(self, mpp: float | None, exact: bool = False) -> Sampling:
        """Which level is read for pixels of ``mpp`` micrometres, and the scale left to resample.

        None means level-0 pixels as they are, for which no scale need be known. ``exact`` keeps the reader from
        shrinking while it decodes: all resampling is left to the area filter.

        Raises:
            ScaleError: the slide's own scale is missing or not believable.
            SettingsError: ``mpp`` is not a positive number.
        """
        if mpp is None:
            return Sampling(0, 1.0, (1.0, 1.0))
        if not (mpp > 0 and math.isfinite(mpp)):
            raise SettingsError(f"mpp must be a positive number of micrometres per pixel, not {mpp}")
        reductions = self._direct.reductions if self._direct and not exact else (1,)
        return choose_sampling(self.levels, self.mpp, mpp, reductions)

    def read_region(
        self, x: int, y: int, width: int, height: int, mpp: float | None = None, exact: bool = True
    ) -> RGBImage:
        """Pixels of a rectangle at any scale.

        The rectangle starts at level-0 pixel (x, y) and spans exactly ``width · mpp`` by ``height · mpp``
        micrometres; pixels come from the best level through an area filter
        (:func:`wsi_engine.kernels.resample_area`). What lies outside the slide is white.

        Args:
            x: left edge, level-0 pixels.
            y: top edge, level-0 pixels.
            width: output pixels along x.
            height: output pixels along y.
            mpp: micrometres per output pixel; None for level-0 pixels as they are.
            exact: resample by the area filter alone, so that all readers give the same pixels; False lets a reader
                shrink while it decodes, as :func:`~wsi_engine.stream.stream_tiles` does, which is faster from a scale
                of 2 on.

        Returns:
            uint8, (height, width, 3), RGB.

        Raises:
            ScaleError: ``mpp`` was given and the slide's own scale is missing or not believable.
            SlideError: the file ends early or cannot be decoded.
        """
        if width < 1 or height < 1:
            raise SettingsError(f"a region must have at least one pixel, not {width} × {height}")
        return self.read_sampled(self.sampling(mpp, exact), x, y, width, height)

    def read_sampled(
        self, sampling: Sampling, x: int, y: int, width: int, height: int, out: RGBImage | None = None
    ) -> RGBImage:
        """:meth:`read_region` with the level and scale already chosen; ``out`` takes the pixels where given."""
        box_x, box_y, box_w, box_h = sampling.box(x, y, width, height)
        if (box_w, box_h) == (width, height) and sampling.scale == (1.0, 1.0):
            return self._read(sampling, box_x, box_y, box_w, box_h, out)
        pixels = self._read(sampling, box_x, box_y, box_w, box_h, None)
        left, top = sampling.corner(x, y)
        from wsi_engine.kernels.resample import resample_area  # noqa: PLC0415 - Numba loads only when it is needed

        with self.clock.measure("resample"):
            return resample_area(pixels, left - box_x, top - box_y, *sampling.scale, width, height, out)

    def _read(self, sampling: Sampling, x: int, y: int, width: int, height: int, out: RGBImage | None) -> RGBImage:
        """Pixels of the reader, put into ``out`` where given."""
        if self._direct:
            target = np.empty((height, width, 3), np.uint8) if out is None else out
            self._direct.read_into(target, sampling.level, x, y, sampling.reduce)
            return target
        pixels = self._reader.read(sampling.level, x, y, width, height)
        if out is None:
            return pixels
        out[...] = pixels
        return out

    def expect(
        self, sampling: Sampling, origins: NDArray[np.int64], width: int, height: int
    ) -> AbstractContextManager[None]:
        """Announce the rectangles that will be read next, so that work they share is done once.

        Args:
            sampling: the level and scale they will be read at.
            origins: int64, (N, 2), level-0 top-left corners in the order of reading.
            width: output pixels along x of each.
            height: output pixels along y of each.
        """
        boxes = sampling.boxes(origins, width, height)
        if self._direct:
            return self._direct.expect(sampling.level, boxes, sampling.reduce)
        return self._reader.expect(sampling.level, boxes)

    def read_overview(self, mpp: float, pool: Executor | None = None) -> RGBImage:
        """The whole slide at a coarse scale, read block by block so that memory follows the result's size.

        Args:
            mpp: micrometres per output pixel.
            pool: whose threads read; None for as many of its own as there are usable cores.

        Returns:
            uint8, (H, W, 3), from the slide's top-left corner; the last row and column are partly white where
            the slide's size is no multiple of the output pixel.
        """
        sampling = self.sampling(mpp)
        per_px = sampling.size_level0
        width, height = (max(1, math.ceil(n / s - 1e-9)) for n, s in zip(self.dimensions, per_px, strict=True))
        out = np.empty((height, width, 3), np.uint8)
        block = max(1, int(_OVERVIEW_BLOCK / max(sampling.scale)))

        def fill(corner: tuple[int, int]) -> None:
            left, top = corner
            w, h = min(block, width - left), min(block, height - top)
            x, y = round(left * per_px[0]), round(top * per_px[1])
            out[top : top + h, left : left + w] = self.read_sampled(sampling, x, y, w, h)

        corners = [(left, top) for top in range(0, height, block) for left in range(0, width, block)]
        if pool:
            list(pool.map(fill, corners))
        else:
            with ThreadPoolExecutor(usable_cores(), "overview") as own:
                list(own.map(fill, corners))
        return out

    def close(self) -> None:
        """Give back file handles and caches."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        width, height = self.dimensions
        return f"<Slide {self.name}: {width} × {height} px, {len(self.levels)} levels, reader {self.reader}>"


def slide_name(path: str) -> str:
    """File name of a path or URL without folder and last suffix."""
    name = PurePosixPath(path.split("?", 1)[0]).name if is_url(path) else os.path.basename(path.rstrip("/\\"))
    return PurePosixPath(name).stem


def _as_pair(mpp: float | tuple[float, float]) -> tuple[float, float]:
    """(x, y) from one number or two, checked."""
    try:
        pair = (float(mpp), float(mpp)) if isinstance(mpp, int | float) else (float(mpp[0]), float(mpp[1]))
    except (TypeError, ValueError, IndexError):
        raise SettingsError(f"the slide's mpp must be one number or (x, y), not {mpp!r}") from None
    if not all(value > 0 and math.isfinite(value) for value in pair):
        raise SettingsError(f"the slide's mpp must be positive, not {mpp!r}")
    return pair


def _believable(mpp: tuple[float, float] | None, source: str | None, path: str) -> tuple[float, float]:
    """The header's scale, or a ScaleError that says why it is not taken and what to do."""
    cure = "pass the true value with --slide-mpp (mpp= in Python)"
    if mpp is None:
        raise ScaleError(f"{path} does not say how many micrometres its pixels measure: {cure}")
    low, high = MPP_RANGE
    if not all(low <= value <= high for value in mpp):
        raise ScaleError(f"{path} claims {mpp[0]:g} × {mpp[1]:g} µm per pixel ({source}), outside {low}–{high}: {cure}")
    if max(mpp) > min(mpp) * (1 + MPP_ANISOTROPY):
        raise ScaleError(
            f"{path} claims pixels of {mpp[0]:g} × {mpp[1]:g} µm ({source}), "
            f"sides that differ by more than {MPP_ANISOTROPY:.0%}: {cure}"
        )
    return mpp
