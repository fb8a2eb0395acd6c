"""The second half of ``wsi demo``: a small synthetic cohort is trained on, and unseen slides are classified."""

from __future__ import annotations

import csv
from pathlib import Path

import typer

from wsi_engine.cli import console

SLIDES = 24
"""Slides that the demo trains on; two more are left to classify."""

SIDE = 2048


def demo_cohort(out: Path) -> None:
    """Draw a cohort, train attention pooling on it, and classify two slides that it has not seen, with heatmaps."""
    folder = out / "cohort"
    console.out.print(f"\n[bold]Drawing {SLIDES + 2} small slides, half of them with a tumour region[/]")
    cohort, unseen = _draw(folder)
    features = folder / "features"
    console.out.print("\n[bold]Features of all of them (wsi extract --encoder texture)[/]")
    _extract(folder / "all.csv", features)
    console.out.print("\n[bold]Training on slide labels alone (wsi train abmil), in three folds by patient[/]")
    _train(cohort, features, folder / "run")
    console.out.print("\n[bold]Two slides that the model has not seen (wsi classify)[/]")
    _classify(unseen, features, folder / "run", folder / "predictions")


def next_commands(out: Path) -> tuple[str, ...]:
    """Commands that go on from what this made."""
    folder = out / "cohort"
    return (
        f"wsi evaluate {folder}/run",
        f"wsi train clam {folder}/cohort.csv --features {folder}/features --label label --standardise -o {folder}/clam",
    )


def _draw(folder: Path) -> tuple[Path, list[str]]:
    """The cohort's CSV, without the last two slides, and the paths of those."""
    from wsi_engine.synthetic_cohort import CohortSpec, write_cohort  # noqa: PLC0415

    spec = CohortSpec(slides=SLIDES + 2, side_px=SIDE, tumour_share=(0.1, 0.2), seed=1)
    everything = write_cohort(folder, spec)
    with open(everything, newline="", encoding="utf-8") as stream:
        header, *rows = list(csv.reader(stream))
    for name, some in (("all.csv", rows), ("cohort.csv", rows[:SLIDES])):
        with open(folder / name, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([header, *some])
    console.out.print(f"{folder / 'cohort.csv'}: {SLIDES} slides with labels", markup=False)
    return folder / "cohort.csv", [str(folder / row[0]) for row in rows[SLIDES:]]


def _extract(table: Path, features: Path) -> None:
    from wsi_engine.extraction import extract  # noqa: PLC0415

    report = extract(table, features, "texture")
    if report.failed:
        raise typer.Exit(console.EXIT_FAILED)
    console.out.print(f"{report.tiles} tiles in {report.wall_seconds:.0f} s")


def _train(cohort: Path, features: Path, run: Path) -> None:
    from wsi_engine.cohorts.splits import SplitSettings  # noqa: PLC0415
    from wsi_engine.evaluation import evaluate_run  # noqa: PLC0415
    from wsi_engine.training import TrainSettings, train_head  # noqa: PLC0415

    report = train_head(
        cohort, features, "label", run, head="abmil", options={"standardise": True},
        splits=SplitSettings(folds=3), settings=TrainSettings(epochs=30, least_epochs=10, patience=10),
    )  # fmt: skip
    seconds = sum(fold.seconds for fold in report.folds)
    auroc = evaluate_run(run).figures["auroc"]
    console.out.print(
        f"held-out AUROC {auroc.value:.2f} (95 % interval {auroc.low:.2f}–{auroc.high:.2f}), "
        f"{seconds:.0f} s for {len(report.folds)} folds"
    )


def _classify(slides: list[str], features: Path, run: Path, out: Path) -> None:
    from wsi_engine.classification.slides import classify  # noqa: PLC0415

    report = classify(slides, run, out, features=features)
    for result in report.results:
        if result.status == "failed":
            console.print_error(f"{result.slide_id}: {result.message}")
            continue
        chance = max(result.probabilities.values())
        line = f"{result.slide_id}: {result.prediction} (probability {chance:.2f}); heatmap: {result.files['heatmap']}"
        console.out.print(line, markup=False)
    if report.failed:
        raise typer.Exit(console.EXIT_FAILED)
