"""``wsi train``: slide labels and features in, a head for each fold out."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from wsi_engine.cli import console
from wsi_engine.cli.parameters import Parameter, give_signature
from wsi_engine.cli.parameters import make_option as _option
from wsi_engine.cli.train_report import print_report

train_app = typer.Typer(
    name="train",
    help="Train a model: a head that tells slides apart by their labels, or a network that finds nuclei.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Split(StrEnum):
    """How slides are divided into folds."""

    kfold = "k-fold"
    monte_carlo = "monte-carlo"
    column = "column"


class Optimiser(StrEnum):
    """What takes the steps."""

    adam = "adam"
    adamw = "adamw"


class Schedule(StrEnum):
    """How the learning rate goes over the epochs."""

    cosine = "cosine"
    constant = "constant"


class Branches(StrEnum):
    """Attention maps of CLAM."""

    single = "single"
    multi = "multi"


class Size(StrEnum):
    """Widths of CLAM."""

    small = "small"
    big = "big"


_SPLITS, _TRAINING, _MACHINE = "Splits", "Training", "Machine"

INPUTS = (
    Parameter(
        "cohort",
        Annotated[
            Path,
            typer.Argument(
                metavar="COHORT.csv", help='CSV with "slide_id" or "slide", "patient" and labels.', show_default=False
            ),
        ],
    ),
    _option("features", str, ..., "Folder or URL of the feature stores, as wsi extract writes them.", "--features"),
    _option("label", str, ..., "Column of the labels; its values are the classes.", "--label"),
    _option("out", Path, ..., "Folder of the run; the same command again goes on with it.", "-o", "--out"),
    _option("encoder", str | None, None, "Whose features, where the stores hold several.", "--encoder"),
)

SHARED = (
    _option("split", Split, Split.kfold, "How slides are divided; always by patient.", "--split", panel=_SPLITS),
    _option("folds", int, 5, "Number of folds.", "--folds", panel=_SPLITS),
    _option(
        "validation", float, 0.15, "Share of patients that decides when to stop, 0-1.", "--validation", panel=_SPLITS
    ),
    _option("test", float, 0.2, "Share of patients held out, with --split monte-carlo.", "--test", panel=_SPLITS),
    _option(
        "by_site", bool, False, 'Keep the patients of a site (column "site") together.', "--by-site", panel=_SPLITS
    ),
    _option(
        "split_column", str, "split", "Column that says train, val or test, with --split column.", "--split-column",
        panel=_SPLITS,
    ),
    _option("seed", int, 0, "Same seed, same heads.", "--seed", panel=_TRAINING),
    _option("epochs", int, 200, "Most epochs of a fold.", "--epochs", panel=_TRAINING),
    _option("patience", int, 20, "Epochs without a better validation loss before a fold ends.", "--patience",
            panel=_TRAINING),
    _option("least_epochs", int, 50, "Epochs before which it does not end.", "--least-epochs", panel=_TRAINING),
    _option("learning_rate", float, 2e-4, "Learning rate of the first epoch.", "--learning-rate", panel=_TRAINING),
    _option("weight_decay", float, 1e-5, "Weight decay.", "--weight-decay", panel=_TRAINING),
    _option("optimiser", Optimiser, Optimiser.adam, "What takes the steps.", "--optimiser", panel=_TRAINING),
    _option("schedule", Schedule, Schedule.cosine, "Learning rate over the epochs.", "--schedule", panel=_TRAINING),
    _option(
        "balanced", bool, True, "Draw slides so that all classes are equally likely; or each slide once an epoch.",
        "--balanced/--each-once", panel=_TRAINING,
    ),
    _option("bags_per_step", int, 1, "Slides in one step.", "--bags-per-step", panel=_TRAINING),
    _option("max_tiles", int | None, None, "Most tiles of a slide in a step, drawn at random; all if not given.",
            "--max-tiles", panel=_TRAINING),
    _option("tile_dropout", float, 0.0, "Share of a slide's tiles left out at random, 0-1.", "--tile-dropout",
            panel=_TRAINING),
    _option("standardise", bool, False, "Turn features into standard scores of the training tiles.", "--standardise",
            panel=_TRAINING),
    _option("device", str, "auto", "auto, cpu, cuda, cuda:1.", "--device", panel=_MACHINE),
    _option("precision", str, "auto", "auto, fp32 or bf16.", "--precision", panel=_MACHINE),
    _option("workers", int, 2, "Threads that load features ahead.", "--workers", panel=_MACHINE),
    _option("as_json", bool, False, "Print one JSON document at the end.", "--json"),
)  # fmt: skip
"""What every head's command takes."""

_HEAD = "Head"


def _dropout(default: float) -> Parameter:
    return _option("dropout", float, default, "Share of units dropped in training, 0-1.", "--dropout", panel=_HEAD)


