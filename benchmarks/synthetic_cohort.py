"""Does a head learn from slide labels what decides them, and does its attention show where? On slides with known truth.

    python -m benchmarks.synthetic_cohort FOLDER [--slides 48] [--heads clam_sb,abmil,mean]

Writes a cohort of synthetic slides into FOLDER (about 50 s), half of them with a tumour region of 2-10 % of the tissue,
extracts the built-in texture features, trains each head in five folds by patient, and reports, on held-out patients
alone: AUROC of the slides with its 95 % interval, and AUROC of the tiles of tumour slides by attention against the
truth (a tile is tumour where at least half of it is). What is in FOLDER already is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks._common import describe_machine
from wsi_engine.cohorts.splits import SplitSettings
from wsi_engine.evaluation import evaluate_run
from wsi_engine.extraction import extract
from wsi_engine.metrics import auroc
from wsi_engine.runs import RunFolder
from wsi_engine.store import FeatureStore
from wsi_engine.synthetic_cohort import TUMOUR, CohortSlide, CohortSpec, lay_cohort, tumour_of_tiles, write_cohort
from wsi_engine.training import TrainSettings, train_head

TUMOUR_TILE = 0.5
"""Least share of a tile that makes it a tumour tile."""

SETTINGS = TrainSettings(epochs=60, least_epochs=20)
OPTIONS = {
    "clam_sb": {"standardise": True},
    "abmil": {"standardise": True},
    "dsmil": {"standardise": True},
    "mean": {"standardise": True, "hidden": (512,)},
}


def attention_auroc(run: RunFolder, features: Path, cohort: tuple[CohortSlide, ...]) -> list[float]:
    """For each tumour slide, by the head that was not trained on it, AUROC of attention against the truth of tiles."""
    from wsi_engine.classification.ensemble import load_ensemble  # noqa: PLC0415 - loads torch
    from wsi_engine.predictions import PredictionTable  # noqa: PLC0415

    held_out = PredictionTable.read(run.predictions_file)
    fold_of = dict(zip(held_out.slide_ids, held_out.folds.tolist(), strict=True))
    heads = {number: load_ensemble(run.head_file(number)) for number in set(fold_of.values())}
    found = []
    for slide in cohort:
        if slide.label != TUMOUR:
            continue
        store = FeatureStore.open(features / f"{slide.slide_id}.zarr")
        truth = (tumour_of_tiles(slide.spec, store.grid()) >= TUMOUR_TILE).astype(np.int64)
        if truth.any():
            attention = heads[fold_of[slide.slide_id]].predict(store.features()).attention
            found.append(auroc(truth, attention[:, -1].astype(np.float64)))  # the last map is of class "tumour"
    return found


def main() -> None:
    """Print a row for each head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slides", type=int, default=48)
    parser.add_argument("--heads", default="clam_sb,abmil,dsmil,mean")
    given = parser.parse_args()
    spec = CohortSpec(slides=given.slides)
    cohort = lay_cohort(spec)
    table = write_cohort(given.folder, spec)
    features = given.folder / "features"
    report = extract(table, features, "texture")
    print(describe_machine())
    tumours = sum(slide.label == TUMOUR for slide in cohort)
    print(f"{len(cohort)} slides, {tumours} with a tumour; {len(report.failed)} without features\n")
    print("| head | AUROC of slides (95 % interval) | AUROC of tiles: median | least | slides |\n|---|---|---|---|---|")
    for head in given.heads.split(","):
        run = RunFolder(given.folder / f"run-{head}")
        train_head(
            table, features, "label", run.path, head=head, options=OPTIONS[head],
            splits=SplitSettings(folds=5), settings=SETTINGS,
        )  # fmt: skip
        figure = evaluate_run(run.path).figures["auroc"]
        tiles = attention_auroc(run, features, cohort) if head != "mean" else []
        shown = f"{np.median(tiles):.3f} | {min(tiles):.3f} | {len(tiles)}" if tiles else "– | – | –"
        print(f"| {head} | {figure.value:.3f} ({figure.low:.3f}–{figure.high:.3f}) | {shown} |", flush=True)


if __name__ == "__main__":
    main()
