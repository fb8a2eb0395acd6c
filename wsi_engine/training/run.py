"""A head trained on every fold of a cohort, kept in a folder, and gone on with after a kill."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_engine.bags import StoredBags
from wsi_engine.cohorts.audit import prepare_training_set
from wsi_engine.cohorts.splits import SplitSettings
from wsi_engine.models import save_head
from wsi_engine.runs import HEAD_NAME, RunFolder, RunRecord
from wsi_engine.training.fold import FittedFold, fit_fold, typical_numbers
from wsi_engine.training.folder import begin_run, hold_run, render_splits
from wsi_engine.training.folds import FoldsRun, plain_settings, split_cohort
from wsi_engine.training.hardware import Hardware, choose_hardware
from wsi_engine.training.log import TrainLog
from wsi_engine.training.plan import EpochRecord, HeadPlan
from wsi_engine.training.prompt_memory import MemoryWatch
from wsi_engine.training.report import TrainProgress, TrainReport
from wsi_engine.training.settings import TrainSettings
from wsi_engine.version import __version__

if TYPE_CHECKING:
    from wsi_engine.bags import BagSource
    from wsi_engine.cohorts.audit import TrainingSet
    from wsi_engine.cohorts.roster import RosterSource
    from wsi_engine.cohorts.splits import Fold


def train_head(
    cohort: RosterSource,
    features: str | os.PathLike[str],
    label: str,
    out: str | os.PathLike[str],
    *,
    head: str = "clam_sb",
    options: Mapping[str, Any] | None = None,
    encoder: str | None = None,
    splits: SplitSettings | None = None,
    settings: TrainSettings | None = None,
    progress: TrainProgress | None = None,
) -> TrainReport:
    """Train a head to tell slides apart by their labels alone: one head for each fold, and what it says of the others.

    The cohort is split by patient; everything wrong with it is found before training. In each fold the head of least
    bag loss on the validation slides is kept, a temperature and a threshold are fitted on the same slides, and the test
    slides are predicted once. :mod:`wsi_engine.runs` says which files that makes.

    Safe to kill and to call again: finished folds are kept, one in progress goes on where it stopped and ends in the
    same bytes as if nothing had happened.

    Args:
        cohort: a CSV, rows as mappings, or a data frame with a column ``slide`` or ``slide_id``, the labels, and, if
            wanted, ``patient`` and others.
        features: folder of the feature stores.
        label: column of the labels; its values, sorted, are the classes.
        out: folder of the run.
        head: ``clam_sb``, ``clam_mb``, ``abmil``, ``dsmil``, ``transmil`` or ``mean``.
        options: of the head, as ``create_head`` takes them.
        encoder: whose features, where stores hold several.
        splits: how to split; None takes five folds by patient.
        settings: how to train; None takes the defaults.
        progress: told how it goes.

    Raises:
        InputError: the cohort cannot be trained on; the message lists everything that is wrong.
        ModelError: the head cannot be built or trained, or the folder holds another run.
        BusyError: another process trains in the folder.
        SettingsError: a setting is out of range.

    Example:
        >>> report = train_head("cohort.csv", "features", "subtype", "runs/a", head="abmil")  # doctest: +SKIP
    """
    splits, settings = splits or SplitSettings(), settings or TrainSettings()
    training = prepare_training_set(cohort, features, label, encoder, splits)
    folds = split_cohort(training, splits)
    plan = HeadPlan(head, training.origin.dim, len(training.classes), dict(options or {}))
    bags = StoredBags(training.stores, training.origin.encoder)
    hardware = choose_hardware(settings, head, typical_numbers(bags, range(len(bags))))
    record = RunRecord(
        label=label,
        classes=training.classes,
        head=head,
        options=plan.all_options(),  # whatever is wrong with the head shows before anything is written
        folds=len(folds),
        features=training.origin,
        settings=plain_settings(settings, splits, hardware),
        engine_version=__version__,
    )
    run = RunFolder(Path(out))
    with hold_run(run) as lease:
        record = begin_run(run, record, render_splits(training, folds))
        trainer = HeadTrainer(training, folds, plan, settings, hardware, bags)
        return FoldsRun(run, record, training, folds, trainer, settings.epochs, lease.check).train(progress)


class HeadTrainer:
    """Trains heads on features; a :class:`~wsi_engine.training.folds.FoldTrainer`.

    ``least_rate`` and ``watched`` are for runs that are compared with tuned encoders: where a cosine schedule ends, and
    whether memory is measured.
    """

    def __init__(
        self,
        training: TrainingSet,
        folds: Sequence[Fold],
        plan: HeadPlan,
        settings: TrainSettings,
        hardware: Hardware,
        bags: BagSource,
        least_rate: float = 0.0,
        watched: bool = False,
    ) -> None:
        self.training, self.folds, self.plan, self.settings = training, folds, plan, settings
        self.hardware, self.bags, self.least_rate, self.watched = hardware, bags, least_rate, watched

    def fit(self, number: int, state_file: Path, told: Callable[[EpochRecord], None]) -> FittedFold:
        """Train a fold, or go on with it from its state file."""
        return fit_fold(
            self.bags,
            self.training.labels,
            self.folds[number],
            self.plan,
            self.settings,
            number=number,
            names=[row.slide_id for row in self.training.roster],
            hardware=self.hardware,
            state_file=state_file,
            told=told,
            least_rate=self.least_rate,
            watch=MemoryWatch(self.hardware.device) if self.watched else None,
        )

    def save(self, fitted: FittedFold, folder: Path, card: Mapping[str, Any]) -> None:
        """Write a fold's head."""
        save_head(fitted.head, folder / HEAD_NAME, card)

    def summarise(self, log: TrainLog) -> dict[str, Any]:
        """Nothing beside what is said of any training."""
        return {}
