"""What a model says of one slide, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.metrics.calibration import apply_temperature


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one slide. C classes, F folds, N tiles, K attention maps.

    Attributes:
        classes: names of the C classes.
        probabilities: float64 (C,), mean over folds after calibration; sums to 1.
        fold_probabilities: float64 (F, C), calibrated.
        entropy: of ``probabilities`` over ln C: 0 certain, 1 no idea.
        disagreement: part of the entropy that is due to folds contradicting each other, same unit; 0 for one fold.
        attention: float32 (N, K), softmax weights averaged over folds; each column sums to 1. K is 1, or C with one
            map per class.
        grid_digest: of the tiles that the rows belong to; empty where it was not told.
        model_digest: of the model, see :attr:`Ensemble.digest`.
    """

    classes: tuple[str, ...]
    probabilities: NDArray[np.float64]
    fold_probabilities: NDArray[np.float64] = field(repr=False)
    entropy: float
    disagreement: float
    attention: NDArray[np.float32] = field(repr=False)
    grid_digest: str
    model_digest: str

    @property
    def predicted(self) -> int:
        """The most probable class by its number; of equal ones the first."""
        return int(self.probabilities.argmax())

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[self.predicted]

    @property
    def map_shown(self) -> int:
        """The column of ``attention`` to look at: the predicted class's map, or the only one."""
        return self.predicted if self.attention.shape[1] == len(self.classes) > 1 else 0


def calibrate(probabilities: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """softmax(log p / T): float (C,) of a head to float64 (C,) that sums to 1.

    DSMIL's sigmoids are divided by their sum first; a single one is taken for class 1 of two.
    """
    values = np.asarray(probabilities, np.float64)
    if values.shape == (1,):
        values = np.array([1 - values[0], values[0]])
    values = np.maximum(values, np.finfo(np.float32).tiny)
    return apply_temperature(np.log(values / values.sum()), temperature)


def measure_entropy(probabilities: NDArray[np.float64]) -> float:
    """−Σ p ln p / ln C: (C,) to a number within 0–1."""
    positive = probabilities[probabilities > 0]
    entropy = float(-(positive * np.log(positive)).sum() / np.log(len(probabilities)))
    return min(1.0, max(0.0, entropy))
