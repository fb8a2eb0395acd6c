"""How sure a figure is: intervals from a bootstrap over patients, for one run and for the difference of two.

Slides of one patient are alike, so patients are drawn, with replacement, and each brings all of their slides (cluster
bootstrap: Field & Welsh, JRSS B 2007). Intervals are percentiles (Efron & Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_engine.errors import SettingsError
from wsi_engine.metrics.checks import Floats, Ints, check_scores
from wsi_engine.metrics.classification import Measure

ATTEMPTS = 10
"""At most this many draws for each resample wanted, where most of them miss a class."""


@dataclass(frozen=True)
class BootstrapSettings:
    """How patients are resampled.

    Attributes:
        resamples: how many resamples with all classes are used; at least 1,000, fewer make the ends of an interval
            a matter of luck.
        seed: same seed, same intervals.
        level: share of resamples within the interval.
    """

    resamples: int = 1000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.resamples < 1000:
            raise SettingsError(f"a bootstrap needs at least 1000 resamples, not {self.resamples}")
        if self.seed < 0:
            raise SettingsError(f"the seed of a bootstrap must not be negative, not {self.seed}")
        if not 0 < self.level < 1:
            raise SettingsError(f"the level of an interval must be within 0–1, not {self.level}")


@dataclass(frozen=True)
class Interval:
    """A figure and the range in which it would mostly lie, had other patients been seen.

    Attributes:
        value: the measure on all slides.
        low, high: ends of the interval; NaN where no resample could be used.
        level: as asked for, 0.95.
        resamples: how many resamples the interval rests on.
        skipped: how many were drawn in vain: a class was missing, or the measure was undefined.
    """

    value: float
    low: float
    high: float
    level: float
    resamples: int
    skipped: int


@dataclass(frozen=True)
class Difference(Interval):
    """The second run's figure minus the first's, on the same patients.

    Attributes:
        first, second: the measure of each run on all slides.
        p_value: two-sided, that the difference is 0: twice the smaller share of resamples on either side of 0, the
            observed sample counted in; never below 2 / (resamples + 1). NaN where no resample could be used.
    """

    first: float
    second: float
    p_value: float


def patient_bootstrap(
    measures: Mapping[str, Measure],
    labels: ArrayLike,
    scores: ArrayLike,
    patients: ArrayLike,
    settings: BootstrapSettings | None = None,
) -> dict[str, Interval]:
    """Intervals of several measures, all from the same resamples of patients.

    Resamples that lack a class which ``labels`` hold are skipped, counted and drawn again.

    Args:
        measures: by name, each ``measure(labels, scores) -> float``, as
            :func:`~wsi_engine.metrics.classification.classification_measures` gives them, or your own.
        labels: int (N,), one a slide.
        scores: float (N,) or (N, C).
        patients: (N,), numbers or names; slides of one patient carry the same.
        settings: resamples, seed, level.

    Raises:
        SettingsError: the arrays do not fit each other.
    """
    settings = settings or BootstrapSettings()
    true, array, members = _check_arrays(labels, scores, patients)
    resamples = _Resamples(true, members, settings)
    drawn = np.array([[measure(true[rows], array[rows]) for measure in measures.values()] for rows in resamples])
    drawn = drawn.reshape(-1, max(1, len(measures)))
    found = {}
    for column, (name, measure) in enumerate(measures.items()):
        used, skipped = _finite(drawn[:, column], resamples.skipped)
        low, high = _percentiles(used, settings.level)
        found[name] = Interval(float(measure(true, array)), low, high, settings.level, len(used), skipped)
    return found


def paired_bootstrap(
    measures: Mapping[str, Measure],
    labels: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    patients: ArrayLike,
    settings: BootstrapSettings | None = None,
) -> dict[str, Difference]:
    """Intervals of the second run's measures minus the first's, both runs on the same resampled patients.

    Args:
        measures: by name, as for :func:`patient_bootstrap`.
        labels: int (N,), one a slide.
        first: float (N,) or (N, C), scores of the first run in the order of ``labels``.
        second: the same of the second run.
        patients: (N,), as for :func:`patient_bootstrap`.
        settings: resamples, seed, level.

    Raises:
        SettingsError: the arrays do not fit each other.
    """
    settings = settings or BootstrapSettings()
    true, one, members = _check_arrays(labels, first, patients)
    _, two = check_scores(true, second)
    resamples = _Resamples(true, members, settings)
    drawn = np.array(
        [[m(true[rows], two[rows]) - m(true[rows], one[rows]) for m in measures.values()] for rows in resamples]
    ).reshape(-1, max(1, len(measures)))
    found = {}
    for column, (name, measure) in enumerate(measures.items()):
        used, skipped = _finite(drawn[:, column], resamples.skipped)
        low, high = _percentiles(used, settings.level)
        a, b = float(measure(true, one)), float(measure(true, two))
        found[name] = Difference(b - a, low, high, settings.level, len(used), skipped, a, b, _p_value(used))
    return found


class _Resamples:
    """Rows of slides for each resample that holds every class; counts the others while it is gone through."""

    def __init__(self, true: Ints, members: list[Ints], settings: BootstrapSettings) -> None:
        self.skipped = 0
        self._members, self._settings = members, settings
        classes = np.unique(true)
        self._holds = np.array([np.isin(classes, true[rows]) for rows in members])  # (patients, classes)

    def __iter__(self) -> Iterator[Ints]:
        rng = np.random.default_rng(self._settings.seed)
        count, kept = len(self._members), 0
        for _ in range(ATTEMPTS * self._settings.resamples):
            drawn = rng.integers(0, count, count)
            if not self._holds[drawn].any(axis=0).all():
                self.skipped += 1
                continue
            yield np.concatenate([self._members[patient] for patient in drawn])
            kept += 1
            if kept == self._settings.resamples:
                return


def _check_arrays(labels: ArrayLike, scores: ArrayLike, patients: ArrayLike) -> tuple[Ints, Floats, list[Ints]]:
    """Labels, scores, and the rows of each patient's slides."""
    true, array = check_scores(labels, scores)
    names = np.asarray(patients)
    if names.shape != true.shape:
        raise SettingsError(f"patients of shape {names.shape} do not fit {len(true)} labels; name one for each slide")
    _, index = np.unique(names, return_inverse=True)
    order = np.argsort(index, kind="stable")
    return true, array, np.split(order, np.cumsum(np.bincount(index))[:-1])


def _finite(values: Floats, skipped: int) -> tuple[Floats, int]:
    used: Floats = values[np.isfinite(values)]
    return used, skipped + len(values) - len(used)


def _percentiles(values: Floats, level: float) -> tuple[float, float]:
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _p_value(differences: NDArray[np.float64]) -> float:
    if not len(differences):
        return float("nan")
    fewer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (len(differences) + 1))
