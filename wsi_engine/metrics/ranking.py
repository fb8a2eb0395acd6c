"""How well scores put the right slides first: ROC and precision–recall, areas and curves. Ties are exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_engine.errors import SettingsError
from wsi_engine.metrics.checks import Floats, Ints, check_scores


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Computed as the Mann–Whitney statistic in whole numbers (Hanley & McNeil, Radiology 1982), so that it is exact and
    does not depend on the order of rows.

    Args:
        labels: int (N,), class numbers from 0.
        scores: float (N,), higher for class 1; or (N, C), one column a class. Two columns: the second is used. More:
            the unweighted mean over one class against the rest (macro), over the classes that ``labels`` hold.

    Returns:
        Within 0–1; NaN where the labels hold one class only.

    Raises:
        SettingsError: labels and scores do not fit each other, or a score is not finite.
    """
    return _macro(labels, scores, _binary_auroc)


def auprc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the precision–recall curve as average precision: Σ (R_k − R_{k−1}) · P_k over distinct scores.

    No interpolation between points, which would be optimistic (Davis & Goadrich, ICML 2006). Arguments, macro mean and
    errors are those of :func:`auroc`; chance is the share of positives, not 0.5.

    Returns:
        Within 0–1; NaN where the labels hold one class only.
    """
    return _macro(labels, scores, _binary_auprc)


def roc_curve(labels: ArrayLike, scores: ArrayLike, positive: int = 1) -> tuple[Floats, Floats, Floats]:
    """Points of the ROC curve of one class against the rest, one for each distinct score.

    Args:
        labels: int (N,).
        scores: float (N,) or (N, C), of which the column ``positive`` is used.
        positive: the class whose slides count as positive.

    Returns:
        False-positive rates, true-positive rates and thresholds, float64 (K + 1,) each, from (0, 0) at +∞ to (1, 1);
        a slide is called positive at score ≥ threshold. A rate without slides to count is NaN.
    """
    true, column = _one_column(labels, scores, positive)
    thresholds, hits, alarms = count_above(true, column)
    return (
        _rate(np.concatenate([[0], alarms]), int((~true).sum())),
        _rate(np.concatenate([[0], hits]), int(true.sum())),
        np.concatenate([[np.inf], thresholds]),
    )


def precision_recall_curve(labels: ArrayLike, scores: ArrayLike, positive: int = 1) -> tuple[Floats, Floats, Floats]:
    """Points of the precision–recall curve of one class against the rest, one for each distinct score.

    Returns:
        Precisions, recalls and thresholds, float64 (K,) each, thresholds falling; recall is NaN without positives.
    """
    true, column = _one_column(labels, scores, positive)
    thresholds, hits, alarms = count_above(true, column)
    return hits / (hits + alarms), _rate(hits, int(true.sum())), thresholds


def _macro(labels: ArrayLike, scores: ArrayLike, measure: Callable[..., float]) -> float:
    true, array = check_scores(labels, scores)
    if array.ndim == 1 or array.shape[1] == 2:
        return measure(true == 1, array if array.ndim == 1 else array[:, 1])
    return float(np.mean([measure(true == c, array[:, c]) for c in np.unique(true)]))


def _one_column(labels: ArrayLike, scores: ArrayLike, positive: int) -> tuple[NDArray[np.bool_], Floats]:
    true, array = check_scores(labels, scores)
    classes = array.shape[1] if array.ndim == 2 else 2
    if not 0 <= positive < classes or (array.ndim == 1 and positive == 0):
        raise SettingsError(f"the scores have no column for class {positive}; give scores of shape (N, classes)")
    return true == positive, array if array.ndim == 1 else array[:, positive]


def count_above(true: NDArray[np.bool_], scores: Floats) -> tuple[Floats, Ints, Ints]:
    """Distinct scores, falling, and how many positives and negatives score at least as much: (K,) each."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    hits = np.cumsum(true[order], dtype=np.int64)[last]
    return ranked[last], hits, last + 1 - hits


def _binary_auroc(true: NDArray[np.bool_], scores: Floats) -> float:
    _, hits, alarms = count_above(true, scores)
    if not hits[-1] or not alarms[-1]:
        return float("nan")
    # Twice the number of pairs in the right order, ties counted once: whole numbers, hence exact.
    above = np.concatenate([[0], hits[:-1]])
    twice = int((np.diff(alarms, prepend=0) * (above + hits)).sum())
    return twice / (2 * int(hits[-1]) * int(alarms[-1]))


def _binary_auprc(true: NDArray[np.bool_], scores: Floats) -> float:
    _, hits, alarms = count_above(true, scores)
    if not hits[-1] or not alarms[-1]:
        return float("nan")
    gained = np.diff(hits, prepend=0)
    return float((gained * (hits / (hits + alarms))).sum() / hits[-1])


def _rate(counts: Ints, total: int) -> Floats:
    return counts / total if total else np.full(len(counts), np.nan)
