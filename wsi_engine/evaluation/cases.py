"""What is evaluated: slides with a known class and what was said of them, from a run or from a table of predictions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_engine.classification.prediction import calibrate, measure_entropy
from wsi_engine.cohorts.findings import count
from wsi_engine.cohorts.roster import RosterSource
from wsi_engine.errors import InputError, ModelError
from wsi_engine.evaluation.truth import Truth
from wsi_engine.metrics import decide
from wsi_engine.predictions import LEAD, PredictionLines, PredictionTable, read_lines
from wsi_engine.runs import RunFolder, RunRecord

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

Kind = Literal["run", "folds", "ensemble"]
"""A run with its heads; a table of folds without them; a table that the ensemble of all folds wrote."""


@dataclass(frozen=True)
class Calibration:
    """What was fitted on the validation slides of a fold, and nowhere else.

    Attributes:
        fold: its number.
        temperature: divides the logarithms of its probabilities; 1 where none was fitted.
        threshold: of the calibrated probability of class 1 of two; None where none was fitted.
    """

    fold: int
    temperature: float = 1.0
    threshold: float | None = None


@dataclass(frozen=True, eq=False)
class Cases:
    """N slides whose class is known, and C classes; a slide stands once for every fold that held it out.

    Attributes:
        source: the run or the table, for people.
        kind: what it is.
        label: the column that was learned or that the truth was taken from; empty where the table did not say.
        classes: names of the classes in the order of probabilities.
        slide_ids, patients: (N,).
        labels: int64 (N,), numbers of the true classes.
        folds: int64 (N,), whose prediction it is; 0 for an ensemble's.
        raw: float64 (N, C), probabilities as the head gave them.
        probabilities: float64 (N, C), after each fold's temperature; an ensemble's are calibrated as they come.
        decided: int64 (N,), class by the fold's threshold, or the most probable one where there is none.
        entropy: float64 (N,), 0 certain to 1 no idea; None where a table does not tell.
        disagreement: float64 (N,), the part of it in which folds contradict each other; None where not told.
        calibrations: one for each fold, those of a run alone.
        notes: what a reader of the figures must know of the slides.
    """

    source: str
    kind: Kind
    label: str
    classes: tuple[str, ...]
    slide_ids: tuple[str, ...]
    patients: tuple[str, ...]
    labels: Ints
    folds: Ints
    raw: Floats
    probabilities: Floats
    decided: Ints
    entropy: Floats | None
    disagreement: Floats | None
    calibrations: tuple[Calibration, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.slide_ids)

    @property
    def thresholds_known(self) -> bool:
        """Whether a threshold decides in at least one fold."""
        return any(one.threshold is not None for one in self.calibrations)


def gather_cases(
    source: str | os.PathLike[str], truth: RosterSource | None = None, label: str | None = None
) -> Cases:  # fmt: skip
    """Read what is to be evaluated.

    Args:
        source: folder of a training run (its held-out predictions), or a CSV of predictions.
        truth: cohort that tells classes and patients; else the table's own are taken.
        label: column of the truth; of a run, the one it learned where not given.

    Raises:
        InputError: it cannot be read, tells no class, or the truth does not fit.
        ModelError: the run or the head of a fold cannot be read, or they contradict each other.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or (path.name == "predictions.csv" and RunFolder(folder).record_file.is_file()):
        return _from_run(RunFolder(folder), Truth.read(truth, label, RunFolder(folder).read_record().label))
    lines = read_lines(path, ("slide_id",))
    known = Truth.read(truth, label, None)
    if set(LEAD) <= set(lines.columns):
        return _from_folds(path, known)
    return _from_ensemble(lines, known)


def _from_run(run: RunFolder, truth: Truth | None) -> Cases:
    record = run.read_record()
    if not run.predictions_file.is_file():
        raise ModelError(f"{run.path} has no held-out predictions yet: run the same wsi train command again")
    table = PredictionTable.read(run.predictions_file)
    numbers = np.unique(table.folds).tolist()
    if table.classes != record.classes or any(number >= record.folds for number in numbers):
        raise ModelError(
            f"{run.predictions_file} is not of the run beside it, which has {record.folds} folds and the classes "
            f"{', '.join(record.classes)}: keep the files of one run together"
        )
    calibrations = tuple(_read_calibration(run.head_file(number), number, record) for number in numbers)
    notes = [] if record.complete else [f"the run is not finished: {len(numbers)} of {record.folds} folds are here"]
    lacking = [one.fold for one in calibrations if one.threshold is None]
    if len(record.classes) == 2 and lacking:
        notes.append(
            f"folds without a threshold ({', '.join(map(str, lacking))}): the most probable class was taken, since "
            "their validation slides were none or of one class"
        )
    return _from_table(str(run.path), "run", record.label, table, truth, calibrations, notes)


