"""Two runs on the same slides: is one better, or was it luck?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from wsi_engine.cohorts.findings import count, list_some
from wsi_engine.cohorts.roster import RosterSource
from wsi_engine.errors import InputError
from wsi_engine.evaluation.cases import Cases, Ints, gather_cases
from wsi_engine.evaluation.columns import list_measures, stack_columns
from wsi_engine.evaluation.figures import warn_of_figures, warn_of_patients
from wsi_engine.metrics import BootstrapSettings, Difference, decide, paired_bootstrap


@dataclass(frozen=True, eq=False)
class Comparison:
    """The second run against the first, on the slides that both predict.

    Attributes:
        first, second: the runs or tables.
        classes: in the first run's order.
        slides, patients: how many both hold.
        only_first, only_second: slides with a known class that one alone holds; they are left out.
        settings: how patients were resampled.
        differences: by name, the second's figure minus the first's.
        warnings: what a reader must know before believing the figures.
    """

    first: str
    second: str
    classes: tuple[str, ...]
    slides: int
    patients: int
    only_first: int
    only_second: int
    settings: BootstrapSettings
    differences: dict[str, Difference]
    warnings: tuple[str, ...]


def compare_runs(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    truth: RosterSource | None = None,
    label: str | None = None,
) -> Comparison:
    """Compare two runs or tables of predictions by a paired bootstrap over the patients of the slides both hold.

    A slide that a run held out several times counts once, with the mean of its probabilities.

    Args:
        first: as :func:`~wsi_engine.evaluation.evaluate_run` takes it.
        second: the same.
        resamples: how many resamples of patients, at least 1,000.
        seed: same seed, same intervals.
        truth: cohort with the true classes, for both.
        label: its column; that of each run where not given.

    Raises:
        InputError: they differ in classes or in a slide's class, or share fewer than two patients; else as
            :func:`~wsi_engine.evaluation.evaluate_run`.
        ModelError: a run or one of its heads cannot be read.
        SettingsError: too few resamples, or a negative seed.
    """
    settings = BootstrapSettings(resamples, seed)
    return compare_cases(gather_cases(first, truth, label), gather_cases(second, truth, label), settings)


def compare_cases(first: Cases, second: Cases, settings: BootstrapSettings) -> Comparison:
    """Compare slides that are at hand; see :func:`compare_runs`."""
    notes: list[str] = []
    one, two = _merge_repeats(first, notes), _reorder_classes(_merge_repeats(second, notes), first)
    places = {slide: row for row, slide in enumerate(two.slide_ids)}
    rows = [row for row, slide in enumerate(one.slide_ids) if slide in places]
    slides = len(rows)
    lonely = len(one) - slides, len(two) - slides
    one, two = _select(one, rows), _select(two, [places[one.slide_ids[row]] for row in rows])
    _check_pairs(one, two)
    if one.patients != two.patients:
        notes.append(f"the two name patients differently: those of {one.source} were resampled")
    both = list_measures(one).keys() & list_measures(two).keys()
    shown = {name for name in both if not name.endswith("_before")}
    measures = {name: measure for name, measure in list_measures(one).items() if name in shown}
    found = paired_bootstrap(measures, one.labels, stack_columns(one), stack_columns(two), one.patients, settings)
    for number, cases in zip(lonely, (one, two), strict=True):
        if number:
            notes.append(f"left out: {count(number, 'slide')} that only {cases.source} holds")
    return Comparison(
        one.source,
        two.source,
        one.classes,
        slides,
        len(set(one.patients)),
        *lonely,
        settings,
        found,
        (*notes, *warn_of_patients(one), *warn_of_figures(dict(found), settings)),
    )


def _merge_repeats(cases: Cases, notes: list[str]) -> Cases:
    """Each slide once: means of probabilities and doubts, the class most folds decided on."""
    names, first, at = np.unique(np.array(cases.slide_ids), return_index=True, return_inverse=True)
    if len(names) == len(cases):
        return cases
    notes.append(
        f"slides of {cases.source} were held out more than once: means of their probabilities are compared, which "
        "favours it over a run that held them out once"
    )
    times = np.bincount(at)
    votes = np.zeros((len(names), len(cases.classes)))
    np.add.at(votes, (at, cases.decided), 1)
    single = _select(cases, first)
    mean: dict[str, Any] = {
        name: np.stack([np.bincount(at, weights=column) / times for column in getattr(cases, name).T], axis=1)
        for name in ("raw", "probabilities")
    }
    doubts: dict[str, Any] = {
        name: np.bincount(at, weights=getattr(cases, name)) / times
        for name in ("entropy", "disagreement")
        if getattr(cases, name) is not None
    }
    decided = votes.argmax(axis=1) if cases.thresholds_known else decide(mean["probabilities"])
    return replace(single, **mean, **doubts, decided=decided)


def _reorder_classes(cases: Cases, model: Cases) -> Cases:
    """The same classes in the order of another run's."""
    if set(cases.classes) != set(model.classes):
        raise InputError(
            f"{model.source} tells {', '.join(model.classes)} apart and {cases.source} {', '.join(cases.classes)}: "
            "only runs of the same classes can be compared"
        )
    if cases.classes == model.classes:
        return cases
    order = [cases.classes.index(name) for name in model.classes]
    numbers = np.argsort(order)  # of a class in the new order, by its old number
    return replace(
        cases,
        classes=model.classes,
        labels=numbers[cases.labels],
        decided=numbers[cases.decided],
        raw=cases.raw[:, order],
        probabilities=cases.probabilities[:, order],
    )


def _select(cases: Cases, rows: Sequence[int] | Ints) -> Cases:
    at = np.asarray(rows, np.int64)
    arrays: dict[str, Any] = {
        name: getattr(cases, name)[at]
        for name in ("labels", "folds", "raw", "probabilities", "decided", "entropy", "disagreement")
        if getattr(cases, name) is not None
    }
    slides = tuple(cases.slide_ids[row] for row in at)
    return replace(cases, slide_ids=slides, patients=tuple(cases.patients[row] for row in at), **arrays)


def _check_pairs(one: Cases, two: Cases) -> None:
    """Refuse pairs that cannot be compared."""
    differing = [one.slide_ids[row] for row in np.flatnonzero(one.labels != two.labels)]
    if differing:
        raise InputError(
            f"{one.source} and {two.source} differ in the class of {list_some(differing)}: evaluate "
            "both against one cohort with --truth"
        )
    if len(set(one.patients)) < 2:
        raise InputError(
            f"{one.source} and {two.source} share {count(len(one), 'slide')} of "
            f"{count(len(set(one.patients)), 'patient')}: a comparison needs two patients or more"
        )
