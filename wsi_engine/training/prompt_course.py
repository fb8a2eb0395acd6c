"""What a training of prompts was asked, and its way from slides to a finished run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from wsi_engine.bags import StoredBags
from wsi_engine.cohorts.audit import TrainingSet, prepare_training_set
from wsi_engine.cohorts.splits import Fold, SplitSettings
from wsi_engine.encoders.deep import DeepEncoder, choose_device
from wsi_engine.encoders.precision import Precision, choose_precision
from wsi_engine.errors import EncoderError, InputError
from wsi_engine.extraction import Progress, extract_sources
from wsi_engine.jobs import ExtractSettings
from wsi_engine.runs import FeatureOrigin, RunFolder, RunRecord
from wsi_engine.training.fold import typical_numbers
from wsi_engine.training.folder import begin_run, check_run, render_splits
from wsi_engine.training.folds import FoldsRun, FoldTrainer, plain_settings, split_cohort
from wsi_engine.training.hardware import LEAST_NUMBERS, Hardware, choose_hardware
from wsi_engine.training.plan import HeadPlan
from wsi_engine.training.prompt_fold import PromptTask
from wsi_engine.training.prompt_settings import PromptSettings, Tuning
from wsi_engine.training.prompt_slides import SlideSet
from wsi_engine.training.prompt_tiles import SlideTiles
from wsi_engine.training.prompt_trainers import FrozenTrainer, PromptTrainer
from wsi_engine.training.report import TrainProgress, TrainReport
from wsi_engine.version import __version__
from wsi_engine.workers import usable_cores

FEATURES = "features"
"""Folder in a run where the grids of its slides are, and, of the conventional mode, their features."""

_UNKNOWN_BEFORE = ("classes", "folds")
"""What a run's record says that no one knows before the cohort is looked at."""

_UNKNOWN_FROZEN = ("features precision", "setting precision")
"""The same of the conventional mode: what the stores say, and what follows from how large their bags are."""


