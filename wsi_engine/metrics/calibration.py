"""What may be fitted after training, on validation slides only: a temperature, and thresholds for class 1 of two."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from wsi_engine.errors import SettingsError
from wsi_engine.metrics.checks import Floats, Ints, check_scores
from wsi_engine.metrics.ranking import count_above

COLDEST, HOTTEST = 0.05, 20.0
"""Between these a temperature is sought: on slides that are all classified right the best one would be 0."""


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """Temperature T for which softmax(logits / T) has the highest likelihood (Guo et al., ICML 2017, section 4.2).

    The likelihood is concave in 1 / T, so the zero of its slope is the only optimum and is found to the last digits.

    Args:
        logits: float (N, C) of validation slides; logarithms of probabilities serve as well.
        labels: int (N,).

    Returns:
        Above 1 where the model is too sure; within 0.05–20, whose ends are taken where the optimum lies beyond. 1
        where logits of every slide are alike over the classes, so that no temperature matters.

    Raises:
        SettingsError: logits and labels do not fit each other, or a logit is not finite.
    """
    from scipy.optimize import brentq  # noqa: PLC0415 - slow to load, and only fitting needs it

    true, array = _check_logits(logits, labels)
    centred = array - array.max(axis=1, keepdims=True)
    if not centred.any():
        return 1.0
    chosen = centred[np.arange(len(true)), true].mean()

    def slope(inverse: float) -> float:
        """Of the mean loss, by 1 / T: expected minus true logit."""
        weights = np.exp(centred * inverse)
        return float(((weights * centred).sum(axis=1) / weights.sum(axis=1)).mean() - chosen)

    if slope(1 / HOTTEST) >= 0:
        return HOTTEST
    if slope(1 / COLDEST) <= 0:
        return COLDEST
    return 1 / float(brentq(slope, 1 / HOTTEST, 1 / COLDEST, xtol=1e-12))


def apply_temperature(logits: ArrayLike, temperature: float) -> Floats:
    """softmax(logits / temperature) over the last axis, float64; ``logits`` (N, C) or (C,).

    Raises:
        SettingsError: the temperature is not a positive number.
    """
    if not 0 < temperature < np.inf:
        raise SettingsError(f"a temperature must be a positive number, not {temperature}")
    array = np.asarray(logits, np.float64)
    weights = np.exp((array - array.max(axis=-1, keepdims=True)) / temperature)
    probabilities: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


def youden_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """Threshold of largest sensitivity + specificity − 1 (Youden, Cancer 1950); of equal ones the highest.

    It lies halfway between the lowest score called positive and the next lower one, which is likelier to hold on other
    slides than either. A slide is positive at score ≥ threshold: :func:`decide`.

    Args:
        labels: int (N,) of validation slides, 0 or 1.
        scores: float (N,) or (N, 2).

    Raises:
        SettingsError: labels and scores do not fit each other, or the labels hold one class only.
    """
    thresholds, hits, alarms = _count_binary(labels, scores)
    gains = hits * alarms[-1] - alarms * hits[-1]  # times positives and negatives: whole numbers, so that ties are ties
    return _between(thresholds, int(gains.argmax()))


def sensitivity_threshold(labels: ArrayLike, scores: ArrayLike, sensitivity: float = 0.95) -> float:
    """Highest threshold at which at least this share of the positives is called positive; see :func:`youden_threshold`.

    Raises:
        SettingsError: ``sensitivity`` is not above 0 and at most 1; labels and scores as in :func:`youden_threshold`.
    """
    if not 0 < sensitivity <= 1:
        raise SettingsError(f"the sensitivity asked for must be above 0 and at most 1, not {sensitivity}")
    thresholds, hits, _ = _count_binary(labels, scores)
    return _between(thresholds, int(np.flatnonzero(hits / hits[-1] >= sensitivity)[0]))


def decide(probabilities: ArrayLike, threshold: float | None = None) -> Ints:
    """The class to report for each slide, int64 (N,).

    Args:
        probabilities: float (N, C); or (N,), of class 1 of two.
        threshold: class 1 from this probability on, two classes only; None takes the most probable class, of equal
            ones the first.

    Raises:
        SettingsError: a threshold is given for more than two classes, or a probability is not finite.
    """
    array = np.asarray(probabilities, np.float64)
    if array.ndim == 2 and array.shape[1] != 2 and threshold is not None:
        raise SettingsError(f"a threshold decides between two classes, not {array.shape[1]}; leave it out")
    if not np.isfinite(array).all():
        raise SettingsError("the probabilities hold values that are not finite; predict those slides again")
    if array.ndim == 2 and threshold is None:
        highest: Ints = array.argmax(axis=1)
        return highest
    column = array if array.ndim == 1 else array[:, 1]
    called: Ints = (column > 0.5 if threshold is None else column >= threshold).astype(np.int64)
    return called


def _check_logits(logits: ArrayLike, labels: ArrayLike) -> tuple[Ints, Floats]:
    true, array = check_scores(labels, logits)
    if array.ndim == 1:
        raise SettingsError("logits must be of shape (N, classes) to fit a temperature; stack 0 and the logit for one")
    return true, array


def _count_binary(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Ints, Ints]:
    true, array = check_scores(labels, scores)
    if array.ndim == 2 and array.shape[1] != 2:
        raise SettingsError(f"a threshold is fitted for two classes, not {array.shape[1]}")
    if len(np.unique(true)) < 2:
        raise SettingsError(
            f"all {len(true)} validation slides are of class {true[0]}; a threshold needs slides of both classes"
        )
    return count_above(true == 1, array if array.ndim == 1 else array[:, 1])


def _between(thresholds: Floats, at: int) -> float:
    """Halfway from a threshold to the next lower one; itself where there is none, or nothing lies between."""
    here = float(thresholds[at])
    below = float(thresholds[min(at + 1, len(thresholds) - 1)])
    middle = below + (here - below) / 2
    return middle if below < middle < here else here
