"""``wsi train nuclei``: a network that finds nuclei, from slides and images without labels."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import TextColumn

from wsi_engine.cli import console
from wsi_engine.cli.display import BarDisplay, make_bar
from wsi_engine.errors import SettingsError

_PLAIN_SECONDS = 30.0
"""Least time between two plain lines within an epoch."""


class Normalisation(StrEnum):
    """How pictures are brought to one look."""

    none = "none"
    reinhard = "reinhard"
    macenko = "macenko"


def train_nuclei(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE|SLIDE|DIR|CSV...", help="Images and slides; no label is read."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of this training.", show_default=False)],
    image_mpp: Annotated[float, typer.Option(help="Micrometres per pixel of plain images that do not say.")] = 0.25,
    slide_mpp: Annotated[
        float | None,
        typer.Option(help="Micrometres per level-0 pixel, in place of what headers say.", show_default=False),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="First weights of the ResNet34: hub (ImageNet), random, random:SEED or a file.")
    ] = "hub",
    epochs: Annotated[int, typer.Option(help="Epochs.")] = 200,
    stain_epochs: Annotated[
        int, typer.Option(help="How many of them, the first, learn where the stain sees nuclei; 0 is the paper's.")
    ] = 0,
    batches: Annotated[int, typer.Option(help="Batches in an epoch.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Crops in a batch.")] = 32,
    crop_px: Annotated[int, typer.Option(help="Side of a crop in pixels, even.")] = 160,
    min_tissue: Annotated[float, typer.Option(help="Least part of a crop that must be tissue, 0-1.")] = 0.9,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 2e-4,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of Adam.")] = 1e-4,
    normalisation: Annotated[Normalisation, typer.Option(help="Bring pictures to one look.")] = Normalisation.none,
    stain_jitter: Annotated[float, typer.Option(help="Standard deviation of the stains' random factors.")] = 0.03,
    scale_equivariance: Annotated[
        bool, typer.Option("--scale-equivariance/--no-scale-equivariance", help="Use that term of the loss.")
    ] = True,
    share: Annotated[
        float, typer.Option(help="Part of the pixels that attention lies on; 0.07 is the paper's.")
    ] = 0.07,
    report_on: Annotated[
        Path | None,
        typer.Option(help="Folder of NAME.png with NAME_label.png to report AJI and Dice on.", show_default=False),
    ] = None,
    views: Annotated[int, typer.Option(help="Passes averaged in that report, 1-8.")] = 1,
    checkpoint_batches: Annotated[int, typer.Option(help="Batches between two checkpoints.")] = 25,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    workers: Annotated[int, typer.Option(help="Threads that read crops.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document at the end.")] = False,
) -> None:
    """Train scale attention: a network that learns to attend to nuclei by telling magnifications apart.

    Writes OUT/attention.safetensors, a log and a sheet of attention maps for each epoch. Safe to kill and to run again.
    """
    from wsi_engine.models.scale_attention import ScaleAttentionError, ScaleAttentionSettings  # noqa: PLC0415
    from wsi_engine.nuclei.scale_settings import ScaleTrainingSettings  # noqa: PLC0415 - torch loads only when needed
    from wsi_engine.nuclei.scale_training import train_scale_attention  # noqa: PLC0415

    try:
        network = ScaleAttentionSettings(share=share)
    except ScaleAttentionError as error:
        raise SettingsError(str(error)) from error
    settings = ScaleTrainingSettings(
        epochs=epochs, stain_epochs=stain_epochs, batches=batches, batch_size=batch_size, crop_px=crop_px,
        min_tissue=min_tissue, learning_rate=learning_rate, weight_decay=weight_decay,
        normalisation=normalisation.value, stain_jitter=stain_jitter,
        scale_equivariance=scale_equivariance, classifier_weights=weights, image_mpp=image_mpp, slide_mpp=slide_mpp,
        views=views, checkpoint_batches=checkpoint_batches, device=device, seed=seed, workers=workers,
        network=network, precision=precision,  # type: ignore[arg-type] # checked by the settings
    )  # fmt: skip
    with ScaleDisplay(console.err) as display:
        report = train_scale_attention(images, out, settings, display, report_on)
    if as_json:
        console.print_json(report.to_json())
        return
    if report.already_complete:
        console.out.print(f"{report.out} is complete already: {report.model}")
        return
    console.out.print(f"trained on {report.pictures} images in {report.seconds:.0f} s: {report.model}")


class ScaleDisplay(BarDisplay):
    """Shows a training on a console; a context manager and a
    :class:`~wsi_engine.nuclei.scale_training.ScaleProgress`.
    """

    def __init__(self, to: Console) -> None:
        super().__init__(to, make_bar(to, TextColumn("{task.fields[text]}"), TextColumn("batches")))
        self._task = self._bar.add_task("", total=None, text="opening images") if self._bar else None
        self._total = self._done = 0
        self._began = self._printed = time.monotonic()
        self._begun = 0

    def training_started(self, epochs: int, batches: int, done: int) -> None:
        """So many batches there are, and so many are done."""
        self._total, self._done, self._begun = epochs * batches, done, done
        self._began = self._printed = time.monotonic()
        if self._bar and self._task is not None:
            self._bar.update(self._task, total=self._total, completed=done, text="training")
            return
        resumed = f", {done} done before" if done else ""
        self._console.print(f"{epochs} epochs of {batches} batches{resumed}")

    def batch_done(self, terms: dict[str, float]) -> None:
        """One more batch."""
        self._done += 1
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=1, text=f"loss {terms['loss']:.3f}")
        elif time.monotonic() - self._printed >= _PLAIN_SECONDS:
            self._printed = time.monotonic()
            each = (self._printed - self._began) / (self._done - self._begun)
            left = each * (self._total - self._done)
            self._console.print(
                f"{self._done}/{self._total} batches, {each:.2f} s each, {left:.0f} s left, loss {terms['loss']:.3f}"
            )

    def epoch_done(self, entry: dict[str, Any]) -> None:
        """One more epoch."""
        line = f"epoch {entry['epoch']}: loss {entry['loss']:.3f}, scale accuracy {entry['accuracy']:.2f}"
        line += f", stain {entry['stain']:.3f}" if "stain" in entry else ""
        if "report_aji" in entry:
            line += f", AJI {entry['report_aji']:.3f}, Dice {entry['report_dice']:.3f}"
        self._console.print(f"{line} ({entry['seconds']:.0f} s)")
