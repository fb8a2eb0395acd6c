"""Training of scale attention: from images and slides without labels to a network that attends to nuclei.

Source: M. Sahasrabudhe et al., "Self-supervised nuclei segmentation in histopathological images using attention",
MICCAI 2020. A crop of random place among those on tissue stands for the paper's random crop of a tissue tile. Epochs
before the paper's, in which the stain teaches, are the engine's own and off by default.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from wsi_engine.encoders.deep import choose_device
from wsi_engine.encoders.precision import Precision, choose_precision
from wsi_engine.memory import keep_freed_memory
from wsi_engine.models.scale_attention import SCALES_MPP, normalise_pixels
from wsi_engine.models.scale_files import save_scale_attention
from wsi_engine.nuclei.samples import CropSampler, Source, list_pictures, open_sampler
from wsi_engine.nuclei.scale_batches import CropBatch, CropFeed
from wsi_engine.nuclei.scale_classifier import create_classifier
from wsi_engine.nuclei.scale_folder import ScaleFolder, Standing
from wsi_engine.nuclei.scale_scores import list_labelled, score_labelled
from wsi_engine.nuclei.scale_settings import ScaleTrainingSettings
from wsi_engine.nuclei.scale_sheet import draw_attention_sheet
from wsi_engine.nuclei.scale_steps import ScaleTrainer
from wsi_engine.picture import save_picture
from wsi_engine.training.hardware import Hardware
from wsi_engine.version import __version__
from wsi_engine.workers import usable_cores

_SCALE_NAMES = ("40x", "20x", "10x")


class ScaleProgress(Protocol):
    """What a display is told."""

    def training_started(self, epochs: int, batches: int, done: int) -> None:
        """So many epochs of so many batches; ``done`` batches were done before."""

    def batch_done(self, terms: dict[str, float]) -> None:
        """One more batch; terms of its loss by name."""

    def epoch_done(self, entry: dict[str, Any]) -> None:
        """One more epoch; its line of the log."""


@dataclass(frozen=True)
class ScaleTrainingReport:
    """What came out of a training.

    Attributes:
        out: its folder.
        model: the network's file.
        pictures: how many gave crops; 0 where the training was complete before.
        history: a mapping per epoch, as in ``log.jsonl``.
        seconds: that this call took.
        already_complete: nothing was left to do.
    """

    out: Path
    model: Path
    pictures: int
    history: list[dict[str, Any]]
    seconds: float
    already_complete: bool = False

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self) | {"out": str(self.out), "model": str(self.model)}


@dataclass(eq=False)
class _Run:
    """A training in progress."""

    settings: ScaleTrainingSettings
    folder: ScaleFolder
    trainer: ScaleTrainer
    feed: CropFeed
    labelled: list[tuple[Path, Path]]
    progress: ScaleProgress | None
    standing: Standing = field(default_factory=Standing)
    epoch_began: float = field(default_factory=time.monotonic)


def train_scale_attention(
    images_or_slides: Iterable[Source],
    out: str | os.PathLike[str],
    settings: ScaleTrainingSettings | None = None,
    progress: ScaleProgress | None = None,
    report_on: str | os.PathLike[str] | None = None,
) -> ScaleTrainingReport:
    """Train scale attention on slides and images; no label is read.

    Safe to kill: the same call goes on from the last checkpoint, to the same bytes as without the kill on the same
    hardware. All slides stay open, and plain pictures in memory, while it runs.

    Args:
        images_or_slides: paths of slides, images, folders or CSVs, or arrays uint8 (H, W, 3).
        out: the folder to write, of this training alone.
        settings: how; the paper's where not given.
        progress: is told how far it is.
        report_on: folder of labelled images (``NAME.png`` and ``NAME_label.png``) on which AJI and Dice are reported
            after each epoch; it changes nothing in the training.

    Raises:
        InputError: no picture can give crops: too small, without tissue, too coarse; or ``report_on`` has no labels.
        ScaleError: the scale of a slide is not known.
        SlideError: a picture cannot be read.
        WeightsError: the first weights of the classifier cannot be had.
        EncoderError: there is no such device, or it cannot compute in the precision asked for.
        ModelError: ``out`` belongs to another training or cannot be written, or the training diverged.
    """
    began = time.monotonic()
    settings = settings or ScaleTrainingSettings()
    labelled = list_labelled(Path(report_on)) if report_on is not None else []
    hardware = _choose_hardware(settings)
    pictures = list_pictures(images_or_slides, settings.slide_mpp)
    sampler = open_sampler(pictures, SCALES_MPP, settings.crop_px, settings.min_tissue, settings.image_mpp)
    try:
        folder = ScaleFolder(Path(out), _identify(sampler, settings, hardware))
        if folder.open():
            return ScaleTrainingReport(
                folder.path, folder.model_file, 0, folder.read_log(), time.monotonic() - began, already_complete=True
            )
        classifier = create_classifier(settings.classifier_weights, settings.seed)
        with hardware.repeatable(), CropFeed(sampler, settings) as feed:
            trainer = ScaleTrainer.create(classifier, settings, hardware)
            run = _Run(settings, folder, trainer, feed, labelled, progress)
            _train(run)
    finally:
        sampler.close()
    return ScaleTrainingReport(
        folder.path, folder.model_file, len(sampler.sources), run.standing.history, time.monotonic() - began
    )


def _choose_hardware(settings: ScaleTrainingSettings) -> Hardware:
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    return Hardware(device, Precision(choose_precision(settings.precision, device).type))


def _identify(sampler: CropSampler, settings: ScaleTrainingSettings, hardware: Hardware) -> dict[str, Any]:
    """What the result follows from; a folder belongs to one such training."""
    slides = [{"fingerprint": crops.slide.fingerprint, "mpp": list(crops.slide.mpp)} for crops in sampler.sources]
    return {"settings": settings.recipe() | {"precision": str(hardware.precision)}, "pictures": slides}


def _train(run: _Run) -> None:
    """All batches that are left, with a checkpoint now and then, and the end of each epoch."""
    settings, found = run.settings, run.folder.read_state()
    if found is not None:
        run.standing = found[0]
        run.trainer.restore(found[1])
        run.folder.write_log(run.standing.history)
    if run.progress:
        run.progress.training_started(settings.epochs, settings.batches, run.standing.step)
    sheet = run.feed.sheet()
    for batch in run.feed.batches(run.standing.step, settings.steps):
        terms = run.trainer.step(batch)
        run.standing.step += 1
        for name, value in terms.items():
            run.standing.sums[name] = run.standing.sums.get(name, 0.0) + value
        if run.progress:
            run.progress.batch_done(terms)
        ends_epoch = run.standing.step % settings.batches == 0
        if ends_epoch:
            _end_epoch(run, sheet)
        if ends_epoch or run.standing.step % settings.checkpoint_batches == 0:
            run.folder.write_state(run.standing, run.trainer.tensors())
    run.folder.finish()


def _end_epoch(run: _Run, sheet: CropBatch) -> None:
    """Write network, sheet and log of an epoch."""
    standing, settings = run.standing, run.settings
    epoch = standing.step // settings.batches
    network = run.trainer.network.eval()
    entry: dict[str, Any] = {"epoch": epoch}
    entry |= {name: total / settings.batches for name, total in standing.sums.items()}
    entry["running_tau"] = float(network.tau)
    with run.trainer.hardware.arithmetic():
        if run.labelled:
            scores = score_labelled(network, run.labelled, settings.views, run.feed.reference)
            entry |= {"report_images": scores.images, "report_aji": scores.aji, "report_dice": scores.dice}
        attention = _attend_sheet(run, sheet)
    entry["seconds"] = round(time.monotonic() - run.epoch_began, 3)
    run.epoch_began = time.monotonic()
    title = f"epoch {epoch}: scale accuracy {entry['accuracy']:.2f}, loss {entry['loss']:.3f}"
    title += f", stain {entry['stain']:.3f}" if "stain" in entry else ""
    picture = draw_attention_sheet(sheet.pixels, attention, sheet.scales, _SCALE_NAMES, title)
    save_picture(picture, run.folder.sheet_file(epoch))
    with run.folder.explain():
        save_scale_attention(network, run.folder.model_file, _card(run, epoch))
    standing.sums = {}
    standing.history.append(entry)
    run.folder.write_log(standing.history)
    if run.progress:
        run.progress.epoch_done(entry)


def _attend_sheet(run: _Run, sheet: CropBatch) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Attention of the sheet's crops as it is used later: float32 (B, S, S)."""
    with torch.inference_mode():
        images = normalise_pixels(torch.from_numpy(sheet.pixels).to(run.trainer.hardware.device))
        return run.trainer.network.attend(images)[:, 0].cpu().numpy()


def _card(run: _Run, epoch: int) -> dict[str, Any]:
    """What is kept with the network: how it was made. Without times, so that equal networks are equal files."""
    reference = run.feed.reference
    return {
        "engine_version": __version__,
        "epoch": epoch,
        "training": run.folder.identity,
        "normalisation": None if reference is None else asdict(reference),
    }
