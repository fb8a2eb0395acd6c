"""What is random in training: which slides, which tiles, and the streams all of it is drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.training.settings import TrainSettings


class Stream(IntEnum):
    """What random numbers are drawn for; each has a stream of its own in every epoch of every fold."""

    WEIGHTS = 0
    SLIDES = 1
    TILES = 2
    DROPOUT = 3
    TORCH = 4
    PROMPTS = 5


def open_stream(seed: int, fold: int, epoch: int, stream: Stream) -> np.random.Generator:
    """Random numbers that depend on these four alone, so that an epoch is the same after a kill."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, fold, epoch, stream])))


def torch_seed(seed: int, fold: int, epoch: int, stream: Stream) -> int:
    """A seed for torch's generators, from the same four."""
    return int(open_stream(seed, fold, epoch, stream).integers(2**63))


def draw_slides(
    places: Sequence[int], labels: NDArray[np.int64], balanced: bool, generator: np.random.Generator
) -> list[int]:
    """The slides of one epoch in their order, as many as there are.

    Args:
        places: the slides to train on.
        labels: int64, the class of every slide; ``places`` index it.
        balanced: with replacement, every class that occurs equally likely; else each slide once.
        generator: where randomness comes from.
    """
    chosen = np.asarray(places, np.int64)
    if not balanced:
        return [int(place) for place in generator.permutation(chosen)]
    own = labels[chosen]
    weights = 1.0 / np.bincount(own)[own]
    return [int(place) for place in generator.choice(chosen, len(chosen), p=weights / weights.sum())]


def draw_tiles(features: NDArray[Any], settings: TrainSettings, generator: np.random.Generator) -> NDArray[Any]:
    """The tiles (n, D) of a bag (N, D) that one step sees, in their order; at least one. See :func:`draw_rows`."""
    rows = draw_rows(len(features), settings, generator)
    return features if rows is None else features[rows]


def draw_rows(there: int, settings: TrainSettings, generator: np.random.Generator) -> NDArray[np.int64] | None:
    """Which of so many tiles one step sees: int64 (n,), ascending, at least one; None for all.

    ``tile_dropout`` leaves out its share, then ``max_tiles`` limits what remains.
    """
    keep = max(1, math.floor(there * (1 - settings.tile_dropout) + 0.5))
    if settings.max_tiles is not None:
        keep = min(keep, settings.max_tiles)
    if keep >= there:
        return None
    return np.sort(generator.choice(there, keep, replace=False, shuffle=False))
