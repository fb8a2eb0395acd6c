"""Prompts and a head trained on every fold of a cohort, from its slides, with the ways to compare them with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from wsi_engine.bags import StoredBags
from wsi_engine.cohorts.audit import TrainingSet, prepare_training_set
from wsi_engine.cohorts.roster import Roster, RosterSource
from wsi_engine.cohorts.splits import Fold, SplitSettings
from wsi_engine.encoders import create_encoder
from wsi_engine.encoders.base import Encoder
from wsi_engine.encoders.deep import DeepEncoder, choose_device
from wsi_engine.encoders.precision import Precision, choose_precision
from wsi_engine.errors import EncoderError, InputError
from wsi_engine.extraction import Progress, extract_sources
from wsi_engine.grid import GridSettings
from wsi_engine.jobs import ExtractSettings
from wsi_engine.runs import FeatureOrigin, RunFolder, RunRecord
from wsi_engine.tissue import TissueSettings
from wsi_engine.training.fold import typical_numbers
from wsi_engine.training.folder import begin_run, hold_run, render_splits
from wsi_engine.training.folds import FoldsRun, FoldTrainer, plain_settings, split_cohort
from wsi_engine.training.hardware import LEAST_NUMBERS, Hardware, choose_hardware
from wsi_engine.training.plan import HeadPlan
from wsi_engine.training.prompt_fold import PromptTask, build_tuned
from wsi_engine.training.prompt_settings import Mode, PromptSettings, Tuning
from wsi_engine.training.prompt_slides import SlideSet, prepare_slide_set
from wsi_engine.training.prompt_tiles import SlideTiles
from wsi_engine.training.prompt_trainers import FrozenTrainer, PromptTrainer
from wsi_engine.training.report import TrainProgress, TrainReport
from wsi_engine.version import __version__
from wsi_engine.workers import usable_cores

FEATURES = "features"
"""Folder in a run where the grids of its slides are, and, of the conventional mode, their features."""


def train_prompt(
    cohort: RosterSource,
    label: str,
    out: str | os.PathLike[str],
    *,
    encoder: str | Encoder = "vit_small_patch16_224",
    weights: str | None = None,
    head: str = "dsmil",
    options: Mapping[str, Any] | None = None,
    prompts: int = 1,
    deep: bool = False,
    mode: Mode = "prompt",
    tune_blocks: int | None = None,
    mpp: float = 0.5,
    tile_px: int | None = None,
    tissue: Literal["otsu"] | TissueSettings | None = "otsu",
    min_tissue: float = 0.25,
    slide_mpp: float | None = None,
    reader: str = "auto",
    splits: SplitSettings | None = None,
    settings: PromptSettings | None = None,
    progress: TrainProgress | None = None,
    extract_progress: Progress | None = None,
) -> TrainReport:
    """Train prompts in a frozen vision transformer, and a head on its features, by the labels of slides alone.

    One slide a time goes through the transformer, all of its tiles, with exact gradients in the memory of some tiles;
    gradients of ``bags_per_step`` slides make a step. Splits, choice of the best epoch, calibration, files of the run
    and resuming after a kill are those of :func:`~wsi_engine.training.run.train_head`; each fold has prompts of its
    own. ``run.json`` says under ``summary.tuning`` what learned, in how much memory and time.

    Args:
        cohort: a CSV, rows or a data frame with the column ``slide``, the labels, and, if wanted, ``slide_id``,
            ``patient``, ``mpp`` and others.
        label: column of the labels; its values, sorted, are the classes.
        out: folder of the run; grids are kept there, too.
        encoder: a vision transformer, by its name or loaded in fp32.
        weights: of a named encoder, as ``create_encoder`` takes them.
        head: as for :func:`~wsi_engine.training.run.train_head`.
        options: of the head.
        prompts: tokens at a layer.
        deep: give every layer its own.
        mode: ``prompt``; for comparison ``conventional`` (frozen features) or ``finetune``.
        tune_blocks: for ``finetune``, how many of the last blocks learn; None for all of the network.
        mpp: micrometres per tile pixel.
        tile_px: side of a tile in pixels; None for what the encoder sees, 224 where it takes any size.
        tissue: which tiles to keep: those on tissue (``otsu``, or settings of one's own), or all (None).
        min_tissue: least part of a tile that must be tissue, 0 to 1.
        slide_mpp: micrometres per level-0 pixel, for slides that have none of their own.
        reader: ``auto`` or one reader's name.
        splits: how to split; None takes five folds by patient.
        settings: how to train; None takes the defaults.
        progress: told how training goes.
        extract_progress: told how features are extracted, for ``conventional``.

    Raises:
        EncoderError: the encoder is unknown, or no transformer that can be prompted.
        InputError: the cohort cannot be trained on; the message lists everything that is wrong, slides that cannot be
            read among it.
        ModelError: the head cannot be built or trained, or the folder holds another run.
        BusyError: another process trains in the folder.
        SettingsError: a setting is out of range.

    Example:
        >>> train_prompt("cohort.csv", "subtype", "runs/p", encoder="vit_tiny_patch16_224")  # doctest: +SKIP
    """
    tuning = Tuning(mode, prompts, deep, tune_blocks)
    splits, settings = splits or SplitSettings(), settings or PromptSettings()
    loaded = _load_encoder(encoder, weights, tuning, settings)
    grid = GridSettings(mpp, tile_px or loaded.card.input_px or 224, None, min_tissue)
    size = ExtractSettings(grid, tissue, workers=settings.workers, reader=reader)
    roster, run = Roster.read(cohort), RunFolder(Path(out))
    plan = HeadPlan(head, loaded.card.dim, 2, dict(options or {}))
    plan.all_options()  # whatever is wrong with the head shows before slides are opened
    with hold_run(run) as lease:
        origin = _describe_features(loaded, size, _tuning_precision(loaded, settings))
        slides = prepare_slide_set(roster, run.path / FEATURES, label, origin, size, splits, slide_mpp)
        course = _Course(run, label, loaded, tuning, splits, settings, size, slides, plan, lease.check)
        if mode == "conventional":
            return course.train_frozen(progress, extract_progress)
        return course.train_tuned(origin, progress)


def _load_encoder(
    encoder: str | Encoder, weights: str | None, tuning: Tuning, settings: PromptSettings
) -> DeepEncoder:  # fmt: skip
    """The encoder: in fp32 where it is to be tuned, since autocast lowers it then; refused where it cannot be."""
    frozen = tuning.mode == "conventional"
    if isinstance(encoder, str):
        encoder = create_encoder(encoder, weights, settings.device, settings.precision if frozen else "fp32")
    if not isinstance(encoder, DeepEncoder):
        raise EncoderError(
            f"encoder {encoder.card.name} has no network to train with; choose one such as vit_small_patch16_224"
        )
    if not frozen and encoder.precision != "fp32":
        raise EncoderError(f"an encoder that is tuned is loaded in fp32, not {encoder.precision}; load it so")
    if not frozen:
        build_tuned(encoder, tuning, 0)  # what cannot be tuned so shows before a slide is opened
    return encoder


def _tuning_precision(encoder: DeepEncoder, settings: PromptSettings) -> Precision:
    """Arithmetic of the passes; ``auto`` lowers it on a GPU only."""
    if settings.precision == "auto" and encoder.device.type != "cuda":
        return Precision("fp32")
    return Precision(choose_precision(settings.precision, encoder.device).type)


def _describe_features(encoder: DeepEncoder, size: ExtractSettings, precision: Precision) -> FeatureOrigin:
    card, grid = encoder.card, size.grid
    return FeatureOrigin(
        card.name, card.dim, card.weights_digest, str(precision), grid.mpp, grid.tile_px, grid.step_px
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Course:
    """A run whose slides are laid out."""

    run: RunFolder
    label: str
    encoder: DeepEncoder
    tuning: Tuning
    splits: SplitSettings
    settings: PromptSettings
    size: ExtractSettings
    slides: SlideSet
    head: HeadPlan
    check: Callable[[], None]

    def train_tuned(self, origin: FeatureOrigin, progress: TrainProgress | None) -> TrainReport:
        """Prompts, or the encoder itself, fold by fold."""
        training, settings = self.slides.training, self.settings
        pixels = SlideTiles(
            self.slides.sources, self.slides.grids, self.size.reader, settings.workers, settings.keep_share
        )  # fmt: skip
        plan = replace(self.head, n_classes=len(training.classes))
        names = [row.slide_id for row in training.roster]
        hardware = self._choose_hardware(origin)
        task = PromptTask(pixels, training.labels, names, self.encoder, self.tuning, plan, settings, hardware)
        folds = split_cohort(training, self.splits)
        return self._train(training, folds, plan, origin, hardware, PromptTrainer(task, folds, origin), progress)

    def train_frozen(self, progress: TrainProgress | None, extract_progress: Progress | None) -> TrainReport:
        """The conventional way: features extracted once, then a head on them."""
        folder = self.run.path / FEATURES
        report = extract_sources(self.slides.sources, folder, self.encoder, self.size, extract_progress)
        if report.failed:
            first = report.failed[0]
            more = f", and {len(report.failed) - 1} more slides failed" if len(report.failed) > 1 else ""
            raise InputError(f"the features of {first.slide_id} could not be extracted{more}: {first.message}")
        training = prepare_training_set(
            self.slides.training.roster, folder, self.label, self.encoder.card.name, self.splits
        )  # fmt: skip
        training = replace(training, warnings=self.slides.training.warnings)
        plan = replace(self.head, n_classes=len(training.classes))
        bags = StoredBags(training.stores, training.origin.encoder)
        hardware = choose_hardware(self.settings, plan.name, typical_numbers(bags, range(len(bags))))
        folds = split_cohort(training, self.splits)
        trainer = FrozenTrainer(training, folds, plan, self.settings, hardware, bags, self.settings.least_rate, True)
        return self._train(training, folds, plan, training.origin, hardware, trainer, progress)

    def _train(
        self,
        training: TrainingSet,
        folds: Sequence[Fold],
        plan: HeadPlan,
        origin: FeatureOrigin,
        hardware: Hardware,
        trainer: FoldTrainer,
        progress: TrainProgress | None,
    ) -> TrainReport:
        settings = plain_settings(self.settings, self.splits, hardware) | asdict(self.tuning)
        laid = self.size.grid_json()
        settings |= {"tissue": laid["tissue"], "min_tissue": laid["min_tissue"]}
        del settings["keep_share"]
        record = RunRecord(
            label=self.label,
            classes=training.classes,
            head=plan.name,
            options=plan.all_options(),
            folds=len(folds),
            features=origin,
            settings=settings,
            engine_version=__version__,
        )
        record = begin_run(self.run, record, render_splits(training, folds))
        return FoldsRun(self.run, record, training, folds, trainer, self.settings.epochs, self.check).train(progress)

    def _choose_hardware(self, origin: FeatureOrigin) -> Hardware:
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
        return Hardware(device, Precision(origin.precision), threads)
