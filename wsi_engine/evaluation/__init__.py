"""Evaluation: how good a training run or a table of predictions is, how sure that is, and which of two is better."""

from __future__ import annotations

from wsi_engine.evaluation.cases import Calibration, Cases
from wsi_engine.evaluation.comparison import Comparison, compare_runs
from wsi_engine.evaluation.figures import Evaluation, FoldFigures, evaluate_run
from wsi_engine.evaluation.report import evaluation_folder, write_evaluation

__all__ = [
    "Calibration",
    "Cases",
    "Comparison",
    "Evaluation",
    "FoldFigures",
    "compare_runs",
    "evaluate_run",
    "evaluation_folder",
    "write_evaluation",
]
