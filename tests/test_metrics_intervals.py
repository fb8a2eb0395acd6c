"""The bootstrap over patients by its statistics, temperatures and thresholds against a search of all values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wsi_engine as we
from wsi_engine.errors import SettingsError
from wsi_engine.metrics import BootstrapSettings

metrics = we.metrics


def mean_score(_labels: np.ndarray, scores: np.ndarray) -> float:
    return float(scores.mean())


def cohort(seed: int, slides: int = 120, gain: float = 1.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores of class 1 and patients of one to three slides each."""
    rng = np.random.default_rng(seed)
    patients = np.sort(rng.integers(0, slides // 2, slides))
    labels = patients % 2
    scores = 1 / (1 + np.exp(-(rng.normal(size=slides) + gain * (labels - 0.5))))
    return labels, scores, patients


def test_an_interval_holds_the_figure_and_is_the_same_again() -> None:
    labels, scores, patients = cohort(1)
    found = metrics.patient_bootstrap(metrics.classification_measures(), labels, scores, patients)
    again = metrics.patient_bootstrap(metrics.classification_measures(), labels, scores, patients)
    other = metrics.patient_bootstrap({"auroc": metrics.auroc}, labels, scores, patients, BootstrapSettings(seed=1))
    assert found == again
    assert found["auroc"].value == other["auroc"].value == metrics.auroc(labels, scores)
    assert found["auroc"].low != other["auroc"].low
    for name in ("auroc", "auprc", "balanced_accuracy", "kappa", "brier", "nll"):
        assert found[name].low < found[name].value < found[name].high, name
        assert (found[name].resamples, found[name].skipped, found[name].level) == (1000, 0, 0.95)


def test_measures_share_resamples_and_do_not_disturb_each_other() -> None:
    labels, scores, patients = cohort(2)
    alone = metrics.patient_bootstrap({"auroc": metrics.auroc}, labels, scores, patients)
    both = metrics.patient_bootstrap({"brier": metrics.brier_score, "auroc": metrics.auroc}, labels, scores, patients)
    assert alone["auroc"] == both["auroc"]


def test_copies_of_slides_make_no_interval_narrower() -> None:
    """Five equal slides a patient tell no more than one: drawn by patient, the interval stays the same."""
    rng = np.random.default_rng(0)
    labels, scores = np.arange(60) % 2, rng.random(60)
    copied = [np.repeat(values, 5) for values in (labels, scores, np.arange(60))]
    once = metrics.patient_bootstrap({"mean": mean_score}, labels, scores, np.arange(60))["mean"]
    five = metrics.patient_bootstrap({"mean": mean_score}, *copied)["mean"]
    naive = metrics.patient_bootstrap({"mean": mean_score}, copied[0], copied[1], np.arange(300))["mean"]
    assert (five.low, five.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert naive.high - naive.low < 0.6 * (five.high - five.low)


def test_the_interval_of_a_mean_is_the_one_of_theory() -> None:
    scores = np.random.default_rng(3).random(400)
    found = metrics.patient_bootstrap({"mean": mean_score}, np.arange(400) % 2, scores, np.arange(400))["mean"]
    half = 1.96 * scores.std() / math.sqrt(400)
    assert found.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(60):
        scores = rng.random(30).repeat(2)
        found = metrics.patient_bootstrap({"mean": mean_score}, np.arange(60) % 2, scores, np.arange(60) // 2)
        hits += found["mean"].low <= 0.5 <= found["mean"].high
    assert 50 <= hits <= 60


def test_names_of_patients_and_their_order_do_not_matter_to_the_grouping() -> None:
    labels, scores, patients = cohort(4)
    names = np.array([f"TCGA-{number:04d}" for number in patients])
    numbers = metrics.patient_bootstrap({"auroc": metrics.auroc}, labels, scores, patients)
    assert metrics.patient_bootstrap({"auroc": metrics.auroc}, labels, scores, names) == numbers


def test_resamples_without_a_class_are_skipped_counted_and_replaced() -> None:
    labels, scores = np.array([0, 0, 0, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4, 0.35])
    seen = []

    def watch(true: np.ndarray, _scores: np.ndarray) -> float:
        seen.append(len(np.unique(true)))
        return float(true.mean())

    found = metrics.patient_bootstrap({"watch": watch}, labels, scores, np.arange(5))["watch"]
    assert found.resamples == 1000
    assert set(seen) == {2}
    # The one positive is missed with chance 0.8^5, and everything else being negative, all four with 0.2^5.
    missed = 0.8**5 + 0.2**5
    assert found.skipped / (1000 + found.skipped) == pytest.approx(missed, abs=0.04)


def test_a_cohort_of_one_class_gives_what_can_be_given() -> None:
    names = {"auroc": metrics.auroc, "brier": metrics.brier_score}
    found = metrics.patient_bootstrap(names, [1, 1, 1], [0.2, 0.6, 0.9], ["a", "b", "c"])
    assert math.isnan(found["auroc"].value)
    assert math.isnan(found["auroc"].low)
    assert (found["auroc"].resamples, found["auroc"].skipped) == (0, 1000)
    assert found["brier"].low <= found["brier"].value <= found["brier"].high


def test_hopeless_resampling_ends() -> None:
    # One patient a class and 12 classes: all twelve are drawn once in about 18,600 times.
    labels, scores = np.arange(12), np.eye(12)
    found = metrics.patient_bootstrap({"auroc": metrics.auroc}, labels, scores, labels)["auroc"]
    assert found.value == 1
    assert found.resamples + found.skipped == 10_000
    assert found.resamples < 20


def test_the_difference_of_a_run_to_itself_is_nothing() -> None:
    labels, scores, patients = cohort(6)
    found = metrics.paired_bootstrap({"auroc": metrics.auroc}, labels, scores, scores, patients)["auroc"]
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_a_better_run_is_told_from_a_worse_one_on_the_same_patients() -> None:
    labels, worse, patients = cohort(7, gain=1.0)
    better = np.clip(worse + 0.15 * (labels - 0.5), 0, 1)
    one = metrics.patient_bootstrap({"auroc": metrics.auroc}, labels, worse, patients)["auroc"]
    two = metrics.patient_bootstrap({"auroc": metrics.auroc}, labels, better, patients)["auroc"]
    found = metrics.paired_bootstrap({"auroc": metrics.auroc}, labels, worse, better, patients)["auroc"]
    back = metrics.paired_bootstrap({"auroc": metrics.auroc}, labels, better, worse, patients)["auroc"]
    assert one.high > two.low  # apart, the two intervals overlap
    assert 0 < found.low < found.value < found.high
    assert (found.first, found.second) == (one.value, two.value)
    assert found.p_value == pytest.approx(2 / 1001)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low), abs=1e-12)
    assert back.p_value == found.p_value


def test_two_runs_of_no_difference_are_seldom_told_apart() -> None:
    rng, small = np.random.default_rng(8), 0
    for _ in range(40):
        labels, patients = np.arange(40) % 2, np.arange(40)
        first, second = rng.random(40), rng.random(40)
        found = metrics.paired_bootstrap({"mean": mean_score}, labels, first, second, patients)["mean"]
        small += found.p_value < 0.05
    assert small <= 6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0.3, 4))