def _from_folds(path: Path, truth: Truth | None) -> Cases:
    table = PredictionTable.read(path)
    notes = ["no heads beside the table: probabilities are taken as they stand, without temperature or threshold"]
    if path.name == "validation.csv":
        notes.append("validation slides chose the epoch, the temperature and the threshold: figures are too good")
    return _from_table(str(path), "folds", "", table, truth, (), notes)


def _from_table(
    source: str,
    kind: Kind,
    label: str,
    table: PredictionTable,
    truth: Truth | None,
    calibrations: tuple[Calibration, ...],
    notes: list[str],
) -> Cases:
    """Cases of folds: labelled, calibrated, decided."""
    labels, patients = table.labels, table.patients
    if truth is not None:
        found = truth.match(table.slide_ids, table.classes)
        labels, patients, notes = found.labels, found.patients, [*notes, *found.notes]
    table = PredictionTable(table.classes, table.slide_ids, patients, labels, table.folds, table.probabilities)
    rows = _labelled(labels, source, notes)
    table = table.select(rows)
    repeated = len(table) - len(set(table.slide_ids))
    if repeated:
        notes.append(
            f"{count(len(set(table.slide_ids)), 'slide')} held out {len(table)} times in all; each time counts"
        )
    probabilities, decided = table.probabilities.copy(), decide(table.probabilities)
    for one in calibrations:
        own = table.folds == one.fold
        probabilities[own] = [calibrate(row, one.temperature) for row in table.probabilities[own]]
        decided[own] = decide(probabilities[own], one.threshold)
    entropy = np.array([measure_entropy(row) for row in probabilities], np.float64)
    return Cases(
        source, kind, truth.label if truth else label, table.classes, table.slide_ids, table.patients, table.labels,
        table.folds, table.probabilities, probabilities, decided, entropy, None, calibrations, tuple(notes),
    )  # fmt: skip


def _from_ensemble(lines: PredictionLines, truth: Truth | None) -> Cases:
    """Cases of a table as wsi classify writes it: calibrated, averaged over folds, without classes."""
    if truth is None:
        raise InputError(
            f"{lines.source} does not tell the true classes: name a cohort with --truth and its column with --label"
        )
    probabilities = lines.probabilities()
    found = truth.match(lines.slide_ids, lines.classes)
    notes = [*found.notes, "figures of an ensemble hold for slides that no fold was trained on: keep others out"]
    rows = _labelled(found.labels, lines.source, notes)
    doubts = [lines.numbers(name)[rows] if name in lines.columns else None for name in ("entropy", "disagreement")]
    shares = probabilities[rows]
    return Cases(
        lines.source, "ensemble", truth.label, lines.classes, tuple(lines.slide_ids[row] for row in rows),
        tuple(found.patients[row] for row in rows), found.labels[rows], np.zeros(len(rows), np.int64),
        shares, shares, decide(shares), doubts[0], doubts[1], (), tuple(notes),
    )  # fmt: skip


def _labelled(labels: Ints, source: str, notes: list[str]) -> Ints:
    """Rows whose class is known; how many are not goes into the notes."""
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise InputError(f"{source} holds no prediction of a slide whose class is known: nothing to evaluate")
    if len(rows) < len(labels):
        notes.append(f"{len(labels) - len(rows)} of {len(labels)} predictions left out: their class is not known")
    return rows


def _read_calibration(file: Path, fold: int, record: RunRecord) -> Calibration:
    """Temperature and threshold in the card of a fold's head."""
    from wsi_engine.models import HeadError, read_head_card  # noqa: PLC0415 - loads torch

    try:
        card: Mapping[str, Any] = read_head_card(file)
    except HeadError as error:
        raise ModelError(str(error)) from error
    kept = card.get("calibration") or {}
    try:
        temperature, threshold = kept.get("temperature"), kept.get("threshold")
        if len(record.classes) > 2:
            threshold = None  # it decides between two
        found = Calibration(
            fold, 1.0 if temperature is None else float(temperature), None if threshold is None else float(threshold)
        )
        if not 0 < found.temperature < np.inf or tuple(card.get("classes", record.classes)) != record.classes:
            raise ValueError(f"temperature {found.temperature:g}, classes {card.get('classes')}")
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"the card in {file} does not fit the run ({error}): train that fold again") from error
    return found
