"""``wsi train prompt``: slides and their labels in, prompts in a frozen transformer and a head for each fold out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi_engine.cli import console
from wsi_engine.cli.extract import Tissue
from wsi_engine.cli.parameters import Parameter, give_signature
from wsi_engine.cli.parameters import make_option as _option
from wsi_engine.cli.train import SHARED, Optimiser, Schedule
from wsi_engine.cli.train_report import print_report
from wsi_engine.training.prompt_settings import PromptSettings

if TYPE_CHECKING:
    from wsi_engine.training.report import TrainReport


class Mode(StrEnum):
    """What learns beside the head."""

    prompt = "prompt"
    conventional = "conventional"
    finetune = "finetune"


_TUNING, _TILES, _TRAINING, _MACHINE = "Tuning", "Tiles", "Training", "Machine"

INPUTS = (
    Parameter(
        "cohort",
        Annotated[
            Path,
            typer.Argument(
                metavar="COHORT.csv", help='CSV with "slide", labels and, if wanted, "slide_id", "patient", "mpp".',
                show_default=False,
            ),
        ],
    ),
    _option("label", str, ..., "Column of the labels; its values are the classes.", "--label"),
    _option("out", Path, ..., "Folder of the run; the same command again goes on with it.", "-o", "--out"),
    _option("encoder", str, "vit_small_patch16_224", "A vision transformer; wsi encoders lists them.", "--encoder"),
    _option("weights", str | None, None, "File (.safetensors, .pt) or random:SEED; else the published ones.",
            "--weights"),
    _option("head", str, "dsmil", "clam_sb, clam_mb, abmil, dsmil, transmil or mean.", "--head"),
)  # fmt: skip

OWN = (
    _option("mode", Mode, Mode.prompt, "Prompts, or for comparison frozen features or fine-tuning.", "--mode",
            panel=_TUNING),
    _option("prompts", int, 1, "Prompts at a layer.", "--prompts", panel=_TUNING),
    _option("deep", bool, False, "Give every layer prompts of its own.", "--deep", panel=_TUNING),
    _option("tune_blocks", int | None, None, "Last blocks that learn with --mode finetune; all if not given.",
            "--tune-blocks", panel=_TUNING),
    _option("mpp", float, 0.5, "Micrometres per tile pixel.", "--mpp", panel=_TILES),
    _option("tile_px", int | None, None, "Side of a tile in pixels; the encoder's own if not given.", "--tile-px",
            panel=_TILES),
    _option("tissue", Tissue, Tissue.otsu, "Keep tiles with tissue (otsu), or all (none).", "--tissue", panel=_TILES),
    _option("min_tissue", float, 0.25, "Least part of a tile that must be tissue, 0-1.", "--min-tissue", panel=_TILES),
    _option("slide_mpp", float | None, None, "Micrometres per level-0 pixel, where headers have none.", "--slide-mpp",
            panel=_TILES),
    _option("reader", str, "auto", "auto, turbo, openslide, tiffslide or image.", "--reader", panel=_TILES),
    _option("least_rate", float, 5e-6, "Learning rate that the cosine ends at.", "--least-rate", panel=_TRAINING),
    _option("augment", bool, False, "Turn and mirror each tile at random in every step.", "--augment",
            panel=_TRAINING),
    _option("chunk", int, 32, "Tiles that go through the encoder at a time.", "--chunk", panel=_MACHINE),
    _option("keep_share", float, 0.25, "Share of memory for tiles kept from epoch to epoch, 0-1.", "--keep-share",
            panel=_MACHINE),
    _option("workers", int | None, None, "Threads that decode slides; the usable cores if not given.", "--workers",
            panel=_MACHINE),
)  # fmt: skip

_KINDS = {"optimiser": Optimiser, "schedule": Schedule}


def _with_own_defaults(shared: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """The options of every head but those that are the command's own, with the defaults of prompts."""
    own = {one.name for one in OWN}
    known: dict[str, Any] = {field.name: field.default for field in fields(PromptSettings)}
    return tuple(
        replace(one, default=_KINDS.get(one.name, lambda value: value)(known[one.name])) if one.name in known else one
        for one in shared
        if one.name not in own
    )


PARAMETERS = (*INPUTS, *OWN, *_with_own_defaults(SHARED))


def train_prompt(**values: Any) -> None:
    """Train prompts in a frozen vision transformer, together with a head (Zhang et al. 2023).

    Tiles are streamed from the slides. Slides are split by patient, the best epoch by validation loss is kept, and
    the held-out slides are predicted once. Safe to kill and to run again.
    """
    _train(**values)


give_signature(train_prompt, PARAMETERS)


def _train(**values: Any) -> None:
    from wsi_engine.cohorts.splits import SplitSettings  # noqa: PLC0415 - loads only when it is needed

    plain: dict[str, Any] = {
        name: value.value if isinstance(value, StrEnum) else value for name, value in values.items()
    }
    as_json, standardise = plain.pop("as_json"), plain.pop("standardise")
    splits = SplitSettings(
        plain.pop("split"), plain.pop("folds"), plain.pop("validation"), plain.pop("test"), plain.pop("by_site"),
        plain.pop("split_column"), plain["seed"],
    )  # fmt: skip
    settings = PromptSettings(**{field.name: plain.pop(field.name) for field in fields(PromptSettings)})
    plain["tissue"] = None if plain["tissue"] == "none" else plain["tissue"]
    cohort, label, out = plain.pop("cohort"), plain.pop("label"), plain.pop("out")
    from wsi_engine.cli.progress import RunDisplay  # noqa: PLC0415
    from wsi_engine.cli.train_display import TrainDisplay  # noqa: PLC0415
    from wsi_engine.training.prompt_run import train_prompt as train  # noqa: PLC0415 - loads torch

    extracts = plain["mode"] == Mode.conventional.value
    with (
        RunDisplay(console.err) if extracts else nullcontext() as extracting,
        TrainDisplay(console.err, extracting) as display,
    ):
        report = train(
            cohort, label, out, options={"standardise": standardise}, splits=splits, settings=settings,
            progress=display, extract_progress=extracting, **plain,
        )  # fmt: skip
    if as_json:
        console.print_json(report.to_json() | {"tuning": report.record.summary.get("tuning")})
    else:
        print_report(report, _describe_cost(report))


def _describe_cost(report: TrainReport) -> str:
    """What learned, and what it took."""
    cost = report.record.summary.get("tuning", {})
    if not cost:
        return ""
    memory, seconds = cost["peak_memory_mb"], cost["seconds_per_epoch"]
    parts = [
        f"{cost['mode']}: {cost['encoder_parameters']:,} parameters of the encoder and {cost['head_parameters']:,} "
        "of the head learned",
        "memory not measured" if memory is None else f"{memory:,.0f} MiB at the peak",
        "" if seconds is None else f"{seconds:.2f} s an epoch",
    ]
    return ", ".join(filter(None, parts))