def test_the_temperature_has_the_least_loss(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 80)
    logits = scale * (rng.normal(size=(80, 3)) + np.eye(3)[labels])
    temperature = metrics.fit_temperature(logits, labels)

    def loss(at: float) -> float:
        return metrics.negative_log_likelihood(labels, metrics.apply_temperature(logits, at))

    best = loss(temperature)
    assert all(best <= loss(at) + 1e-9 for at in np.geomspace(0.05, 20, 41))
    assert best <= min(loss(temperature * 1.001), loss(temperature / 1.001)) + 1e-12


def test_a_temperature_undoes_an_exaggeration() -> None:
    rng = np.random.default_rng(9)
    logits = rng.normal(size=(4000, 3)) * 1.5
    honest = metrics.apply_temperature(logits, 1.0)
    labels = (rng.random(4000)[:, None] > honest.cumsum(axis=1)).sum(axis=1)
    assert metrics.fit_temperature(logits * 3, labels) == pytest.approx(3, rel=0.08)
    from_logits, from_logarithms = (metrics.fit_temperature(one, labels) for one in (logits, np.log(honest)))
    assert from_logarithms == pytest.approx(from_logits, abs=1e-6)
    fitted = metrics.apply_temperature(logits * 3, metrics.fit_temperature(logits * 3, labels))
    before = metrics.expected_calibration_error(labels, metrics.apply_temperature(logits * 3, 1))
    assert metrics.expected_calibration_error(labels, fitted) < before / 3


