"""The true classes of slides, from a cohort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from wsi_engine.cohorts.findings import count, list_some
from wsi_engine.cohorts.roster import Roster, RosterSource
from wsi_engine.errors import InputError


@dataclass(frozen=True, eq=False)
class Match:
    """Classes (-1 where not known) and patients in the order of the slides asked for, and what did not match."""

    labels: NDArray[np.int64]
    patients: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Truth:
    """A cohort's column of classes and its patients, by slide."""

    source: str
    label: str
    classes: dict[str, str]
    patients: dict[str, str]

    @classmethod
    def read(cls, cohort: RosterSource | None, label: str | None, default: str | None) -> Self | None:
        """Read a cohort; None where none is given.

        Args:
            cohort: as :meth:`~wsi_engine.cohorts.roster.Roster.read` takes it.
            label: its column of classes.
            default: the column where ``label`` is not given.

        Raises:
            InputError: it cannot be read, has no such column or none was named, a label is given without a cohort, or
                a slide has two classes or two patients.
        """
        if cohort is None:
            if label is not None:
                raise InputError(f'the label "{label}" is a column of a cohort: name the cohort with --truth')
            return None
        column = label or default
        if column is None:
            raise InputError("a truth needs the name of its column of classes: give it with --label")
        roster = Roster.read(cohort)
        classes: dict[str, str] = {}
        patients: dict[str, str] = {}
        for row, value in zip(roster, roster.column(column), strict=True):
            known = classes.setdefault(row.slide_id, value or ""), patients.setdefault(row.slide_id, row.patient)
            if known != (value or "", row.patient):
                raise InputError(
                    f"{row.where}: {row.slide_id} stands twice with different {column} or patient; remove one line"
                )
        return cls(roster.source, column, classes, patients)

    def match(self, slide_ids: Sequence[str], classes: Sequence[str]) -> Match:
        """The class of each slide among those of a model.

        Raises:
            InputError: a slide is of a class that the model does not know, or none is in the cohort.
        """
        shared = set(slide_ids) & set(self.classes)
        if not shared:
            raise InputError(
                f"none of the {len(set(slide_ids))} predicted slides is in {self.source}: its slide_id must be those "
                "of the predictions"
            )
        numbers = {name: number for number, name in enumerate(classes)} | {"": -1}
        self._refuse_unknown(sorted(shared), numbers, classes)
        notes = []
        for number, what, where in (
            (len(set(slide_ids) - shared), "predicted slide", f"not in {self.source}"),
            (len(set(self.classes) - shared), "slide", f"of {self.source} without a prediction"),
        ):
            if number:
                notes.append(f"left out: {count(number, what)} {where}")
        labels = [numbers[self.classes.get(slide, "")] for slide in slide_ids]
        patients = tuple(self.patients.get(slide, slide) for slide in slide_ids)
        return Match(np.array(labels, np.int64), patients, tuple(notes))

    def _refuse_unknown(self, slides: Sequence[str], numbers: dict[str, int], classes: Sequence[str]) -> None:
        unknown = sorted({self.classes[slide] for slide in slides} - set(numbers))
        if unknown:
            which = [slide for slide in slides if self.classes[slide] == unknown[0]]
            others = f", nor {', '.join(unknown[1:])}" if unknown[1:] else ""
            raise InputError(
                f'the model does not know the class "{unknown[0]}" of {list_some(which)}{others} '
                f"(it knows {', '.join(classes)}): correct {self.label} in {self.source}, or leave it empty there"
            )
