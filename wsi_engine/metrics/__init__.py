"""Metrics: how well nuclei are found and slides classified, with honest intervals. Each name loads on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_engine.metrics.calibration import (
        apply_temperature,
        decide,
        fit_temperature,
        sensitivity_threshold,
        youden_threshold,
    )
    from wsi_engine.metrics.classification import (
        accuracy,
        balanced_accuracy,
        classification_measures,
        cohen_kappa,
        confusion_matrix,
        f1_macro,
    )
    from wsi_engine.metrics.distances import directed_hausdorff, symmetric_hausdorff
    from wsi_engine.metrics.intervals import (
        BootstrapSettings,
        Difference,
        Interval,
        paired_bootstrap,
        patient_bootstrap,
    )
    from wsi_engine.metrics.nuclei import NucleiScores, aji, aji_plus, dice, dice2, panoptic_quality, score_nuclei
    from wsi_engine.metrics.overlap import Overlap, tabulate_overlap
    from wsi_engine.metrics.probabilities import (
        ReliabilityBins,
        brier_score,
        expected_calibration_error,
        negative_log_likelihood,
        reliability_bins,
    )
    from wsi_engine.metrics.ranking import auprc, auroc, precision_recall_curve, roc_curve

_NAMES = {
    "calibration": (
        "apply_temperature",
        "decide",
        "fit_temperature",
        "sensitivity_threshold",
        "youden_threshold",
    ),
    "classification": (
        "accuracy",
        "balanced_accuracy",
        "classification_measures",
        "cohen_kappa",
        "confusion_matrix",
        "f1_macro",
    ),
    "distances": ("directed_hausdorff", "symmetric_hausdorff"),
    "intervals": ("BootstrapSettings", "Difference", "Interval", "paired_bootstrap", "patient_bootstrap"),
    "nuclei": ("NucleiScores", "aji", "aji_plus", "dice", "dice2", "panoptic_quality", "score_nuclei"),
    "overlap": ("Overlap", "tabulate_overlap"),
    "probabilities": (
        "ReliabilityBins",
        "brier_score",
        "expected_calibration_error",
        "negative_log_likelihood",
        "reliability_bins",
    ),
    "ranking": ("auprc", "auroc", "precision_recall_curve", "roc_curve"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__all__ = [
    "BootstrapSettings",
    "Difference",
    "Interval",
    "NucleiScores",
    "Overlap",
    "ReliabilityBins",
    "accuracy",
    "aji",
    "aji_plus",
    "apply_temperature",
    "auprc",
    "auroc",
    "balanced_accuracy",
    "brier_score",
    "classification_measures",
    "cohen_kappa",
    "confusion_matrix",
    "decide",
    "dice",
    "dice2",
    "directed_hausdorff",
    "expected_calibration_error",
    "f1_macro",
    "fit_temperature",
    "negative_log_likelihood",
    "paired_bootstrap",
    "panoptic_quality",
    "patient_bootstrap",
    "precision_recall_curve",
    "reliability_bins",
    "roc_curve",
    "score_nuclei",
    "sensitivity_threshold",
    "symmetric_hausdorff",
    "tabulate_overlap",
    "youden_threshold",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wsi_engine.metrics' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"wsi_engine.metrics.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
