"""Who is trained on, who is watched while training, and who is held out: by patient, never by slide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from wsi_engine.cohorts.findings import Problem, count, find_torn, list_some
from wsi_engine.cohorts.partition import Patients, deal_folds, draw_share, share_by_site, share_site_validation
from wsi_engine.errors import InputError, SettingsError

SplitKind: TypeAlias = Literal["k-fold", "monte-carlo", "column"]

PART_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""What a column of splits may say, in small letters, and the part that it means."""

_STARTS = 8
"""Orders in which sites are dealt to folds; the best outcome is taken."""

_Parts: TypeAlias = tuple[frozenset[str], frozenset[str]]
"""Patients to validate and to test on."""

Labels: TypeAlias = Sequence[int] | NDArray[np.int64]
"""Class numbers, (N,)."""

_Given = TypeVar("_Given")


@dataclass(frozen=True)
class Fold:
    """The parts of one fold as places of slides in the cohort, each ascending; no place is in two parts.

    Attributes:
        train: what the head learns from.
        validation: what decides when to stop, and fits temperature and threshold.
        test: what is held out until the end.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class SplitSettings:
    """How a cohort is split.

    Attributes:
        kind: ``k-fold`` tests every slide once; ``monte-carlo`` draws the parts anew for each fold; ``column`` takes
            one fold from the cohort.
        folds: number of folds; ``column`` has one whatever this says.
        validation: share of the patients of each class that is validated on, in every fold.
        test: share of the patients of each class that is tested on in a Monte-Carlo fold.
        by_site: keep all patients of a site (the cohort's column ``site``) in one part.
        column: the cohort's column that says train, val (or validation) or test, for ``column``.
        seed: same seed, same split.
    """

    kind: SplitKind = "k-fold"
    folds: int = 5
    validation: float = 0.15
    test: float = 0.2
    by_site: bool = False
    column: str = "split"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(SplitKind):
            raise SettingsError(f"a split is {', '.join(get_args(SplitKind))}, not {self.kind!r}")
        least = {"k-fold": 2, "monte-carlo": 1, "column": 1}[self.kind]
        if self.folds < least:
            raise SettingsError(f"a {self.kind} split needs at least {count(least, 'fold')}, not {self.folds}")
        if not (0 < self.validation < 1 and 0 < self.test < 1):
            raise SettingsError(
                f"the shares of validation and test must be between 0 and 1, not {self.validation} and {self.test}"
            )
        if self.kind != "column" and self.validation + self._test_share >= 1:
            raise SettingsError(
                f"nothing is left to train on: {self.validation:g} of the patients are validated on and "
                f"{self._test_share:g} tested on in a fold; lower the shares or take more folds"
            )
        if self.by_site and self.kind == "column":
            raise SettingsError(
                "by_site has no meaning where a column says who is in which part: leave one of them out"
            )
        if self.seed < 0:
            raise SettingsError(f"the seed of a split must not be negative, not {self.seed}")

    @property
    def _test_share(self) -> float:
        return 1 / self.folds if self.kind == "k-fold" else self.test


def split_patients(
    labels: Labels,
    patients: Sequence[str],
    settings: SplitSettings,
    sites: Sequence[str] | None = None,
    given: Sequence[str | None] | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Fold, ...]:
    """Split a cohort into folds by patient, each class alike.

    All slides of a patient are in one part. A patient whose slides have different labels counts as one of the rarest
    class among them (the one that fewest patients have). The draw rests on the seed and the patients' names alone:
    the order of the slides does not matter.

    k-fold: every slide is in the test part of exactly one fold; patients of a class per fold differ by one at most.
    From the others of a fold, ``validation`` of the class's patients are drawn, at least one wherever two are there.
    monte-carlo: ``folds`` draws, each of its own, with at least one patient of each class to test and one to train on.
    column: one fold as ``given`` says; slides of which it says nothing are in no part, and the test part may be empty.
    by_site: sites are shared out whole, as evenly in every class as they allow. Balance goes before chance here,
    so another seed may give the same folds.

    Args:
        labels: class numbers, (N,).
        patients: whose each slide is, (N,).
        settings: how to split.
        sites: where each slide is from, (N,); for ``by_site``.
        given: what the column says of each slide, (N,), None for nothing; for ``column``.
        classes: names of the classes, for messages.

    Raises:
        InputError: the cohort cannot be split so; the message is the first of :func:`find_split_problems`, or says
            which fold lacks a class to train on.
        SettingsError: the sequences are not of one length, or one that the settings ask for is missing.
    """
    labels = [int(label) for label in labels]
    for problem in find_split_problems(labels, patients, settings, sites, given, classes):
        raise InputError(str(problem))
    if settings.kind == "column":
        folds: tuple[Fold, ...] = (_read_fold(given or ()),)
    else:
        cohort = Patients.of(labels, patients, sites)
        drawn = (_draw_by_site if settings.by_site else _draw_by_lot)(cohort, settings)
        folds = tuple(
            Fold(*map(cohort.places, (cohort.names - validation - test, validation, test)))
            for validation, test in drawn
        )
    for number, fold in enumerate(folds):
        _check_fold(number, fold, labels, classes)
    return folds


def find_split_problems(
    labels: Labels,
    patients: Sequence[str],
    settings: SplitSettings,
    sites: Sequence[str] | None = None,
    given: Sequence[str | None] | None = None,
    classes: Sequence[str] | None = None,
) -> Iterator[Problem]:
    """All that can be seen to keep a cohort from being split; arguments as of :func:`split_patients`.

    Raises:
        SettingsError: the sequences are not of one length, or one that the settings ask for is missing.
    """
    labels = [int(label) for label in labels]
    _require(patients, "patients", len(labels))
    if not labels:
        yield Problem("there is no slide to split")
        return
    if min(labels) < 0:
        raise SettingsError(f"labels hold the class {min(labels)}; classes count from 0")
    if len(set(labels)) < 2:
        name = _name(labels[0], classes)
        yield Problem(f"all slides are of one class, {name}", cure="a head needs at least two to tell apart")
    if settings.kind == "column":
        given = _require(given, "given", len(labels))
        yield from _column_problems(patients, given, settings.column)
        return
    least = max(2, settings.folds) if settings.kind == "k-fold" else 2
    parts = "folds" if settings.kind == "k-fold" else "parts"
    for label, names in Patients.of(labels, patients).classes.items():
        if len(names) < least:
            yield Problem(
                f"class {_name(label, classes)} has {count(len(names), 'patient')}, fewer than the {least} {parts}",
                cure="take fewer folds, or leave the class out" if least > 2 else "leave the class out",
            )
    if settings.by_site:
        yield from _site_problems(patients, _require(sites, "sites", len(labels)), least)


def find_part_problems(patients: Sequence[str], given: Sequence[str | None], column: str) -> Iterator[Problem]:
    """Values of a column of splits that mean no part, and patients in several parts."""
    unknown = sorted({value for value in given if value and _part(value) is None})
    if unknown:
        yield Problem(f'column "{column}" has unknown values', tuple(unknown), "write train, val or test")
    torn = find_torn(zip(patients, map(_part, given), strict=True))
    if torn:
        what = f'{count(len(torn), "patient")} in several parts of column "{column}"'
        yield Problem(what, torn, "put all slides of a patient in one part")


def _column_problems(patients: Sequence[str], given: Sequence[str | None], column: str) -> Iterator[Problem]:
    yield from find_part_problems(patients, given, column)
    parts = [_part(value) for value in given]
    missing = [part for part in ("train", "val") if part not in parts]
    if missing:
        yield Problem(
            f'column "{column}" names no slide {" and none ".join(missing)}',
            cure="a head is trained on one part and stopped by another",
        )


def _site_problems(patients: Sequence[str], sites: Sequence[str], folds: int) -> Iterator[Problem]:
    unknown = sorted({patient for patient, site in zip(patients, sites, strict=True) if not site})
    if unknown:
        yield Problem(f"{count(len(unknown), 'patient')} without a site", tuple(unknown), "fill in the site")
    torn = find_torn(zip(patients, sites, strict=True))
    if torn:
        cure = "give each one site, or split without sites"
        yield Problem(f"{count(len(torn), 'patient')} at several sites", torn, cure)
    found = tuple(sorted({site for site in sites if site}))
    least = max(3, folds)
    if len(found) < least:
        yield Problem(
            f"{count(len(found), 'site')} where a split by site needs {least}, one to test on in every fold and at "
            "least one each to validate and to train on",
            found,
            "take fewer folds, or split without sites",
        )


def _draw_by_lot(cohort: Patients, settings: SplitSettings) -> Iterator[_Parts]:
    dealt = deal_folds(cohort, settings.folds, f"{settings.seed}/test") if settings.kind == "k-fold" else None
    for fold in range(settings.folds):
        lot = f"{settings.seed}/{fold}"
        # one to validate on and one to train on are left by the test part where there are three
        test = dealt[fold] if dealt else draw_share(cohort, cohort.names, settings.test, 2, f"{lot}/test")
        yield draw_share(cohort, cohort.names - test, settings.validation, 1, f"{lot}/validation"), test


def _draw_by_site(cohort: Patients, settings: SplitSettings) -> Iterator[_Parts]:
    if settings.kind == "monte-carlo":
        shares = (1 - settings.validation - settings.test, settings.validation, settings.test)
        for fold in range(settings.folds):
            _, validation, test = share_by_site(cohort, cohort.names, shares, [f"{settings.seed}/{fold}"])
            yield validation, test
        return
    lots = [f"{settings.seed}/{start}" for start in range(_STARTS)]
    for test in share_by_site(cohort, cohort.names, (1 / settings.folds,) * settings.folds, lots):
        yield share_site_validation(cohort, cohort.names - test, settings.validation, lots), test


def _read_fold(given: Sequence[str | None]) -> Fold:
    parts = [_part(value) for value in given]
    return Fold(*(tuple(at for at, part in enumerate(parts) if part == name) for name in ("train", "val", "test")))


def _check_fold(number: int, fold: Fold, labels: Sequence[int], classes: Sequence[str] | None) -> None:
    """Refuse a fold that cannot be trained."""
    lacking = sorted(set(labels) - {labels[place] for place in fold.train})
    if lacking:
        raise InputError(
            f"fold {number} has no slide of class {list_some([_name(label, classes) for label in lacking])} to train "
            "on: split in another way, or leave the class out"
        )
    if not fold.validation:
        raise InputError(f"fold {number} has no slide to validate on: take fewer folds, or gather more patients")


def _part(value: str | None) -> str | None:
    return PART_NAMES.get((value or "").strip().lower())


def _require(values: Sequence[_Given] | None, name: str, length: int) -> Sequence[_Given]:
    if values is None:
        raise SettingsError(f"this split needs {name}, one for each slide")
    if len(values) != length:
        raise SettingsError(f"{name} must have one value for each of the {length} labels, not {len(values)}")
    return values


def _name(label: int, classes: Sequence[str] | None) -> str:
    return str(label) if classes is None else f'"{classes[label]}"'