@dataclass(frozen=True, eq=False)
class Course:
    """What was asked of a run.

    Attributes:
        run: its folder.
        label: the cohort's column that is learned.
        encoder: what is tuned, or makes the features.
        tuning: how.
        splits: how the cohort is split.
        settings: how head and encoder are trained.
        size: how grids are laid and slides read.
        head: the head; its number of classes is filled in when the cohort is known.
    """

    run: RunFolder
    label: str
    encoder: DeepEncoder
    tuning: Tuning
    splits: SplitSettings
    settings: PromptSettings
    size: ExtractSettings
    head: HeadPlan

    @property
    def frozen(self) -> bool:
        """Whether the encoder stays as it is."""
        return self.tuning.mode == "conventional"

    @cached_property
    def origin(self) -> FeatureOrigin:
        """What the features will be; the arithmetic is that of the passes, which ``auto`` lowers on a GPU only."""
        card, grid, wanted, device = self.encoder.card, self.size.grid, self.settings.precision, self.encoder.device
        exact = wanted == "auto" and device.type != "cuda"
        precision = "fp32" if exact else choose_precision(wanted, device).type
        return FeatureOrigin(
            card.name, card.dim, card.weights_digest, precision, grid.mpp, grid.tile_px, grid.step_px
        )  # fmt: skip

    def check_folder(self) -> None:
        """Refuse a folder that holds another run, by what is known before a slide is opened.

        Raises:
            ModelError: it does; the message says what differs.
            EncoderError: the encoder is not where it is to train.
        """
        hardware = choose_hardware(self.settings, self.head.name, 0) if self.frozen else self._choose_hardware()
        asked = self._describe((), 0, self.origin, hardware)
        check_run(self.run, asked, _UNKNOWN_BEFORE + (_UNKNOWN_FROZEN if self.frozen else ()))

    def train_tuned(self, slides: SlideSet, check: Callable[[], None], progress: TrainProgress | None) -> TrainReport:
        """Prompts, or the encoder itself, fold by fold; ``check`` raises where the folder's lease was lost."""
        training, settings = slides.training, self.settings
        pixels = SlideTiles(
            slides.sources, slides.grids, self.size.reader, settings.workers, settings.keep_share
        )  # fmt: skip
        plan = replace(self.head, n_classes=len(training.classes))
        names = [row.slide_id for row in training.roster]
        hardware = self._choose_hardware()
        task = PromptTask(pixels, training.labels, names, self.encoder, self.tuning, plan, settings, hardware)
        folds = split_cohort(training, self.splits)
        trainer = PromptTrainer(task, folds, self.origin)
        return self._train(training, folds, self.origin, hardware, trainer, check, progress)

    def train_frozen(
        self,
        slides: SlideSet,
        check: Callable[[], None],
        progress: TrainProgress | None,
        extract_progress: Progress | None,
    ) -> TrainReport:
        """The conventional way: features extracted once, then a head on them; ``check`` as in ``train_tuned``."""
        folder = self.run.path / FEATURES
        report = extract_sources(slides.sources, folder, self.encoder, self.size, extract_progress)
        if report.failed:
            first = report.failed[0]
            more = f", and {len(report.failed) - 1} more slides failed" if len(report.failed) > 1 else ""
            raise InputError(f"the features of {first.slide_id} could not be extracted{more}: {first.message}")
        training = prepare_training_set(
            slides.training.roster, folder, self.label, self.encoder.card.name, self.splits
        )  # fmt: skip
        training = replace(training, warnings=slides.training.warnings)
        plan = replace(self.head, n_classes=len(training.classes))
        bags = StoredBags(training.stores, training.origin.encoder)
        hardware = choose_hardware(self.settings, plan.name, typical_numbers(bags, range(len(bags))))
        folds = split_cohort(training, self.splits)
        trainer = FrozenTrainer(training, folds, plan, self.settings, hardware, bags, self.settings.least_rate, True)
        return self._train(training, folds, training.origin, hardware, trainer, check, progress)

    def _train(
        self,
        training: TrainingSet,
        folds: Sequence[Fold],
        origin: FeatureOrigin,
        hardware: Hardware,
        trainer: FoldTrainer,
        check: Callable[[], None],
        progress: TrainProgress | None,
    ) -> TrainReport:
        record = self._describe(training.classes, len(folds), origin, hardware)
        record = begin_run(self.run, record, render_splits(training, folds))
        return FoldsRun(self.run, record, training, folds, trainer, self.settings.epochs, check).train(progress)

    def _describe(
        self, classes: tuple[str, ...], folds: int, origin: FeatureOrigin, hardware: Hardware
    ) -> RunRecord:  # fmt: skip
        """What ``run.json`` says at the start."""
        settings = plain_settings(self.settings, self.splits, hardware) | asdict(self.tuning)
        laid = self.size.grid_json()
        settings |= {"tissue": laid["tissue"], "min_tissue": laid["min_tissue"]}
        del settings["keep_share"]
        return RunRecord(
            label=self.label,
            classes=classes,
            head=self.head.name,
            options=self.head.all_options(),  # whatever is wrong with the head shows here
            folds=folds,
            features=origin,
            settings=settings,
            engine_version=__version__,
        )

    def _choose_hardware(self) -> Hardware:
        """Device and precision of the passes; one thread where a chunk of tiles is too little to share."""
        device = self.encoder.device if self.settings.device == "auto" else choose_device(self.settings.device)
        if device != self.encoder.device:
            raise EncoderError(f"the encoder is on {self.encoder.device} and is to train on {device}; load it there")
        threads = None
        if device.type == "cpu":
            network: Any = self.encoder.backbone
            embedding = getattr(network.network, "patch_embed", None)
            numbers = self.settings.chunk * self.encoder.card.dim * getattr(embedding, "num_patches", 1)
            threads = min(torch.get_num_threads(), usable_cores()) if numbers >= LEAST_NUMBERS else 1
        return Hardware(device, Precision(self.origin.precision), threads)
