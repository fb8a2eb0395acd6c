"""Figures of one run: how good its predictions of held-out slides are, each with an interval over patients."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from wsi_engine.cohorts.findings import count
from wsi_engine.cohorts.roster import RosterSource
from wsi_engine.evaluation.cases import Cases, gather_cases
from wsi_engine.evaluation.columns import TITLES, list_class_measures, list_measures, stack_columns
from wsi_engine.metrics import (
    BootstrapSettings,
    Interval,
    ReliabilityBins,
    auroc,
    confusion_matrix,
    decide,
    patient_bootstrap,
    reliability_bins,
)
from wsi_engine.metrics.checks import Ints
from wsi_engine.metrics.classification import Measure

FEW_PATIENTS, FEW_OF_CLASS = 30, 10
"""Below so many patients, in all or of one class, percentile intervals are too narrow to be trusted."""

ENOUGH = 0.95
"""A figure that could be computed on a smaller share of the resamples is warned of."""

BINS = 10
"""Bins of the reliability diagram; the calibration error has its own 15."""


@dataclass(frozen=True)
class FoldFigures:
    """One fold: how many slides and patients it held out, its AUROC on them (NaN where undefined), what was fitted."""

    fold: int
    slides: int
    patients: int
    auroc: float
    temperature: float
    threshold: float | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good predictions are.

    Attributes:
        cases: the slides and what was said of them.
        settings: how patients were resampled.
        figures: by name, in the order of a report; classes by the most probable one, but sensitivity and specificity
            (of two classes) by the thresholds that validation slides gave. ``…_before``: without temperature.
        by_class: for more than two classes, of each against the rest: auroc, sensitivity, precision.
        confusion: int64 (C, C), slides by true class (rows) and most probable class (columns).
        confusion_at_threshold: the same by thresholds; None where there are none.
        reliability: the reliability diagram.
        reliability_before: the same before temperature; None where none was fitted.
        folds: figures of each fold of a run; empty for an ensemble.
        warnings: what a reader must know before believing the figures.
    """

    cases: Cases
    settings: BootstrapSettings
    figures: dict[str, Interval]
    by_class: dict[str, dict[str, Interval]]
    confusion: Ints
    confusion_at_threshold: Ints | None
    reliability: ReliabilityBins
    reliability_before: ReliabilityBins | None
    folds: tuple[FoldFigures, ...]
    warnings: tuple[str, ...]

    @property
    def patients(self) -> int:
        """How many patients the figures rest on."""
        return len(set(self.cases.patients))

    @property
    def slides(self) -> int:
        """How many slides they rest on; a slide may be predicted several times."""
        return len(set(self.cases.slide_ids))

    @property
    def size(self) -> str:
        """How much they rest on, in words."""
        text = f"{count(self.slides, 'slide')} of {count(self.patients, 'patient')}"
        return text if self.slides == len(self.cases) else f"{len(self.cases):,} predictions of {text}"

    @property
    def fold_auroc(self) -> tuple[float, float]:
        """Mean and standard deviation (n − 1) of the AUROC over folds that have one; NaN with none, or with one."""
        known = [one.auroc for one in self.folds if np.isfinite(one.auroc)]
        mean = float(np.mean(known)) if known else float("nan")
        return mean, float(np.std(known, ddof=1)) if len(known) > 1 else float("nan")


