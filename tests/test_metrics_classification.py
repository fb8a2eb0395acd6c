"""Classification metrics against scikit-learn where it is there, against plain loops, and by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wsi_engine as we
from wsi_engine.errors import SettingsError

metrics = we.metrics

# Few distinct scores, so that ties are the rule.
BINARY = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def sklearn() -> Any:
    return pytest.importorskip("sklearn.metrics")


def cohort(seed: int, slides: int = 200, classes: int = 3, steps: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Labels that hold every class, and probabilities that know something of them; ``steps`` rounds them into ties."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, slides - classes)])
    logits = rng.normal(size=(slides, classes)) + 1.2 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if steps:
        probabilities = np.floor(probabilities * steps)
        probabilities[np.arange(slides), probabilities.argmax(axis=1)] += steps - probabilities.sum(axis=1)
        probabilities /= steps
    return labels, probabilities


@settings(max_examples=150, deadline=None, derandomize=True)
@given(BINARY)
def test_auroc_counts_pairs_exactly(rows: list[tuple[int, int]]) -> None:
    labels, scores = np.array(rows).T
    wins = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
    found = metrics.auroc(labels, scores / 7)
    if wins:
        assert found == sum(wins) / len(wins)
        assert metrics.auroc(1 - labels, scores / 7) == pytest.approx(1 - found, abs=1e-15)
    else:
        assert math.isnan(found)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(BINARY)
def test_auprc_sums_the_steps_of_the_curve(rows: list[tuple[int, int]]) -> None:
    labels, scores = np.array(rows).T
    total, area, recall = int(labels.sum()), 0.0, 0.0
    if 0 < total < len(labels):
        for cut in sorted(set(scores.tolist()), reverse=True):
            called = scores >= cut
            hits = int(labels[called].sum())
            area += (hits / total - recall) * hits / int(called.sum())
            recall = hits / total
        assert metrics.auprc(labels, scores) == pytest.approx(area, abs=1e-12)
    else:
        assert math.isnan(metrics.auprc(labels, scores))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(BINARY, st.randoms(use_true_random=False))
def test_ranking_does_not_depend_on_row_order_or_scale(rows: list[tuple[int, int]], random: Any) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    (one, scores), (two, moved) = np.array(rows).T, np.array(shuffled).T
    for metric in (metrics.auroc, metrics.auprc):
        assert np.array_equal(metric(one, scores), metric(two, np.exp(moved)), equal_nan=True)


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("seed", range(3))
def test_two_classes_equal_scikit_learn(sklearn: Any, seed: int, steps: int | None) -> None:
    labels, both = cohort(seed, classes=2, steps=steps)
    scores, called = both[:, 1], metrics.decide(both)
    pairs = [
        (metrics.auroc(labels, scores), sklearn.roc_auc_score(labels, scores)),
        (metrics.auprc(labels, scores), sklearn.average_precision_score(labels, scores)),
        (metrics.accuracy(labels, called), sklearn.accuracy_score(labels, called)),
        (metrics.balanced_accuracy(labels, called), sklearn.balanced_accuracy_score(labels, called)),
        (metrics.f1_macro(labels, called), sklearn.f1_score(labels, called, average="macro")),
        (metrics.cohen_kappa(labels, called), sklearn.cohen_kappa_score(labels, called)),
        (metrics.brier_score(labels, scores), sklearn.brier_score_loss(labels, scores)),
        (metrics.negative_log_likelihood(labels, both), sklearn.log_loss(labels, both)),
    ]
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs, abs=1e-12)
    for metric in (metrics.auroc, metrics.auprc, metrics.brier_score, metrics.expected_calibration_error):
        assert metric(labels, both) == pytest.approx(metric(labels, scores), abs=1e-12)


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("classes", [3, 5])
def test_many_classes_equal_scikit_learn(sklearn: Any, classes: int, steps: int | None) -> None:
    labels, scores = cohort(classes, classes=classes, steps=steps)
    called, one_hot = metrics.decide(scores), np.eye(classes)[labels]
    pairs = [
        (metrics.auroc(labels, scores), sklearn.roc_auc_score(labels, scores, multi_class="ovr", average="macro")),
        (metrics.auprc(labels, scores), sklearn.average_precision_score(one_hot, scores, average="macro")),
        (metrics.balanced_accuracy(labels, called), sklearn.balanced_accuracy_score(labels, called)),
        (metrics.f1_macro(labels, called), sklearn.f1_score(labels, called, average="macro")),
        (metrics.brier_score(labels, scores), ((scores - one_hot) ** 2).sum(axis=1).mean()),
        (metrics.negative_log_likelihood(labels, scores), sklearn.log_loss(labels, scores)),
    ]
    for weights in (None, "linear", "quadratic"):
        ours = metrics.cohen_kappa(labels, called, weights)
        pairs.append((ours, sklearn.cohen_kappa_score(labels, called, weights=weights, labels=range(classes))))
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs, abs=1e-12)
    assert np.array_equal(metrics.confusion_matrix(labels, called), sklearn.confusion_matrix(labels, called))


@pytest.mark.parametrize("steps", [None, 6])
def test_curves_equal_scikit_learn(sklearn: Any, steps: int | None) -> None:
    labels, scores = cohort(8, classes=2, steps=steps)
    alarms, hits, thresholds = metrics.roc_curve(labels, scores)
    for ours, theirs in zip(
        (alarms, hits, thresholds), sklearn.roc_curve(labels, scores[:, 1], drop_intermediate=False), strict=True
    ):
        assert np.allclose(ours, theirs, atol=1e-15)
    assert np.trapezoid(hits, alarms) == pytest.approx(metrics.auroc(labels, scores), abs=1e-12)
    precisions, recalls, cuts = metrics.precision_recall_curve(labels, scores)
    their_precisions, their_recalls, their_cuts = sklearn.precision_recall_curve(labels, scores[:, 1])
    # Theirs rises, and ends with a point that belongs to no threshold.
    assert np.allclose(precisions, their_precisions[-2::-1])
    assert np.allclose(recalls, their_recalls[-2::-1])
    assert np.array_equal(cuts, their_cuts[::-1])


def test_worked_example_of_decisions() -> None:
    labels, called = [0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 1, 0, 2, 2]
    assert metrics.confusion_matrix(labels, called).tolist() == [[2, 1, 1], [1, 1, 0], [0, 0, 2]]
    assert metrics.confusion_matrix(labels, called, 4).shape == (4, 4)
    assert metrics.accuracy(labels, called) == 5 / 8
    assert metrics.balanced_accuracy(labels, called) == pytest.approx((2 / 4 + 1 / 2 + 1) / 3, abs=1e-15)
    assert metrics.f1_macro(labels, called) == pytest.approx((4 / 7 + 2 / 4 + 4 / 5) / 3, abs=1e-15)
    by_chance = (4 * 3 + 2 * 2 + 2 * 3) / 64
    assert metrics.cohen_kappa(labels, called) == pytest.approx((5 / 8 - by_chance) / (1 - by_chance), abs=1e-15)


def test_weighted_kappa_measures_grades() -> None:
    near, far = [0, 1, 2, 3], [0, 1, 2, 0]
    labels = [0, 1, 2, 2]
    assert metrics.cohen_kappa(labels, near, "quadratic") > metrics.cohen_kappa(labels, far, "quadratic")
    # Grades 0 and 3 alone: the distance is the same for every confusion, and weights do not matter.
    ends, called = [0, 0, 3, 3, 3], [0, 3, 3, 3, 0]
    plain = metrics.cohen_kappa(ends, called)
    assert metrics.cohen_kappa(ends, called, "linear") == pytest.approx(plain, abs=1e-15)
    assert metrics.cohen_kappa(ends, called, "quadratic") == pytest.approx(plain, abs=1e-15)
    assert metrics.cohen_kappa([0, 1, 2], [0, 1, 2], "quadratic") == 1
    assert math.isnan(metrics.cohen_kappa([1, 1], [1, 1]))


def test_worked_example_of_calibration() -> None:
    labels = np.array([1, 1, 0, 1, 0, 0])
    sure = np.array([0.9, 0.9, 0.9, 0.6, 0.4, 0.5])
    # Bins of width 0.5: (0, 0.5] holds the tie at 0.5, called class 0, right; (0.5, 1] the rest.
    found = metrics.reliability_bins(labels, sure, bins=2)
    assert found.counts.tolist() == [1, 5]
    assert found.confidence.tolist() == pytest.approx([0.5, (0.9 * 3 + 0.6 * 2) / 5])
    assert found.accuracy.tolist() == [1, 4 / 5]
    expected = abs(1 - 0.5) / 6 + abs(4 - (0.9 * 3 + 0.6 * 2)) / 6
    assert metrics.expected_calibration_error(labels, sure, bins=2) == pytest.approx(expected, abs=1e-15)
    squares = [0.01, 0.01, 0.81, 0.16, 0.16, 0.25]
    assert metrics.brier_score(labels, sure) == pytest.approx(sum(squares) / 6, abs=1e-15)
    empty = metrics.reliability_bins([1, 1], [1.0, 1.0], bins=4)
    assert empty.counts.tolist() == [0, 0, 0, 2]
    assert np.isnan(empty.accuracy[:3]).all()
    assert metrics.expected_calibration_error([1, 0], [1.0, 0.0]) == 0


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_error_equals_a_plain_loop(bins: int) -> None:
    labels, probabilities = cohort(3, classes=4, steps=20)
    total = 0.0
    for k in range(bins):
        low, high = np.linspace(0, 1, bins + 1)[k : k + 2]
        rows = [(p.max(), p.argmax() == y) for y, p in zip(labels, probabilities, strict=True) if low < p.max() <= high]
        if rows:
            total += abs(sum(c for c, _ in rows) - sum(int(r) for _, r in rows)) / len(labels)
    assert metrics.expected_calibration_error(labels, probabilities, bins) == pytest.approx(total, abs=1e-12)


def test_a_certain_and_wrong_prediction_costs_much_but_not_infinitely() -> None:
    assert metrics.negative_log_likelihood([1], [[1.0, 0.0]]) == pytest.approx(-math.log(np.finfo(float).eps))


def test_classes_that_labels_lack_are_left_out_of_the_macro_mean() -> None:
    labels, scores = cohort(4, classes=3)
    kept = labels != 2
    each = [metrics.auroc((labels[kept] == c).astype(int), scores[kept, c]) for c in (0, 1)]
    assert metrics.auroc(labels[kept], scores[kept]) == pytest.approx(np.mean(each), abs=1e-15)
    assert math.isnan(metrics.auroc([1, 1], [[0.2, 0.5, 0.3], [0.1, 0.8, 0.1]]))


def test_the_measures_of_a_report_by_name() -> None:
    labels, scores = cohort(6, classes=2)
    found = {name: measure(labels, scores) for name, measure in metrics.classification_measures().items()}
    assert found["auroc"] == metrics.auroc(labels, scores)
    assert found["f1_macro"] == metrics.f1_macro(labels, scores.argmax(axis=1))
    assert all(math.isfinite(value) for value in found.values())
    strict = metrics.classification_measures(threshold=0.99)["accuracy"](labels, scores)
    assert strict == metrics.accuracy(labels, (scores[:, 1] >= 0.99).astype(int)) != found["accuracy"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auroc([0, 1, 1], [0.1, 0.2]), r"scores of shape \(2,\) do not fit 3 labels"),
        (lambda: metrics.auroc([], []), "labels are empty"),
        (lambda: metrics.auroc([0, -1], [0.1, 0.2]), "labels hold the class -1"),
        (lambda: metrics.auroc([0.0, 1.0], [0.1, 0.2]), "labels must be class numbers.*float64"),
        (lambda: metrics.auroc([0, 1], [0.1, math.nan]), "scores of row 1 are not finite"),
        (lambda: metrics.auroc([0, 2], [0.1, 0.4]), "the label 2 has no column among the scores of 2 classes"),
        (lambda: metrics.roc_curve([0, 1], [0.1, 0.4], positive=2), "no column for class 2"),
        (lambda: metrics.brier_score([0, 1], [0.1, 1.4]), "within 0–1.*softmax"),
        (lambda: metrics.brier_score([0, 1], [[0.1, 0.4], [0.5, 0.5]]), "row 0 sum to 0.5"),
        (lambda: metrics.reliability_bins([0, 1], [0.1, 0.4], bins=0), "at least 1 bin"),
        (lambda: metrics.confusion_matrix([0, 1], [0]), "2 labels do not fit 1 predicted"),
        (lambda: metrics.confusion_matrix([0, 3], [0, 1], 3), "the class 3 is not among 3 classes"),
        (lambda: metrics.cohen_kappa([0, 1], [0, 1], "cubic"), "not 'cubic'"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        call()
