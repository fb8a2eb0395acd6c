"""Everything that is wrong with a cohort, found before training and told in one report."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from wsi_engine.cohorts.examination import find_duplicates
from wsi_engine.cohorts.featurechoice import choose_features
from wsi_engine.cohorts.findings import Problem, count, find_torn, write_report
from wsi_engine.cohorts.inventory import StoredFeatures, StoreFacts, survey_stores
from wsi_engine.cohorts.opening import find_copies
from wsi_engine.cohorts.roster import Roster, RosterSource
from wsi_engine.cohorts.splits import Fold, SplitSettings, find_split_problems, split_patients
from wsi_engine.errors import InputError
from wsi_engine.places import Place, as_place
from wsi_engine.runs import FeatureOrigin

MOST_IMBALANCE = 10
"""How many times more slides the largest class may have than the smallest before a warning is due."""

Survey: TypeAlias = tuple[Sequence[StoreFacts], Sequence[StoredFeatures | None]]
"""Of each slide: what its store holds, and the features to train on, None where they are not there."""

_PARTS = (("test", "test on"), ("validation", "validate on"))


@dataclass(frozen=True)
class TrainingSet:
    """A cohort that can be trained on.

    Attributes:
        roster: the rows that are used: they have a label and features of at least one tile.
        stores: the store of each row, (N,).
        labels: int64 (N,), place of each row's label in ``classes``.
        classes: values of the label, sorted, as numbers where all are whole numbers.
        origin: what all features come from; precision and stride are those of most slides.
        warnings: what should be known, a sentence each.
    """

    roster: Roster
    stores: tuple[Place, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    origin: FeatureOrigin
    warnings: tuple[str, ...]


@dataclass
class _Findings:
    """What has been found so far."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def column(self, roster: Roster, name: str) -> tuple[str | None, ...] | None:
        """A column of the roster; where it is missing that is a problem, and None."""
        try:
            return roster.column(name)
        except InputError as error:
            self.problems.append(Problem(str(error), cure="name another, or add it"))
            return None


def prepare_training_set(
    cohort: RosterSource,
    features: str | os.PathLike[str],
    label: str,
    encoder: str | None = None,
    splits: SplitSettings | None = None,
) -> TrainingSet:
    """Check a cohort, its features and how it is to be split, and gather what can be trained on.

    Slides without a label, and slides without a tile, are left out with a warning. Of the stores only small JSON files
    are read.

    Args:
        cohort: a CSV, rows, a data frame or a roster; see :meth:`~wsi_engine.cohorts.roster.Roster.read`.
        features: folder of the stores, ``<features>/<slide_id>.zarr``.
        label: the column to learn.
        encoder: whose features; None for the only ones there are.
        splits: how the cohort will be split; None to leave that unchecked.

    Raises:
        InputError: the cohort cannot be read, or cannot be trained on. Then the message is a report: a sentence, and
            every problem on a line of its own with at most 20 examples below.
    """
    folder = as_place(features)

    def survey(labelled: Roster, problems: list[Problem]) -> Survey:
        facts = survey_stores([folder / f"{row.slide_id}.zarr" for row in labelled])
        return facts, choose_features(labelled, facts, folder, encoder, problems)

    return audit_cohort(cohort, label, survey, splits)


def audit_cohort(
    cohort: RosterSource,
    label: str,
    survey: Callable[[Roster, list[Problem]], Survey],
    splits: SplitSettings | None = None,
) -> TrainingSet:
    """:func:`prepare_training_set` with one's own look at what the slides hold.

    Args:
        cohort: a CSV, rows, a data frame or a roster.
        label: the column to learn.
        survey: given the rows with a label, the facts of each one's store, and its features or None; what is wrong with
            them it adds to the problems.
        splits: how the cohort will be split; None to leave that unchecked.

    Raises:
        InputError: as for :func:`prepare_training_set`.
    """
    roster = Roster.read(cohort)
    findings = _Findings()
    labelled = _keep_labelled(roster, label, findings)
    _check_rows(labelled, findings)
    facts, stored = survey(labelled, findings.problems)
    _check_copies(labelled, facts, findings)
    kept = _drop_empty(labelled, stored, findings)
    # slides whose features are still to be made count as well, so that all is found at once
    used = labelled.select(kept)
    classes = _sort_classes(row.value(label) for row in used) if label in roster.columns else ()
    labels = np.array([classes.index(row.values[label]) for row in used] if classes else [], np.int64)
    if classes:
        _check_classes(used, labels, classes, findings)
        _check_splits(used, labels, classes, splits, findings)
    elif label in roster.columns:
        findings.problems.append(Problem(f'no slide has both a value of "{label}" and a tile'))
    if findings.problems:
        found = count(len(findings.problems), "problem")
        raise InputError(write_report(f"{roster.source} cannot be trained on, {found} found:", findings.problems))
    origin = _common_origin([stored[place] for place in kept], findings)
    paths = tuple(facts[place].path for place in kept)
    return TrainingSet(used, paths, labels, classes, origin, tuple(str(warning) for warning in findings.warnings))


def _keep_labelled(roster: Roster, label: str, findings: _Findings) -> Roster:
    """The rows that have a label; all where there is no such column, so that the rest can be looked at still."""
    values = findings.column(roster, label)
    if values is None:
        return roster
    kept = [place for place, value in enumerate(values) if value]
    bare = tuple(row.slide_id for row, value in zip(roster, values, strict=True) if not value)
    if bare:
        findings.warnings.append(Problem(f'{count(len(bare), "slide")} left out, for want of a "{label}"', bare))
    return roster.select(kept)


