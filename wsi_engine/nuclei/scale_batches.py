"""Batches for training scale attention: balanced over scales, coloured, and each a function of seed and number."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from wsi_engine.models.scale_losses import SYMMETRIES
from wsi_engine.nuclei.samples import CropSampler
from wsi_engine.nuclei.scale_settings import ScaleTrainingSettings
from wsi_engine.nuclei.scale_stains import Look, jitter_stains, match_look, mean_look, measure_look
from wsi_engine.nuclei.scale_targets import find_least_density, paint_stain_target
from wsi_engine.readers.base import RGBImage

_TRAINING, _SHEET, _LOOK = 0, 1, 2
"""Streams of random numbers, so that none depends on another."""

_LOOK_CROPS = 8
_AHEAD = 2

_Value = TypeVar("_Value", bound=np.generic)


@dataclass(frozen=True, eq=False)
class CropBatch:
    """B crops.

    ``pixels`` uint8 (B, S, S, 3); ``scales`` int64 (B,), number of the scale; ``symmetries`` (B,), those that the
    equivariance loss is to use; ``target`` float32 (B, S, S) within 0-1, where the stain sees nuclei, in stain epochs.
    """

    pixels: NDArray[np.uint8]
    scales: NDArray[np.int64]
    symmetries: tuple[int, ...]
    target: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class _Crop:
    """One of a batch."""

    pixels: RGBImage
    symmetry: int
    target: NDArray[np.float32] | None


class CropFeed:
    """Makes batches ahead of time, in threads; close it or use it as a context manager."""

    def __init__(self, sampler: CropSampler, settings: ScaleTrainingSettings) -> None:
        """Measure each picture: its look where crops are to be normalised, its stain where that is to be learnt.

        Raises:
            InputError: the stains of a picture cannot be told.
            SlideError: a picture cannot be read.
        """
        self._sampler, self._settings = sampler, settings
        self._pool = ThreadPoolExecutor(settings.workers, "crops")
        self._looks: list[Look] = []
        self._least_densities: list[float] = []
        sources = range(len(sampler.sources))
        try:
            if settings.normalisation != "none":
                self._looks = list(self._pool.map(self._measure_look, sources))
            if settings.stain_epochs:
                self._least_densities = list(self._pool.map(self._measure_stain, sources))
        except BaseException:
            self.close()
            raise
        self.reference = mean_look(self._looks) if self._looks else None
        """What crops are brought to; None where they are not normalised."""

    def batches(self, start: int, stop: int) -> Iterator[CropBatch]:
        """Batches number ``start`` to ``stop`` - 1."""
        ahead: deque[tuple[NDArray[np.int64], list[Future[_Crop]]]] = deque()
        following = start
        for _ in range(start, stop):
            while following < min(stop, start + 1 + _AHEAD):
                scales = self._balance(following)
                crops = [
                    self._pool.submit(self._train_crop, following, i, int(scale)) for i, scale in enumerate(scales)
                ]
                ahead.append((scales, crops))
                following += 1
            start += 1
            scales, crops = ahead.popleft()
            done = [crop.result() for crop in crops]
            targets = [one.target for one in done if one.target is not None]
            yield CropBatch(
                np.stack([one.pixels for one in done]),
                scales,
                tuple(one.symmetry for one in done),
                np.stack(targets) if targets else None,
            )

    def sheet(self) -> CropBatch:
        """The same crops after every epoch, without jitter: ``sheet_crops`` at each scale."""
        count = self._settings.sheet_crops
        scales = np.repeat(np.arange(len(self._sampler.scales)), count)
        read = [self._sampler.read(int(scale), self._random(_SHEET, 0, i)) for i, scale in enumerate(scales)]
        pixels = [self._normalise(crop, source) for crop, source in read]
        return CropBatch(np.stack(pixels), scales, (0,) * len(scales))

    def close(self) -> None:
        """Stop the threads; what they were making is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> CropFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _balance(self, step: int) -> NDArray[np.int64]:
        """Scales of a batch: as many of each; the ones left over go round from batch to batch."""
        kinds = len(self._sampler.scales)
        scales = (np.arange(self._settings.batch_size) + step * (self._settings.batch_size % kinds)) % kinds
        return self._random(_TRAINING, step, 0).permutation(scales)

    def _train_crop(self, step: int, place: int, scale: int) -> _Crop:
        """An augmented crop, the symmetry for its equivariance, and in stain epochs its target."""
        random = self._random(_TRAINING, step, place + 1)
        raw, source = self._sampler.read(scale, random)
        pixels = self._normalise(raw, source)
        if self._settings.stain_jitter:
            pixels = jitter_stains(pixels, random.normal(1, self._settings.stain_jitter, 3))
        turn, symmetry = int(random.integers(SYMMETRIES)), int(random.integers(1, SYMMETRIES))
        target = None
        if step < self._settings.stain_steps:  # of the pixels as they are, to which the threshold belongs
            target = _turn(paint_stain_target(raw, self._sampler.scales[scale], self._least_densities[source]), turn)
        return _Crop(_turn(pixels, turn), symmetry, target)

    def _normalise(self, pixels: RGBImage, source: int) -> RGBImage:
        """A crop of a picture, brought to the look of all if that is asked for."""
        if self.reference is None:
            return pixels
        return match_look(pixels, self._looks[source], self.reference)

    def _measure_look(self, source: int) -> Look:
        """The look of a picture."""
        where = self._sampler.sources[source].slide.path
        return measure_look(np.stack(self._read_middle(source)), self._settings.normalisation, where)

    def _measure_stain(self, source: int) -> float:
        """The least density of haematoxylin in a picture's nuclei."""
        return find_least_density(self._read_middle(source), self._sampler.scales[1])

    def _read_middle(self, source: int) -> list[RGBImage]:
        """Crops of a picture at the middle scale, to measure it by."""
        crops, random = self._sampler.sources[source], self._random(_LOOK, source, 0)
        return [crops.read(self._sampler.scales[1], random) for _ in range(_LOOK_CROPS)]

    def _random(self, stream: int, number: int, place: int) -> np.random.Generator:
        return np.random.default_rng([self._settings.seed, stream, number, place])


def _turn(pixels: NDArray[_Value], turn: int) -> NDArray[_Value]:
    """One of the eight symmetries of the square: (S, S, ...) to the same."""
    return np.ascontiguousarray(np.rot90(pixels.swapaxes(0, 1) if turn >= 4 else pixels, turn % 4))
