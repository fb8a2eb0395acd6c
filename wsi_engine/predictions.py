"""Predictions of slides as a table on disk: which fold said what of whom, to the last digit."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import InputError, SettingsError
from wsi_engine.runs import write_text

SHARE = "prob_"
"""What a column of probabilities is called by, before the name of its class."""

LEAD = ("fold", "slide_id", "patient", "label", "prediction")
"""The columns before those of the classes."""

TOLERANCE = 1e-3
"""How far from 1 the probabilities of a slide may sum."""


@dataclass(frozen=True, eq=False)
class PredictionTable:
    """What the folds of a run say of slides, N rows over C classes; a slide may stand once in every fold.

    Attributes:
        classes: names of the classes in the order of probabilities, at least 2.
        slide_ids: (N,), which slide.
        patients: (N,), whose it is.
        labels: int64 (N,), number of the true class, -1 where it is not known.
        folds: int64 (N,), whose prediction it is.
        probabilities: float64 (N, C), each row sums to 1; before calibration in the tables of a training run.
    """

    classes: tuple[str, ...]
    slide_ids: tuple[str, ...]
    patients: tuple[str, ...]
    labels: NDArray[np.int64]
    folds: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    def __post_init__(self) -> None:
        count = len(self.slide_ids)
        if len(self.classes) < 2 or len(set(self.classes) - {""}) < len(self.classes):
            raise SettingsError(f"predictions need two classes or more, each of its own name, not {self.classes!r}")
        shapes = (len(self.patients), self.labels.shape, self.folds.shape, self.probabilities.shape)
        if shapes != (count, (count,), (count,), (count, len(self.classes))):
            raise SettingsError(
                f"predictions of {count} slides and {len(self.classes)} classes do not fit patients, labels, folds "
                f"and probabilities of {shapes}; give one of each for every slide"
            )
        if count and not -1 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise SettingsError(f"a label is not among the {len(self.classes)} classes, which count from 0, nor -1")
        fault = find_fault(self.probabilities)
        if fault:
            raise SettingsError(f"the probabilities of {self.slide_ids[fault[0]]} {fault[1]}; predict that slide again")

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each slide, int64 (N,); of equal ones the first."""
        highest: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return highest

    def __len__(self) -> int:
        return len(self.slide_ids)

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Self:
        """The rows at these places, in this order."""
        at = np.asarray(rows, np.int64)
        return type(self)(
            self.classes,
            tuple(self.slide_ids[row] for row in at),
            tuple(self.patients[row] for row in at),
            self.labels[at],
            self.folds[at],
            self.probabilities[at],
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Replace a CSV in one step.

        Its columns are fold, slide_id, patient, label, prediction and one prob_<class> for each class. Numbers are
        written so that reading gives the same bits; an unknown label is empty.

        Raises:
            ModelError: it cannot be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*LEAD, *(f"{SHARE}{name}" for name in self.classes)])
        for row, predicted in enumerate(self.predicted):
            label = int(self.labels[row])
            writer.writerow(
                [
                    int(self.folds[row]), self.slide_ids[row], self.patients[row],
                    self.classes[label] if label >= 0 else "", self.classes[predicted],
                    *(repr(value) for value in self.probabilities[row].tolist()),
                ]
            )  # fmt: skip
        write_text(Path(path), text.getvalue())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`write` wrote.

        Raises:
            InputError: it cannot be read, a column is missing, a slide stands twice in a fold, a label is no class, or
                probabilities are no numbers within 0–1 that sum to 1 (± 0.001).
        """
        lines = read_lines(path, LEAD)
        return cls(
            lines.classes,
            lines.slide_ids,
            tuple(patient or slide for patient, slide in zip(lines.column("patient"), lines.slide_ids, strict=True)),
            lines.labels(),
            lines.folds(),
            lines.probabilities(),
        )


@dataclass(frozen=True)
class PredictionLines:
    """The lines of a table of predictions as text; each slide once, or once in each fold where there are folds."""

    source: str
    columns: tuple[str, ...]
    records: tuple[Mapping[str, str], ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that columns of probabilities name."""
        return tuple(name.removeprefix(SHARE) for name in self.columns if name.startswith(SHARE))

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Which slide a line is of."""
        return self.column("slide_id")

    def column(self, name: str) -> tuple[str, ...]:
        """A column as text."""
        return tuple(record[name] for record in self.records)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column as finite numbers, float64 (N,).

        Raises:
            InputError: a value is no number.
        """
        return np.array([self._number(row, name) for row in range(len(self.records))], np.float64)

    def probabilities(self) -> NDArray[np.float64]:
        """Probabilities of the classes, float64 (N, C).

        Raises:
            InputError: a value is no number within 0–1, or a line does not sum to 1.
        """
        columns = [self.numbers(f"{SHARE}{name}") for name in self.classes]
        found = np.stack(columns, axis=1)
        fault = find_fault(found)
        if fault:
            raise InputError(f"{self._where(fault[0])}: the probabilities {fault[1]}; predict that slide again")
        return found

    def labels(self) -> NDArray[np.int64]:
        """Numbers of the true classes, int64 (N,), -1 where empty.

        Raises:
            InputError: a label is not among the classes.
        """
        known = {name: number for number, name in enumerate(self.classes)} | {"": -1}
        for row, label in enumerate(self.column("label")):
            if label not in known:
                raise InputError(
                    f'{self._where(row)}: the label "{label}" is not among the classes of the file '
                    f"({', '.join(self.classes)}); leave it empty where the class is not known"
                )
        return np.array([known[label] for label in self.column("label")], np.int64)

    def folds(self) -> NDArray[np.int64]:
        """Numbers of the folds, int64 (N,).

        Raises:
            InputError: a value is no whole number from 0 on.
        """
        for row, text in enumerate(self.column("fold")):
            if not (text.isascii() and text.isdigit()):
                raise InputError(f'{self._where(row)}: the fold must be a whole number from 0 on, not "{text}"')
        return np.array([int(text) for text in self.column("fold")], np.int64)

    def _number(self, row: int, name: str) -> float:
        text = self.records[row][name]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f'{self._where(row)}: {name} must be a number, not "{text}"; predict that slide again')
        return value

    def _where(self, row: int) -> str:
        return f"{self.source}, line {row + 2}"


