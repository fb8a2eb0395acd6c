"""The folds of a run, one after the other, whatever is trained on them; finished ones are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_engine.cohorts.splits import Fold, SplitSettings, split_patients
from wsi_engine.errors import ModelError
from wsi_engine.metrics import apply_temperature, auroc, fit_temperature, youden_threshold
from wsi_engine.models import HeadError, read_head_card
from wsi_engine.models.prompt import PromptError
from wsi_engine.runs import DIGESTS, RunFolder, RunRecord
from wsi_engine.training.fold import FittedFold, fold_warnings
from wsi_engine.training.folder import Probabilities, read_predictions, write_predictions
from wsi_engine.training.hardware import Hardware
from wsi_engine.training.log import TrainLog
from wsi_engine.training.plan import EpochRecord
from wsi_engine.training.report import FoldSummary, TrainProgress, TrainReport
from wsi_engine.training.settings import TrainSettings
from wsi_engine.version import __version__

if TYPE_CHECKING:
    from wsi_engine.cohorts.audit import TrainingSet

_log = logging.getLogger(__name__)


class FoldTrainer(Protocol):
    """Trains one fold and writes what came out."""

    def fit(self, number: int, state_file: Path, told: Callable[[EpochRecord], None]) -> FittedFold:
        """Train a fold, or go on with it from its state file."""
        ...

    def save(self, fitted: FittedFold, folder: Path, card: Mapping[str, Any]) -> None:
        """Write a fold's files into its folder, the head last and with this card."""
        ...

    def summarise(self, log: TrainLog) -> dict[str, Any]:
        """What ``run.json`` is to say of the training beside what it says of any."""
        ...


def plain_settings(settings: TrainSettings, splits: SplitSettings, hardware: Hardware) -> dict[str, Any]:
    """What decides the result: device and precision as chosen, and not the number of threads that load."""
    plain = asdict(settings) | {"device": str(hardware.device), "precision": str(hardware.precision)}
    del plain["workers"]
    return plain | {"splits": asdict(splits)}


def split_cohort(training: TrainingSet, splits: SplitSettings) -> tuple[Fold, ...]:
    """The folds of a cohort by its settings."""
    roster = training.roster
    sites = [site or "" for site in roster.column("site")] if splits.by_site else None
    given = roster.column(splits.column) if splits.kind == "column" else None
    patients = [row.patient for row in roster]
    return split_patients(training.labels.tolist(), patients, splits, sites, given, training.classes)


