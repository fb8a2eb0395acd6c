"""Measures of a report over one array of columns, so that all of them rest on the same resamples of patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.evaluation.cases import Cases, Floats, Ints
from wsi_engine.metrics import (
    auroc,
    brier_score,
    classification_measures,
    expected_calibration_error,
    negative_log_likelihood,
)
from wsi_engine.metrics.classification import Measure

TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1_macro": "F1, mean over classes",
    "kappa": "Cohen's kappa",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ece": "calibration error (ECE)",
    "ece_before": "ECE before temperature",
    "brier": "Brier score",
    "brier_before": "Brier score before temperature",
    "nll": "negative log-likelihood",
    "nll_before": "negative log-likelihood before temperature",
    "entropy_auroc": "entropy tells errors (AUROC)",
    "disagreement_auroc": "disagreement tells errors (AUROC)",
}
"""Figures in the order of a report, and what people call them."""

_CALIBRATION = {"ece": expected_calibration_error, "brier": brier_score, "nll": negative_log_likelihood}


def stack_columns(cases: Cases) -> Floats:
    """float64 (N, 2·C + 3): calibrated and raw probabilities, the decided class, entropy, disagreement (0 if none)."""
    nothing = np.zeros(len(cases))
    doubts = [nothing if one is None else one for one in (cases.entropy, cases.disagreement)]
    return np.column_stack([cases.probabilities, cases.raw, cases.decided, *doubts])


def list_measures(cases: Cases) -> dict[str, Measure]:
    """Measures by name, in the order of :data:`TITLES`, over the columns of :func:`stack_columns`."""
    count = len(cases.classes)
    found = {name: _over(measure, slice(0, count)) for name, measure in classification_measures().items()}
    if any(one.temperature != 1 for one in cases.calibrations):
        found |= {f"{name}_before": _over(measure, slice(count, 2 * count)) for name, measure in _CALIBRATION.items()}
    if count == 2:
        decided = 2 * count
        found |= {"sensitivity": _recall(decided, 1), "specificity": _recall(decided, 0)}
    for place, (name, doubt) in enumerate((("entropy", cases.entropy), ("disagreement", cases.disagreement))):
        if doubt is not None:
            found[f"{name}_auroc"] = _error_auroc(count, 2 * count + 1 + place)
    return {name: found[name] for name in TITLES if name in found}


def list_class_measures(classes: Sequence[str]) -> dict[tuple[str, str], Measure]:
    """For each class against the rest: AUROC, sensitivity and precision of the most probable class."""
    count = len(classes)
    found: dict[tuple[str, str], Measure] = {}
    for number, name in enumerate(classes):
        found[name, "auroc"] = _one_auroc(number)
        found[name, "sensitivity"] = _share_right(count, number, of_predicted=False)
        found[name, "precision"] = _share_right(count, number, of_predicted=True)
    return found


def _over(measure: Callable[[NDArray[Any], NDArray[Any]], float], columns: slice) -> Measure:
    return lambda labels, stacked: measure(labels, stacked[:, columns])


def _recall(column: int, number: int) -> Measure:
    """Share of the slides of a class that were decided to be of it; NaN without one."""

    def measure(labels: Ints, stacked: Floats) -> float:
        own = stacked[labels == number, column]
        return float((own == number).mean()) if len(own) else float("nan")

    return measure


def _one_auroc(number: int) -> Measure:
    return lambda labels, stacked: auroc((labels == number).astype(np.int64), stacked[:, number])


def _share_right(count: int, number: int, *, of_predicted: bool) -> Measure:
    """Share of right predictions among the slides of a class, or among those predicted to be; NaN without one."""

    def measure(labels: Ints, stacked: Floats) -> float:
        predicted = stacked[:, :count].argmax(axis=1) == number
        there = labels == number
        total = int((predicted if of_predicted else there).sum())
        return int((predicted & there).sum()) / total if total else float("nan")

    return measure


def _error_auroc(count: int, column: int) -> Measure:
    """The chance that a slide predicted wrong has more doubt than one predicted right; NaN where all are alike."""

    def measure(labels: Ints, stacked: Floats) -> float:
        wrong = stacked[:, :count].argmax(axis=1) != labels
        return auroc(wrong.astype(np.int64), stacked[:, column])

    return measure