CLAM = (
    _option("branches", Branches, Branches.single, "One attention map, or one for each class.", "--branches",
            panel=_HEAD),
    _option("size", Size, Size.small, "Widths of its layers: small (512, 256) or big (512, 384).", "--size",
            panel=_HEAD),
    _option("ungated", bool, False, "Plain attention instead of gated.", "--ungated", panel=_HEAD),
    _option("subtyping", bool, False, "Classes exclude each other: other classes' instance classifiers learn too.",
            "--subtyping", panel=_HEAD),
    _option("k", int, 8, "Tiles taken from either end of the attention for the instance loss.", "--k", panel=_HEAD),
    _option("bag_weight", float, 0.7, "Share of the bag's loss; the rest is the instance loss's.", "--bag-weight",
            panel=_HEAD),
    _dropout(0.25),
)  # fmt: skip

ABMIL = (
    _option("hidden", list[int], [512], "Width of a layer before attention; give it again for another.", "--hidden",
            panel=_HEAD),
    _option("attention", int, 128, "Width of the attention network.", "--attention", panel=_HEAD),
    _option("ungated", bool, False, "Plain attention instead of gated.", "--ungated", panel=_HEAD),
    _dropout(0.25),
)  # fmt: skip

DSMIL = (
    _option("linear_queries", bool, False, "Queries from one linear layer, as in its first releases.",
            "--linear-queries", panel=_HEAD),
    _option("passing_v", bool, False, "Values from a layer instead of the features themselves.", "--passing-v",
            panel=_HEAD),
    _option("query", int, 128, "Width of the queries.", "--query", panel=_HEAD),
    _dropout(0.0),
)  # fmt: skip

TRANSMIL = (
    _option("dim", int, 512, "Numbers per token.", "--dim", panel=_HEAD),
    _option("heads", int, 8, "Attention heads.", "--heads", panel=_HEAD),
    _dropout(0.1),
)

MEAN = (
    _option("hidden", list[int], [], "Width of a layer before the mean; none makes it linear.", "--hidden",
            panel=_HEAD),
    _dropout(0.25),
)  # fmt: skip


def _clam_options(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    name = "clam_mb" if values.pop("branches") is Branches.multi else "clam_sb"
    return name, values | {"gated": not values.pop("ungated"), "size": values["size"].value}


def _abmil_options(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "abmil", values | {"gated": not values.pop("ungated")}


def _dsmil_options(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "dsmil", values | {"nonlinear": not values.pop("linear_queries")}


def _make_command(
    name: str,
    text: str,
    own: tuple[Parameter, ...],
    to_options: Callable[[dict[str, Any]], tuple[str, dict[str, Any]]],
) -> Callable[..., None]:
    """The command of one head: what all take, and what is its own, under one signature."""

    def run(**values: Any) -> None:
        head, options = to_options({one.name: values.pop(one.name) for one in own})
        options["standardise"] = values.pop("standardise")
        _train(head, options, **values)

    run.__name__ = name
    run.__doc__ = text
    return give_signature(run, [*INPUTS, *own, *SHARED])


_ENDING = """

Slides are split by patient, the head of least validation loss is kept, and the held-out slides are predicted once.
Safe to kill and to run again: finished folds are kept, one in progress goes on where it stopped.
"""

for _name, _text, _own, _to_options in (
    ("clam", "Train CLAM: attention pooling with instance classifiers (Lu et al. 2021).", CLAM, _clam_options),
    ("abmil", "Train attention pooling (Ilse et al. 2018).", ABMIL, _abmil_options),
    ("dsmil", "Train DSMIL: critical tiles and those like them (Li et al. 2021).", DSMIL, _dsmil_options),
    ("transmil", "Train TransMIL: a transformer over tiles (Shao et al. 2021).", TRANSMIL, lambda v: ("transmil", v)),
    ("mean", "Train the baseline: the mean of all tiles.", MEAN, lambda v: ("mean", v)),
):
    train_app.command(_name)(console.reporting(_make_command(_name, _text + _ENDING, _own, _to_options)))


def _train(
    head: str,
    options: dict[str, Any],
    *,
    cohort: Path,
    features: str,
    label: str,
    out: Path,
    encoder: str | None,
    as_json: bool,
    split: Split,
    folds: int,
    validation: float,
    test: float,
    by_site: bool,
    split_column: str,
    **training: Any,
) -> None:
    from wsi_engine.cohorts.splits import SplitSettings  # noqa: PLC0415 - loads only when it is needed
    from wsi_engine.training.settings import TrainSettings  # noqa: PLC0415

    splits = SplitSettings(split.value, folds, validation, test, by_site, split_column, training["seed"])
    plain: dict[str, Any] = {
        name: value.value if isinstance(value, StrEnum) else value for name, value in training.items()
    }
    settings = TrainSettings(**plain)
    from wsi_engine.cli.train_display import TrainDisplay  # noqa: PLC0415
    from wsi_engine.training import train_head  # noqa: PLC0415 - loads torch

    with TrainDisplay(console.err) as display:
        report = train_head(
            cohort, features, label, out,
            head=head, options=options, encoder=encoder, splits=splits, settings=settings, progress=display,
        )  # fmt: skip
    if as_json:
        console.print_json(report.to_json())
    else:
        print_report(report)