class FoldsRun:
    """The folds of a run, one after the other.

    Args:
        run: its folder, held by the caller.
        record: what ``run.json`` says.
        training: the cohort.
        folds: its parts.
        trainer: trains one of them.
        epochs: of a fold, at most.
        check: called before anything is written; raises where the folder's lease was lost.
    """

    def __init__(
        self,
        run: RunFolder,
        record: RunRecord,
        training: TrainingSet,
        folds: Sequence[Fold],
        trainer: FoldTrainer,
        epochs: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.record, self.training, self.folds = run, record, training, folds
        self.trainer, self.epochs, self._check_lease = trainer, epochs, check
        self.log = TrainLog(run.log_file)
        self.validation = read_predictions(run.validation_file, training, [fold.validation for fold in folds])
        self.test = read_predictions(run.predictions_file, training, [fold.test for fold in folds])

    def train(self, progress: TrainProgress | None) -> TrainReport:
        """Every fold that is not done yet; ``complete`` is set last, and taken back while a lost fold is made again."""
        warnings = list(self.training.warnings)
        for number, fold in enumerate(self.folds):
            warnings += fold_warnings(fold, number)
        for warning in warnings:
            _log.warning("%s", warning)
        if progress:
            progress.run_started(len(self.folds), self.epochs)
        summaries = []
        for number in range(len(self.folds)):
            resumed = self._is_done(number)
            if not resumed:
                self._reopen()
                self._fit(number, progress)
            summaries.append(self._summarise(number))
            if progress:
                progress.fold_finished(summaries[-1], resumed)
        if not self.record.complete:
            summary = {
                "seconds": sum(one.seconds for one in summaries),
                "folds": [asdict(one) for one in summaries],
                "warnings": warnings,
                DIGESTS: self.run.digests(),
                **self.trainer.summarise(self.log),
            }
            self.record = replace(self.record, complete=True, summary=summary)
            self._check_lease()
            self.run.write_record(self.record)
        return TrainReport(self.run.path, self.record, tuple(summaries), tuple(warnings))

    def _reopen(self) -> None:
        """A run that was finished is so no longer: its summary and digests are of a fold that is trained again."""
        if self.record.complete:
            self._check_lease()
            self.record = replace(self.record, complete=False, summary={})
            self.run.write_record(self.record)

    def _is_done(self, number: int) -> bool:
        """Whether a fold has its head and its predictions, and nothing is left to go on from."""
        there = number in self.validation and number in self.test
        return there and self.run.head_file(number).exists() and not self.run.state_file(number).exists()

    def _fit(self, number: int, progress: TrainProgress | None) -> None:
        """Train a fold, or go on with it; then write its head and predictions, and last remove its state."""
        fold = self.folds[number]

        def told(record: EpochRecord) -> None:
            self._check_lease()
            self.log.add({"fold": number, **asdict(record)})
            if progress:
                progress.epoch_finished(number, record.epoch, record.train_loss, record.validation_loss)

        if progress:
            progress.fold_started(number, len(fold.train))
        fitted = self.trainer.fit(number, self.run.state_file(number), told)
        self._check_lease()
        self._write_head(number, fitted)
        self.validation[number], self.test[number] = fitted.validation, fitted.test
        self._write_table(self.run.validation_file, [one.validation for one in self.folds], self.validation)
        self._write_table(self.run.predictions_file, [one.test for one in self.folds], self.test)
        try:
            self.run.state_file(number).unlink(missing_ok=True)
        except OSError as error:
            raise ModelError(f"cannot remove {self.run.state_file(number)}: {error.strerror or error}") from error

    def _write_table(self, path: Path, places: Sequence[Sequence[int]], found: Probabilities) -> None:
        write_predictions(path, self.training, places, found)

    def _write_head(self, number: int, fitted: FittedFold) -> None:
        fold, standing = self.folds[number], fitted.standing
        card = {
            "features": asdict(self.record.features),
            "classes": list(self.record.classes),
            "label": self.record.label,
            "fold": number,
            "calibration": _calibrate(fitted.validation, self.training.labels[list(fold.validation)]),
            "training": {
                "epochs": standing.epochs,
                "best_epoch": standing.best_epoch,
                "validation_loss": standing.best_loss,
                "slides": {"train": len(fold.train), "validation": len(fold.validation), "test": len(fold.test)},
                "settings": self.record.settings,
            },
            "engine_version": __version__,
        }
        path = self.run.head_file(number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.trainer.save(fitted, path.parent, card)
        except (OSError, HeadError, PromptError) as error:
            raise ModelError(f"cannot write {path}: {error}") from error

    def _summarise(self, number: int) -> FoldSummary:
        """A fold that is done in numbers, from its head's card."""
        path, fold = self.run.head_file(number), self.folds[number]
        try:
            card = read_head_card(path)
            training, calibration = card["training"], card["calibration"]
            return FoldSummary(
                fold=number,
                epochs=training["epochs"],
                best_epoch=training["best_epoch"],
                validation_loss=training["validation_loss"],
                auroc=_held_out_auroc(self.training.labels[list(fold.test)], self.test[number]),
                temperature=calibration["temperature"],
                threshold=calibration["threshold"],
                train=len(fold.train),
                validation=len(fold.validation),
                test=len(fold.test),
                seconds=self.log.seconds(number),
            )
        except (HeadError, KeyError, TypeError) as error:
            raise ModelError(
                f"{path} cannot be read ({error}): delete {path.parent} to train that fold again"
            ) from error


def _calibrate(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float | None]:
    """Temperature and, for two classes, Youden's threshold of the calibrated probability of class 1."""
    if not len(labels):
        return {"temperature": 1.0, "threshold": None}
    logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    temperature = fit_temperature(logits, labels)
    threshold = None
    if probabilities.shape[1] == 2 and len(np.unique(labels)) == 2:
        threshold = youden_threshold(labels, apply_temperature(logits, temperature)[:, 1])
    return {"temperature": temperature, "threshold": threshold}


def _held_out_auroc(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float | None:
    """None where the slides are of one class, or there are none."""
    if len(np.unique(labels)) < 2:
        return None
    return auroc(labels, probabilities)
