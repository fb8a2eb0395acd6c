"""Whether probabilities mean what they say: calibration error, Brier score, likelihood, and the reliability diagram."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from wsi_engine.errors import SettingsError
from wsi_engine.metrics.checks import Floats, Ints, check_probabilities


@dataclass(frozen=True)
class ReliabilityBins:
    """What a reliability diagram shows; B bins of equal width over 0–1.

    Attributes:
        edges: float64 (B + 1,); a bin holds its upper edge, the first one 0 as well.
        counts: int64 (B,), slides a bin.
        confidence: float64 (B,), mean probability of the predicted class; NaN in empty bins.
        accuracy: float64 (B,), share of slides predicted right; NaN in empty bins.
    """

    edges: Floats
    counts: Ints
    confidence: Floats
    accuracy: Floats


def reliability_bins(labels: ArrayLike, probabilities: ArrayLike, bins: int = 15) -> ReliabilityBins:
    """Confidence and accuracy by bins of the predicted class's probability (Guo et al., ICML 2017, section 2).

    Args:
        labels: int (N,).
        probabilities: float (N, C); or (N,), of class 1 of two.
        bins: B.

    Raises:
        SettingsError: labels and probabilities do not fit each other, are no probabilities, or ``bins`` is below 1.
    """
    if bins < 1:
        raise SettingsError(f"a reliability diagram needs at least 1 bin, not {bins}")
    true, array = check_probabilities(labels, probabilities)
    sure = np.minimum(array.max(axis=1), 1.0)
    right = array.argmax(axis=1) == true
    edges = np.linspace(0, 1, bins + 1)
    at = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    counts = np.bincount(at, minlength=bins)
    filled = np.where(counts, counts, np.nan)
    confidence = np.bincount(at, weights=sure, minlength=bins) / filled
    return ReliabilityBins(edges, counts, confidence, np.bincount(at, weights=right, minlength=bins) / filled)


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by slides (Guo et al., ICML 2017).

    Arguments and errors are those of :func:`reliability_bins`. It is biased upwards on few slides: compare runs on the
    same slides only.
    """
    found = reliability_bins(labels, probabilities, bins)
    there = found.counts > 0
    gaps = np.abs(found.accuracy[there] - found.confidence[there])
    return float((gaps * found.counts[there]).sum() / found.counts.sum())


def brier_score(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean squared distance of the probabilities from the truth (Brier, Monthly Weather Review 1950); lower is better.

    Args:
        labels: int (N,).
        probabilities: float (N, C); or (N,), of class 1 of two.

    Returns:
        Two classes: mean of (p₁ − y)², within 0–1. More: the sum over all classes, within 0–2, as Brier wrote it.

    Raises:
        SettingsError: labels and probabilities do not fit each other, or are no probabilities.
    """
    true, array = check_probabilities(labels, probabilities)
    if array.shape[1] == 2:
        return float(((array[:, 1] - true) ** 2).mean())
    wanted = true[:, None] == np.arange(array.shape[1])  # (N, C)
    return float(((array - wanted) ** 2).sum(axis=1).mean())


def negative_log_likelihood(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean of −ln of the true class's probability, which is held at 2.2e-16 or more so that the mean stays finite.

    Arguments and errors are those of :func:`brier_score`.
    """
    true, array = check_probabilities(labels, probabilities)
    chosen = array[np.arange(len(true)), true]
    return float(-np.log(np.maximum(chosen, np.finfo(np.float64).eps)).mean())
