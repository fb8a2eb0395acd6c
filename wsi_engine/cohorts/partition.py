"""Patients into parts, class by class: by lot, or whole sites at a time.

The lot is the SHA-256 of a seed and a patient's name: the same on every machine and with every version of NumPy, and
whatever the order of the slides.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from wsi_engine.cohorts.sites import share_sites

_MOST_VALIDATION = 0.5
"""Most of what is not tested on that may be validated on, where whole sites are shared out."""


@dataclass(frozen=True)
class Patients:
    """The patients of a cohort by name.

    Attributes:
        classes: names of the patients of each class, sorted, every class of a slide there.
        slides: places of each patient's slides, ascending.
        sites: where each patient is from; empty where sites do not matter.
    """

    classes: dict[int, tuple[str, ...]]
    slides: dict[str, tuple[int, ...]]
    sites: dict[str, str]

    @classmethod
    def of(cls, labels: Sequence[int], patients: Sequence[str], sites: Sequence[str] | None = None) -> Patients:
        """Group slides by patient; one with slides of several classes is of the rarest, the first of equals."""
        slides: defaultdict[str, list[int]] = defaultdict(list)
        for place, patient in enumerate(patients):
            slides[patient].append(place)
        found = {patient: {labels[place] for place in slides[patient]} for patient in sorted(slides)}
        having = Counter(label for some in found.values() for label in some)
        classes: dict[int, list[str]] = {label: [] for label in sorted(having)}
        for patient, some in found.items():
            classes[min(some, key=lambda label: (having[label], label))].append(patient)
        return cls(
            {label: tuple(names) for label, names in classes.items()},
            {patient: tuple(places) for patient, places in slides.items()},
            {} if sites is None else dict(zip(patients, sites, strict=True)),
        )

    @property
    def names(self) -> frozenset[str]:
        """Every patient."""
        return frozenset(self.slides)

    def places(self, names: Iterable[str]) -> tuple[int, ...]:
        """Places of the slides of some patients, ascending."""
        return tuple(sorted(place for name in names for place in self.slides[name]))


def deal_folds(cohort: Patients, folds: int, lot: str) -> list[frozenset[str]]:
    """Every patient in one fold; numbers per class, and of all patients, differ by one at most between folds.

    Among folds alike in that, the one with the fewest slides is next.
    """
    dealt: list[set[str]] = [set() for _ in range(folds)]
    slides = [0] * folds
    for names in cohort.classes.values():
        of_class = [0] * folds
        for name in _draw_order(names, lot):
            fold = min(range(folds), key=lambda at: (of_class[at], len(dealt[at]), slides[at]))
            dealt[fold].add(name)
            of_class[fold] += 1
            slides[fold] += len(cohort.slides[name])
    return [frozenset(names) for names in dealt]


def draw_share(cohort: Patients, among: AbstractSet[str], share: float, keep: int, lot: str) -> frozenset[str]:
    """Draw a share of each class's patients from ``among``.

    ``share`` is of all patients of the class, rounded; one at least is drawn, and ``keep`` are left where there are
    more, else one.
    """
    drawn: list[str] = []
    for names in cohort.classes.values():
        left = [name for name in _draw_order(names, lot) if name in among]
        most = len(left) - keep if len(left) > keep else len(left) - 1
        drawn += left[: max(0, min(max(1, int(share * len(names) + 0.5)), most))]
    return frozenset(drawn)


def share_by_site(
    cohort: Patients, among: AbstractSet[str], shares: Sequence[float], lots: Sequence[str]
) -> list[frozenset[str]]:
    """Share out patients by whole sites, each part near its share of every class; one start of the search a lot."""
    sites = sorted({cohort.sites[name] for name in among})
    place = {site: at for at, site in enumerate(sites)}
    counts = np.zeros((len(sites), len(cohort.classes)), np.int64)
    for column, names in enumerate(cohort.classes.values()):
        for name in names:
            if name in among:
                counts[place[cohort.sites[name]], column] += 1
    orders = [[place[site] for site in _draw_order(sites, lot)] for lot in lots]
    part_of = share_sites(counts, shares, orders)
    return [
        frozenset(name for name in among if part_of[place[cohort.sites[name]]] == part) for part in range(len(shares))
    ]


def share_site_validation(
    cohort: Patients, among: AbstractSet[str], share: float, lots: Sequence[str]
) -> frozenset[str]:
    """Whole sites of ``among`` that hold about this share of the cohort's patients."""
    part = min(share * len(cohort.names) / len(among), _MOST_VALIDATION)
    return share_by_site(cohort, among, (1 - part, part), lots)[1]


def _draw_order(names: Iterable[str], lot: str) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{lot}\n{name}".encode()).digest())