def read_lines(path: str | os.PathLike[str], needed: Sequence[str]) -> PredictionLines:
    """Read a CSV of predictions with at least the columns ``needed`` and ``prob_<class>`` of two classes.

    Raises:
        InputError: it cannot be read, a column is missing or stands twice, a line is short or names no slide, or a
            slide stands twice (in one fold, where there is a column ``fold``).
    """
    source = os.fspath(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            header, *body = list(csv.reader(stream)) or [[]]
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source} is not a CSV file in UTF-8: {error}") from error
    _check_columns(header, needed, source)
    body = [cells for cells in body if cells]  # an empty line at the end is no row
    for line, cells in enumerate(body, start=2):
        if len(cells) != len(header):
            raise InputError(f"{source}, line {line}: has {len(cells)} columns of {len(header)}; write the file again")
    lines = PredictionLines(source, tuple(header), tuple(dict(zip(header, cells, strict=True)) for cells in body))
    _refuse_repeats(lines)
    return lines


def find_fault(probabilities: NDArray[np.float64]) -> tuple[int, str] | None:
    """The first row (of N, C) that holds no probabilities, and what is wrong with it; None where all are well."""
    inside = (probabilities >= 0) & (probabilities <= 1 + TOLERANCE)  # False for NaN
    sums = np.where(inside.all(axis=1), probabilities.sum(axis=1), 1)
    wrong = np.flatnonzero(~inside.all(axis=1) | (np.abs(sums - 1) > TOLERANCE))
    if not len(wrong):
        return None
    row = int(wrong[0])
    if inside[row].all():
        return row, f"sum to {sums[row]:g}, not to 1"
    return row, f"hold {probabilities[row][~inside[row]][0]:g}, which is not within 0–1"


def _check_columns(header: Sequence[str], needed: Sequence[str], source: str) -> None:
    missing = [name for name in needed if name not in header]
    if missing:
        raise InputError(
            f'{source} has no column "{missing[0]}" (its columns: {", ".join(header) or "none"}); give a table of '
            "predictions as wsi train or wsi classify writes it"
        )
    twice = [name for place, name in enumerate(header) if name in header[:place]]
    if twice:
        raise InputError(f'{source} has two columns "{twice[0]}"; remove one of them')
    if sum(name.startswith(SHARE) for name in header) < 2:
        raise InputError(f"{source} needs columns {SHARE}<class> for two classes or more; write the file again")


def _refuse_repeats(lines: PredictionLines) -> None:
    seen: set[tuple[str, str]] = set()
    for line, record in enumerate(lines.records, start=2):
        slide, fold = record["slide_id"], record.get("fold", "")
        if not slide:
            raise InputError(f"{lines.source}, line {line}: names no slide; fill in slide_id")
        if (slide, fold) in seen:
            within = f" in fold {fold}" if fold else ""
            raise InputError(f"{lines.source}, line {line}: {slide} stands twice{within}; remove one of the lines")
        seen.add((slide, fold))
