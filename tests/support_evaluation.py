"""Small training runs whose predictions are drawn, for the tests of evaluation; their heads only carry cards."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from wsi_engine.predictions import PredictionTable
from wsi_engine.runs import FeatureOrigin, RunFolder, RunRecord

TEMPERATURES, THRESHOLDS = np.array([2.0, 2.5, 3.0]), np.array([0.2, 0.5, 0.85])
"""Of the folds that :func:`write_run` writes."""

THREE = ("LUAD", "LUSC", "a | b_c, with a very long name that goes on (NOS)")

ORIGIN = FeatureOrigin("texture", 4, "0" * 64, "fp32", 0.5, 256, 256)


def draw_table(
    classes: tuple[str, ...] = ("normal", "tumour"), slides: int = 90, folds: int = 3, seed: int = 0, gain: float = 1.5
) -> PredictionTable:
    """Predictions that are too sure by far; patients of several slides, each of one class and in one fold."""
    count = len(classes)
    patients = np.random.default_rng(1).integers(0, slides // 2, slides)
    labels = patients % count
    logits = np.random.default_rng(seed).normal(size=(slides, count))
    logits[np.arange(slides), labels] += gain
    weights = np.exp(4 * logits)
    return PredictionTable(
        classes,
        tuple(f"s{row}" for row in range(slides)),
        tuple(f"p{patient}" for patient in patients),
        labels,
        patients // count % folds,
        weights / weights.sum(axis=1, keepdims=True),
    )


def write_run(
    path: Path,
    table: PredictionTable,
    temperatures: tuple[float, ...] = (2.0, 2.5, 3.0),
    thresholds: tuple[float | None, ...] = (0.2, 0.5, 0.85),
    complete: bool = True,
) -> Path:
    """A run folder as training leaves it."""
    from wsi_engine.models import create_head, save_head

    run, count = RunFolder(path), len(table.classes)
    record = RunRecord("subtype", table.classes, "mean", {}, len(temperatures), ORIGIN, {}, "0", complete)
    run.write_record(record)
    table.write(run.predictions_file)
    for fold in np.unique(table.folds).tolist():
        calibration = {"temperature": temperatures[fold], "threshold": thresholds[fold] if count == 2 else None}
        card = {"features": asdict(ORIGIN), "classes": list(table.classes), "fold": fold, "calibration": calibration}
        run.fold(fold).mkdir(exist_ok=True)
        save_head(create_head("mean", 4, count), run.head_file(fold), card)
    return path


def write_ensemble(path: Path, table: PredictionTable, entropy: np.ndarray, disagreement: np.ndarray) -> Path:
    """A table as wsi classify writes it."""
    names = ["slide_id", "prediction", *(f"prob_{name}" for name in table.classes), "entropy", "disagreement", "tiles"]
    lines = [",".join(names)]
    for row, slide in enumerate(table.slide_ids):
        shares = [repr(value) for value in table.probabilities[row].tolist()]
        doubts = [repr(float(entropy[row])), repr(float(disagreement[row]))]
        lines.append(",".join([slide, table.classes[table.predicted[row]], *shares, *doubts, "9"]))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_cohort(path: Path, table: PredictionTable, column: str = "grade") -> Path:
    """A cohort with the table's classes."""
    rows = zip(table.slide_ids, table.patients, table.labels, strict=True)
    lines = [f"{slide},{patient},{table.classes[label] if label >= 0 else ''}" for slide, patient, label in rows]
    path.write_text("\n".join([f"slide_id,patient,{column}", *lines]) + "\n")
    return path


def write_runs(folder: Path) -> Path:
    """Runs ``two`` and ``better`` of two classes and ``three`` of three; returns their folder."""
    write_run(folder / "two", draw_table())
    write_run(folder / "better", draw_table(seed=3, gain=3.0))
    write_run(folder / "three", draw_table(THREE))
    return folder


def soften(table: PredictionTable) -> np.ndarray:
    """p ** (1 / T), divided by the sum: what a temperature does, without logarithms."""
    powers = table.probabilities ** (1 / TEMPERATURES[table.folds])[:, None]
    return powers / powers.sum(axis=1, keepdims=True)
