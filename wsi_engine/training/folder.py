"""The folder of a run while it is trained: begun once, gone on with only by the same command, finished last."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import ModelError, WsiError
from wsi_engine.lease import Lease, hold_lease
from wsi_engine.predictions import PredictionTable
from wsi_engine.runs import RunFolder, RunRecord, write_text

if TYPE_CHECKING:
    from wsi_engine.cohorts.audit import TrainingSet
    from wsi_engine.cohorts.splits import Fold

Probabilities = dict[int, NDArray[np.float64]]
"""Probabilities (n, C) of the slides of one part, by the number of the fold."""


@contextmanager
def hold_run(run: RunFolder) -> Iterator[Lease]:
    """Make the folder and keep other processes out of it for the ``with`` block.

    Raises:
        BusyError: another process trains in it.
        ModelError: it cannot be made.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot make the folder {run.path}: {error.strerror or error}") from error
    with hold_lease(run.path / f".{run.path.resolve().name}.lease", "training") as lease:
        yield lease


def check_run(run: RunFolder, record: RunRecord, unknown: Collection[str] = ()) -> RunRecord | None:
    """The record of a folder, checked to be of the same run as the one given; None where there is none.

    Args:
        run: the folder.
        record: what is asked now.
        unknown: what is not compared, since it is not known yet: ``classes``, ``setting precision`` …, as messages
            name it.

    Raises:
        ModelError: the folder holds a run with other settings, and the message says what differs; or folds without a
            ``run.json``.
    """
    if not run.record_file.exists():
        if any(run.path.glob("fold-*")):  # heads of who knows what
            raise ModelError(f"{run.path} holds folds of a run but no run.json: choose another folder, or empty it")
        return None
    before = run.read_record()
    old, new = _flatten(before), _flatten(record)
    for name in dict.fromkeys([*new, *old]):
        if name not in unknown and old.get(name) != new.get(name):
            raise ModelError(
                f"{run.path} holds a run with another {name} ({old.get(name)}, now {new.get(name)}): choose another "
                "folder, or repeat the command as it was"
            )
    return before


def begin_run(run: RunFolder, record: RunRecord, splits: str) -> RunRecord:
    """Write ``run.json`` and ``splits.csv``, or check that those there are the same; the record that then counts.

    Raises:
        ModelError: the folder holds a run with other settings or slides, and the message says what differs; or folds
            without a ``run.json``.
    """
    before = check_run(run, record)
    if before is None:
        write_text(run.splits_file, splits)
        run.write_record(record)
        return record
    try:
        same = run.splits_file.read_text(encoding="utf-8") == splits
    except FileNotFoundError:
        write_text(run.splits_file, splits)
        same = True
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {run.splits_file}: {error}") from error
    if not same:
        raise ModelError(
            f"{run.path} holds a run on other slides, patients or labels than the cohort has now (its splits.csv "
            "differs): choose another folder"
        )
    return before


def render_splits(training: TrainingSet, folds: Sequence[Fold]) -> str:
    """``splits.csv``: slide_id, patient, label, and a column for each fold that says train, val, test or nothing."""
    parts = [["" for _ in training.roster] for _ in folds]
    for said, fold in zip(parts, folds, strict=True):
        for name, places in (("train", fold.train), ("val", fold.validation), ("test", fold.test)):
            for place in places:
                said[place] = name
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide_id", "patient", "label", *(f"fold-{number}" for number in range(len(folds)))])
    for place, row in enumerate(training.roster):
        label = training.classes[training.labels[place]]
        writer.writerow([row.slide_id, row.patient, label, *(said[place] for said in parts)])
    return text.getvalue()


def write_predictions(path: Path, training: TrainingSet, places: Sequence[Sequence[int]], found: Probabilities) -> None:
    """Replace a table of predictions by that of the folds found so far; ``places`` are the slides of each fold."""
    numbers = sorted(found)
    rows = [place for number in numbers for place in places[number]]
    classes = len(training.classes)
    table = PredictionTable(
        classes=training.classes,
        slide_ids=tuple(training.roster.rows[place].slide_id for place in rows),
        patients=tuple(training.roster.rows[place].patient for place in rows),
        labels=training.labels[np.asarray(rows, np.int64)],
        folds=np.repeat(np.asarray(numbers, np.int64), [len(places[number]) for number in numbers]),
        probabilities=np.concatenate([np.empty((0, classes)), *(found[number] for number in numbers)]),
    )
    table.write(path)


def read_predictions(path: Path, training: TrainingSet, places: Sequence[Sequence[int]]) -> Probabilities:
    """What :func:`write_predictions` wrote, for those folds of which it is all there; others are to be made again."""
    if not path.exists():
        return {}
    try:
        table = PredictionTable.read(path)
    except (WsiError, OSError, ValueError):
        return {}
    found: Probabilities = {}
    for number, own in enumerate(places):
        rows = np.flatnonzero(table.folds == number)
        expected = [training.roster.rows[place].slide_id for place in own]
        if [table.slide_ids[row] for row in rows] == expected:
            found[number] = table.probabilities[rows].reshape(len(own), -1)
    return found


def _flatten(record: RunRecord) -> dict[str, Any]:
    """What a run was asked, by names for messages, as JSON gives it back."""
    plain = json.loads(json.dumps(asdict(record)))
    flat = {name: plain[name] for name in ("label", "classes", "head", "folds")}
    for kind, values in (("features", plain["features"]), ("option", plain["options"])):
        flat |= {f"{kind} {name}": value for name, value in values.items()}
    for name, value in plain["settings"].items():
        nested: Mapping[str, Any] = value if isinstance(value, dict) else {}
        flat |= {f"{name} {inner}": one for inner, one in nested.items()} if nested else {f"setting {name}": value}
    return flat