def _check_rows(roster: Roster, findings: _Findings) -> None:
    """Slides named twice, and slides of nobody."""
    findings.problems += find_duplicates(roster)
    if "patient" not in roster.columns:
        findings.warnings.append(
            Problem(
                f'{roster.source} has no column "patient", so each slide is taken for a patient of its own',
                cure="add one if a patient has several slides, or what is held out is not unseen",
            )
        )
        return
    alone = tuple(row.slide_id for row in roster if not row.value("patient"))
    if alone:
        findings.warnings.append(Problem(f"{count(len(alone), 'slide')} without a patient, each taken for one", alone))


def _check_copies(roster: Roster, facts: Sequence[StoreFacts], findings: _Findings) -> None:
    """One picture under two ids is no new slide; an import may not know what it shows."""
    prints = [fact.fingerprint for fact in facts]
    torn, doubled = find_copies(zip(roster, prints, strict=True), lambda row: row.slide_id.lower())
    findings.problems += torn
    findings.warnings += doubled


def _drop_empty(roster: Roster, stored: Sequence[StoredFeatures | None], findings: _Findings) -> list[int]:
    """Places of the rows whose store is not known to hold no tile."""
    empty = [place for place, features in enumerate(stored) if features is not None and not features.tiles]
    if empty:
        names = tuple(roster.rows[place].slide_id for place in empty)
        findings.warnings.append(Problem(f"{count(len(empty), 'slide')} left out, for want of a tile", names))
    return sorted(set(range(len(roster))) - set(empty))


def _sort_classes(values: Iterable[str | None]) -> tuple[str, ...]:
    """The different values, as numbers where all are whole numbers."""
    found = {value for value in values if value}
    if all(re.fullmatch(r"[+-]?[0-9]+", value) for value in found):
        return tuple(sorted(found, key=lambda value: (int(value), value)))
    return tuple(sorted(found))


def _check_classes(roster: Roster, labels: NDArray[np.int64], classes: tuple[str, ...], findings: _Findings) -> None:
    """Classes of very different size, and patients of several."""
    numbers = Counter(int(label) for label in labels)
    most, least = max(numbers, key=lambda at: numbers[at]), min(numbers, key=lambda at: numbers[at])
    if numbers[most] > MOST_IMBALANCE * numbers[least]:
        findings.warnings.append(
            Problem(
                f'the classes are uneven: "{classes[most]}" has {count(numbers[most], "slide")} and '
                f'"{classes[least]}" {numbers[least]:,}'
            )
        )
    mixed = find_torn((row.patient, classes[label]) for row, label in zip(roster, labels, strict=True))
    if mixed:
        what = f"{count(len(mixed), 'patient')} with slides of several classes, each split as one of the rarest"
        findings.warnings.append(Problem(what, mixed))
    if len(classes) < 2:
        findings.problems.append(
            Problem(f'all slides are of one class, "{classes[0]}"', cure="a head needs at least two to tell apart")
        )


def _check_splits(
    roster: Roster,
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    settings: SplitSettings | None,
    findings: _Findings,
) -> None:
    """What keeps the cohort from being split, and folds that lack a class."""
    sites = _look_at_sites(roster, settings, findings)
    if settings is None or len(classes) < 2:
        return
    given = findings.column(roster, settings.column) if settings.kind == "column" else None
    if (settings.by_site and sites is None) or (settings.kind == "column" and given is None):
        return
    patients = [row.patient for row in roster]
    asked = (labels, patients, settings, sites, given, classes)
    problems = list(find_split_problems(*asked))
    if problems:
        findings.problems += problems
        return
    try:
        folds = split_patients(*asked)
    except InputError as error:
        findings.problems.append(Problem(str(error)))
        return
    if given is not None and not all(given):
        idle = tuple(row.slide_id for row, value in zip(roster, given, strict=True) if not value)
        what = f'{count(len(idle), "slide")} in no part, for want of a "{settings.column}"'
        findings.warnings.append(Problem(what, idle))
    _check_folds(folds, labels, classes, findings)


def _look_at_sites(roster: Roster, settings: SplitSettings | None, findings: _Findings) -> list[str] | None:
    """Where each slide is from, where that matters; else a patient at two sites is worth a warning."""
    wanted = settings is not None and settings.by_site
    if not wanted and "site" not in roster.columns:
        return None
    values = findings.column(roster, "site")
    if values is None or wanted:
        return None if values is None else [value or "" for value in values]
    torn = find_torn(zip((row.patient for row in roster), values, strict=True))
    if torn:
        findings.warnings.append(Problem(f"{count(len(torn), 'patient')} at several sites", torn))
    return None


def _check_folds(
    folds: Sequence[Fold], labels: NDArray[np.int64], classes: tuple[str, ...], findings: _Findings
) -> None:
    """Parts in which a class is missing: their figures say nothing of it."""
    for part, purpose in _PARTS:
        lacking = []
        for number, fold in enumerate(folds):
            missing = sorted(set(range(len(classes))) - set(labels[list(getattr(fold, part))].tolist()))
            if missing:
                lacking.append(f"fold {number}: {', '.join(classes[label] for label in missing)}")
        if lacking:
            what = f"{count(len(lacking), 'fold')} without a slide of some class to {purpose}"
            findings.warnings.append(Problem(what, tuple(lacking)))


def _common_origin(stored: Sequence[StoredFeatures | None], findings: _Findings) -> FeatureOrigin:
    """What the features come from; they differ in precision and stride at most."""
    numbers = Counter(features.origin for features in stored if features is not None)
    for name in ("precision", "stride_px"):
        found = Counter[object]()
        for origin, slides in numbers.items():
            found[getattr(origin, name)] += slides
        if len(found) > 1:
            examples = tuple(f"{value}: {count(slides, 'slide')}" for value, slides in found.most_common())
            findings.warnings.append(Problem(f"the features differ in their {name}", examples))
    return numbers.most_common(1)[0][0]
