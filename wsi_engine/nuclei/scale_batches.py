"""Batches for training scale attention: balanced over scales, coloured, and each a function of seed and number."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_engine.models.scale_losses import SYMMETRIES
from wsi_engine.nuclei.samples import CropSampler
from wsi_engine.nuclei.scale_settings import ScaleTrainingSettings
from wsi_engine.nuclei.scale_stains import Look, jitter_stains, match_look, mean_look, measure_look
from wsi_engine.readers.base import RGBImage

_TRAINING, _SHEET, _LOOK = 0, 1, 2
"""Streams of random numbers, so that none depends on another."""

_LOOK_CROPS = 8
_AHEAD = 2


@dataclass(frozen=True, eq=False)
class CropBatch:
    """B crops.

    ``pixels`` uint8 (B, S, S, 3); ``scales`` int64 (B,), number of the scale; ``symmetries`` (B,), those that the
    equivariance loss is to use.
    """

    pixels: NDArray[np.uint8]
    scales: NDArray[np.int64]
    symmetries: tuple[int, ...]


class CropFeed:
    """Makes batches ahead of time, in threads; close it or use it as a context manager."""

    def __init__(self, sampler: CropSampler, settings: ScaleTrainingSettings) -> None:
        """Measure the look of each picture, where crops are to be normalised.

        Raises:
            InputError: the stains of a picture cannot be told.
            SlideError: a picture cannot be read.
        """
        self._sampler, self._settings = sampler, settings
        self._pool = ThreadPoolExecutor(settings.workers, "crops")
        self._looks: list[Look] = []
        if settings.normalisation != "none":
            try:
                self._looks = list(self._pool.map(self._measure, range(len(sampler.sources))))
            except BaseException:
                self.close()
                raise
        self.reference = mean_look(self._looks) if self._looks else None
        """What crops are brought to; None where they are not normalised."""

    def batches(self, start: int, stop: int) -> Iterator[CropBatch]:
        """Batches number ``start`` to ``stop`` - 1."""
        ahead: deque[tuple[NDArray[np.int64], list[Future[tuple[RGBImage, int]]]]] = deque()
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
            yield CropBatch(np.stack([one for one, _ in done]), scales, tuple(symmetry for _, symmetry in done))

    def sheet(self) -> CropBatch:
        """The same crops after every epoch, without jitter: ``sheet_crops`` at each scale."""
        count = self._settings.sheet_crops
        scales = np.repeat(np.arange(len(self._sampler.scales)), count)
        pixels = [self._crop(self._random(_SHEET, 0, i), int(scale)) for i, scale in enumerate(scales)]
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

    def _train_crop(self, step: int, place: int, scale: int) -> tuple[RGBImage, int]:
        """An augmented crop, and the symmetry for its equivariance."""
        random = self._random(_TRAINING, step, place + 1)
        pixels = self._crop(random, scale)
        if self._settings.stain_jitter:
            pixels = jitter_stains(pixels, random.normal(1, self._settings.stain_jitter, 3))
        turn, symmetry = int(random.integers(SYMMETRIES)), int(random.integers(1, SYMMETRIES))
        turned = np.rot90(pixels.swapaxes(0, 1) if turn >= 4 else pixels, turn % 4)
        return np.ascontiguousarray(turned), symmetry

    def _crop(self, random: np.random.Generator, scale: int) -> RGBImage:
        """A crop, normalised if that is asked for."""
        pixels, source = self._sampler.read(scale, random)
        if self.reference is None:
            return pixels
        return match_look(pixels, self._looks[source], self.reference)

    def _measure(self, source: int) -> Look:
        """The look of a picture, from crops at the middle scale."""
        crops, random = self._sampler.sources[source], self._random(_LOOK, source, 0)
        pixels = np.stack([crops.read(self._sampler.scales[1], random) for _ in range(_LOOK_CROPS)])
        return measure_look(pixels, self._settings.normalisation, crops.slide.path)

    def _random(self, stream: int, number: int, place: int) -> np.random.Generator:
        return np.random.default_rng([self._settings.seed, stream, number, place])
