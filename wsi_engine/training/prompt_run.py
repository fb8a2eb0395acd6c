"""Prompts and a head trained on every fold of a cohort, from its slides, with the ways to compare them with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from wsi_engine.cohorts.roster import Roster, RosterSource
from wsi_engine.cohorts.splits import SplitSettings
from wsi_engine.encoders import create_encoder
from wsi_engine.encoders.base import Encoder
from wsi_engine.encoders.deep import DeepEncoder
from wsi_engine.errors import EncoderError
from wsi_engine.extraction import Progress
from wsi_engine.grid import GridSettings
from wsi_engine.jobs import ExtractSettings
from wsi_engine.runs import RunFolder
from wsi_engine.tissue import TissueSettings
from wsi_engine.training.folder import hold_run
from wsi_engine.training.plan import HeadPlan
from wsi_engine.training.prompt_course import FEATURES, Course
from wsi_engine.training.prompt_fold import build_tuned
from wsi_engine.training.prompt_settings import Mode, PromptSettings, Tuning
from wsi_engine.training.prompt_slides import prepare_slide_set
from wsi_engine.training.report import TrainProgress, TrainReport


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
    plan = HeadPlan(head, loaded.card.dim, 2, dict(options or {}))
    plan.all_options()  # whatever is wrong with the head shows before anything is written
    roster = Roster.read(cohort)
    course = Course(RunFolder(Path(out)), label, loaded, tuning, splits, settings, size, plan)
    with hold_run(course.run) as lease:
        course.check_folder()
        slides = prepare_slide_set(
            roster, course.run.path / FEATURES, label, course.origin, size, splits, slide_mpp
        )  # fmt: skip
        if course.frozen:
            return course.train_frozen(slides, lease.check, progress, extract_progress)
        return course.train_tuned(slides, lease.check, progress)


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
