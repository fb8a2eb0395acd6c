"""How often decided classes are right: confusion, balanced accuracy, F1, kappa; and every measure of a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_engine.errors import SettingsError
from wsi_engine.metrics.calibration import decide
from wsi_engine.metrics.checks import Ints, check_classes
from wsi_engine.metrics.probabilities import brier_score, expected_calibration_error, negative_log_likelihood
from wsi_engine.metrics.ranking import auprc, auroc

Measure = Callable[[NDArray[Any], NDArray[Any]], float]
"""A metric of labels (N,) and scores (N,) or (N, C), as the bootstrap takes it."""


def confusion_matrix(labels: ArrayLike, predicted: ArrayLike, n_classes: int | None = None) -> Ints:
    """Slides by true class (rows) and predicted class (columns).

    Args:
        labels: int (N,), class numbers from 0.
        predicted: int (N,).
        n_classes: C; None takes the highest class that occurs, plus 1.

    Returns:
        int64 (C, C).

    Raises:
        SettingsError: the two differ in length, or a class is ``n_classes`` or higher.
    """
    true, called = check_classes(labels), check_classes(predicted, "predicted classes")
    if len(true) != len(called):
        raise SettingsError(f"{len(true)} labels do not fit {len(called)} predicted classes; give one for each slide")
    highest = int(max(true.max(), called.max()))
    count = highest + 1 if n_classes is None else n_classes
    if highest >= count:
        raise SettingsError(f"the class {highest} is not among {count} classes, which count from 0")
    table: Ints = np.bincount(true * count + called, minlength=count * count).reshape(count, count)
    return table


def accuracy(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Share of slides whose predicted class, int (N,), is the true one, int (N,)."""
    table = confusion_matrix(labels, predicted)
    return int(np.trace(table)) / int(table.sum())


def balanced_accuracy(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Mean recall over the classes that ``labels`` hold (Brodersen et al., ICPR 2010); int (N,) both."""
    table = confusion_matrix(labels, predicted)
    totals = table.sum(axis=1)
    there = totals > 0
    return float((np.diag(table)[there] / totals[there]).mean())


def f1_macro(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Unweighted mean of 2·TP / (2·TP + FP + FN) over the classes that labels or predictions hold; int (N,) both.

    The mean of the classes' F1, not the F1 of their mean precision and recall (Opitz & Burst, arXiv 1911.03347).
    """
    table = confusion_matrix(labels, predicted)
    below = table.sum(axis=0) + table.sum(axis=1)
    there = below > 0
    return float((2 * np.diag(table)[there] / below[there]).mean())


def cohen_kappa(labels: ArrayLike, predicted: ArrayLike, weights: str | None = None) -> float:
    """Agreement beyond chance, 1 − Σ w·observed / Σ w·expected (Cohen 1960; weighted: Cohen 1968).

    Args:
        labels: int (N,).
        predicted: int (N,).
        weights: None counts every confusion alike; "linear" and "quadratic" by the distance of the class numbers,
            which must then be grades in order.

    Returns:
        At most 1, 0 at chance; NaN where labels and predictions all are of one and the same class.

    Raises:
        SettingsError: the two differ in length, or ``weights`` is unknown.
    """
    if weights not in {None, "linear", "quadratic"}:
        raise SettingsError(f'the weights of kappa must be None, "linear" or "quadratic", not {weights!r}')
    table = confusion_matrix(labels, predicted)
    grade = np.arange(len(table))
    apart = np.abs(grade[:, None] - grade)  # (C, C)
    cost = {None: (apart > 0).astype(np.int64), "linear": apart, "quadratic": apart**2}[weights]
    # Times the number of slides, so that all sums are whole numbers.
    expected = int((cost * np.outer(table.sum(axis=1), table.sum(axis=0))).sum())
    observed = int((cost * table).sum()) * int(table.sum())
    return 1 - observed / expected if expected else float("nan")


def classification_measures(threshold: float | None = None) -> dict[str, Measure]:
    """The measures of an evaluation report by name, each called as ``measure(labels, probabilities)``.

    Args:
        threshold: of class 1 for the decided classes of a two-class task, fitted on validation; None takes the most
            probable class.
    """

    def decided(measure: Callable[[ArrayLike, ArrayLike], float]) -> Measure:
        return lambda labels, probabilities: measure(labels, decide(probabilities, threshold))

    return {
        "auroc": auroc,
        "auprc": auprc,
        "accuracy": decided(accuracy),
        "balanced_accuracy": decided(balanced_accuracy),
        "f1_macro": decided(f1_macro),
        "kappa": decided(cohen_kappa),
        "ece": expected_calibration_error,
        "brier": brier_score,
        "nll": negative_log_likelihood,
    }