def test_temperatures_at_the_ends() -> None:
    right, wrong = np.array([[5.0, 0.0], [0.0, 5.0]]), np.array([[0.0, 5.0], [5.0, 0.0]])
    assert metrics.fit_temperature(right, [0, 1]) == pytest.approx(0.05)
    assert metrics.fit_temperature(wrong, [0, 1]) == 20
    assert metrics.fit_temperature(np.ones((3, 2)), [0, 1, 0]) == 1
    assert metrics.apply_temperature([1e4, 0.0], 0.05).tolist() == [1, 0]
    assert metrics.apply_temperature(np.zeros((2, 4)), 3).tolist() == [[0.25] * 4] * 2


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=2, max_size=30))
def test_no_threshold_is_better_than_the_fitted_one(rows: list[tuple[int, int]]) -> None:
    labels, scores = np.array(rows).T
    if labels.min() == labels.max():
        return
    scores = scores / 9

    def rates(threshold: float) -> tuple[float, float]:
        called = metrics.decide(scores, threshold) == 1
        return called[labels == 1].mean(), called[labels == 0].mean()

    def gain(threshold: float) -> float:
        hit, alarm = rates(threshold)
        return hit - alarm

    fitted = metrics.youden_threshold(labels, scores)
    assert gain(fitted) >= max(gain(cut) for cut in scores) - 1e-12
    for wanted in (0.5, 0.9, 1.0):
        cut = metrics.sensitivity_threshold(labels, scores, wanted)
        assert rates(cut)[0] >= wanted
        higher = scores[scores > cut]
        above = [value for value in np.unique(higher) if rates(value)[0] != rates(cut)[0]]
        assert all(rates(value)[0] < wanted for value in above)


def test_a_threshold_lies_between_the_classes() -> None:
    labels, scores = [0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]
    assert metrics.youden_threshold(labels, scores) == pytest.approx(0.4)
    assert metrics.sensitivity_threshold(labels, scores, 0.5) == pytest.approx(0.75)
    neighbours = [0.5, np.nextafter(0.5, 1)]
    assert metrics.decide(neighbours, metrics.youden_threshold([0, 1], neighbours)).tolist() == [0, 1]


def test_decisions() -> None:
    both = [[0.5, 0.5], [0.3, 0.7], [0.8, 0.2]]
    assert metrics.decide(both).tolist() == [0, 1, 0]
    assert metrics.decide([row[1] for row in both]).tolist() == [0, 1, 0]
    assert metrics.decide(both, 0.2).tolist() == [1, 1, 1]
    assert metrics.decide([[0.2, 0.3, 0.5]]).tolist() == [2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BootstrapSettings(resamples=999), "at least 1000 resamples, not 999"),
        (lambda: BootstrapSettings(level=1), "level of an interval"),
        (lambda: BootstrapSettings(seed=-1), "seed of a bootstrap"),
        (lambda: metrics.patient_bootstrap({}, [0, 1], [0.1, 0.2], ["a"]), r"patients of shape \(1,\) do not fit 2"),
        (lambda: metrics.paired_bootstrap({}, [0, 1], [0.1, 0.2], [0.1], ["a", "b"]), "do not fit 2 labels"),
        (lambda: metrics.fit_temperature([0.2, 0.4], [0, 1]), "logits must be of shape"),
        (lambda: metrics.fit_temperature([[0.2, math.inf]], [0]), "row 0 are not finite"),
        (lambda: metrics.apply_temperature([0.2, 0.4], 0), "temperature must be a positive number"),
        (lambda: metrics.youden_threshold([1, 1], [0.2, 0.4]), "all 2 validation slides are of class 1"),
        (lambda: metrics.youden_threshold([1, 0], np.full((2, 3), 1 / 3)), "fitted for two classes, not 3"),
        (lambda: metrics.sensitivity_threshold([1, 0], [0.2, 0.4], 0), "sensitivity asked for"),
        (lambda: metrics.decide([[0.2, 0.3, 0.5]], 0.5), "decides between two classes, not 3"),
        (lambda: metrics.decide([0.2, math.nan]), "not finite"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        call()
