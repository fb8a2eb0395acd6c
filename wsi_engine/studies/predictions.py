"""What a training run says of a cohort's slides: of each, the most honest prediction that is on disk."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.classification.prediction import measure_entropy
from wsi_engine.cohorts.roster import Roster
from wsi_engine.errors import InputError, ModelError
from wsi_engine.evaluation.cases import gather_cases
from wsi_engine.predictions import SHARE, read_lines
from wsi_engine.runs import RunFolder, RunRecord
from wsi_engine.studies.places import place_predictions

PREDICTION, SOURCE = "prediction", "prediction_from"
"""Columns of the predicted class, and of where it comes from."""

HELD_OUT, UNSEEN, SEEN = "held out", "unseen", "seen in training"

Row = dict[str, Any]


def gather_predictions(roster: Roster, out: Path, run: Path) -> dict[str, Row]:
    """Columns of a run's predictions by slide; see :func:`wsi_engine.studies.table.make_table`.

    Held-out predictions are calibrated by their folds' temperatures, and averaged where several folds held a slide out.

    Raises:
        ModelError: the run cannot be read.
        InputError: its predictions cannot be read, or are of another model than the run.
    """
    folder = RunFolder(run)
    record = folder.read_record()
    known = _read_trained(folder)
    found = _read_classified(place_predictions(out, run) / "predictions.csv", folder, record, known)
    if folder.predictions_file.is_file():
        found |= _read_held_out(run)
    return {row.slide_id: found[row.slide_id] for row in roster if row.slide_id in found}


def _read_held_out(run: Path) -> dict[str, Row]:
    cases = gather_cases(run)
    rows: defaultdict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for slide_id, probabilities in zip(cases.slide_ids, cases.probabilities, strict=True):
        rows[slide_id].append(probabilities)
    return {
        slide_id: _make_row(cases.classes, np.mean(some, axis=0), None, HELD_OUT) for slide_id, some in rows.items()
    }


def _read_classified(path: Path, run: RunFolder, record: RunRecord, trained: frozenset[str]) -> dict[str, Row]:
    """What the heads of the run said of slides, as ``classify`` wrote it."""
    if not path.is_file():
        return {}
    lines = read_lines(path, ("slide_id", "model"))
    classes = record.classes
    # heads that are still to be trained have said nothing yet
    digest = run.model_digest(record.folds) if record.complete else None
    if lines.classes != classes or set(lines.column("model")) - {digest}:
        raise InputError(f"{path} is of another model than the run {run.path}: delete it and classify again")
    doubts = lines.numbers("disagreement") if "disagreement" in lines.columns else [None] * len(lines.slide_ids)
    return {
        slide_id: _make_row(classes, shares, doubt, SEEN if slide_id in trained else UNSEEN)
        for slide_id, shares, doubt in zip(lines.slide_ids, lines.probabilities(), doubts, strict=True)
    }


def _read_trained(folder: RunFolder) -> frozenset[str]:
    """The slides that the run knows, whatever their part."""
    if not folder.splits_file.is_file():
        raise ModelError(f"{folder.path} has no splits.csv, which tells the slides it was trained on: train again")
    return frozenset(Roster.read(folder.splits_file).column("slide_id")) - {None}  # type: ignore[return-value]


def _make_row(
    classes: tuple[str, ...], probabilities: NDArray[np.float64], disagreement: float | None, source: str
) -> Row:
    shares = {f"{SHARE}{name}": float(value) for name, value in zip(classes, probabilities, strict=True)}
    return {
        PREDICTION: classes[int(np.argmax(probabilities))],
        **shares,
        "entropy": measure_entropy(np.asarray(probabilities)),
        "disagreement": None if disagreement is None else float(disagreement),
        SOURCE: source,
    }