def evaluate_run(
    run: str | os.PathLike[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    truth: RosterSource | None = None,
    label: str | None = None,
) -> Evaluation:
    """Measure a training run on the slides its folds held out, or a table of predictions.

    A run's probabilities are calibrated by each fold's temperature, and its two classes decided by each fold's
    threshold; both were fitted on validation slides and are read from the heads, nothing is fitted here. Intervals
    come from a bootstrap over patients, the same resamples for all figures.

    Args:
        run: folder of ``wsi train``, or a CSV of predictions of ``wsi train`` or ``wsi classify``.
        resamples: how many resamples of patients, at least 1,000.
        seed: same seed, same intervals.
        truth: cohort with the true classes, for a table that has none, or in place of a run's own.
        label: column of the truth; that of the run where not given.

    Raises:
        InputError: the table or the truth cannot be read, they do not fit, or no slide has a known class.
        ModelError: the run or one of its heads cannot be read.
        SettingsError: too few resamples, or a negative seed.
    """
    settings = BootstrapSettings(resamples, seed)
    return evaluate_cases(gather_cases(run, truth, label), settings)


def evaluate_cases(cases: Cases, settings: BootstrapSettings) -> Evaluation:
    """Measure slides that are at hand; see :func:`evaluate_run`."""
    measures = list_measures(cases)
    by_class = list_class_measures(cases.classes) if len(cases.classes) > 2 else {}
    joined: dict[str, Measure] = {**measures, **{_key(*names): one for names, one in by_class.items()}}
    found = patient_bootstrap(joined, cases.labels, stack_columns(cases), cases.patients, settings)
    classes: dict[str, dict[str, Interval]] = {}
    for name, what in by_class:
        classes.setdefault(name, {})[what] = found[_key(name, what)]
    figures = {name: found[name] for name in measures}
    calibrated = any(one.temperature != 1 for one in cases.calibrations)
    number = len(cases.classes)
    return Evaluation(
        cases,
        settings,
        figures,
        classes,
        confusion_matrix(cases.labels, decide(cases.probabilities), number),
        confusion_matrix(cases.labels, cases.decided, number) if cases.thresholds_known else None,
        reliability_bins(cases.labels, cases.probabilities, BINS),
        reliability_bins(cases.labels, cases.raw, BINS) if calibrated else None,
        measure_folds(cases),
        (*cases.notes, *warn_of_patients(cases), *warn_of_figures(figures, settings)),
    )


def measure_folds(cases: Cases) -> tuple[FoldFigures, ...]:
    """Each fold's own AUROC, of a run or a table of folds."""
    if cases.kind == "ensemble":
        return ()
    fitted = {one.fold: one for one in cases.calibrations}
    found = []
    for number in np.unique(cases.folds).tolist():
        rows = np.flatnonzero(cases.folds == number)
        own = fitted.get(number)
        found.append(
            FoldFigures(
                number,
                len(rows),
                len({cases.patients[row] for row in rows}),
                auroc(cases.labels[rows], cases.probabilities[rows]),
                own.temperature if own else 1.0,
                own.threshold if own else None,
            )
        )
    return tuple(found)


def warn_of_patients(cases: Cases) -> list[str]:
    """Whether there are too few patients, in all or of a class."""
    warnings = []
    total = len(set(cases.patients))
    if total < FEW_PATIENTS:
        warnings.append(f"only {count(total, 'patient')}: intervals from so few are too narrow, do not lean on them")
    for number, name in enumerate(cases.classes):
        own = len({patient for patient, label in zip(cases.patients, cases.labels, strict=True) if label == number})
        if not own:
            warnings.append(f"no slide is of class {name}: figures leave it out or are undefined")
        elif own < FEW_OF_CLASS:
            warnings.append(f"only {count(own, 'patient')} of class {name}: figures of it may change with any of them")
    return warnings


def warn_of_figures(figures: dict[str, Interval], settings: BootstrapSettings) -> list[str]:
    """Figures that are undefined, or rest on fewer resamples, and temperatures that did harm."""
    warnings = []
    undefined = [TITLES[name] for name, one in figures.items() if not np.isfinite(one.value)]
    if undefined:
        warnings.append(f"undefined on these slides: {', '.join(undefined)}")
    known = {name: one for name, one in figures.items() if np.isfinite(one.value)}
    if "nll_before" in known and known["nll"].value > known["nll_before"].value:
        warnings.append(
            "temperatures made the log-likelihood worse: there may be too few validation slides to fit them"
        )
    short = [name for name, one in known.items() if one.resamples < ENOUGH * settings.resamples]
    if short:
        fewest = min(known[name].resamples for name in short)
        titles = ", ".join(TITLES[name] for name in short)
        warnings.append(f"only {fewest} or more of {settings.resamples} resamples could be used for: {titles}")
    skipped = min((one.skipped for one in known.values()), default=0)
    if skipped > settings.resamples // 20:
        warnings.append(f"{skipped} resamples lacked a class and were drawn again: a class has very few patients")
    return warnings


def _key(name: str, what: str) -> str:
    return f"{what} of {name}"
