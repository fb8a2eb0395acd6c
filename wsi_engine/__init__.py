"""wsi-engine: whole-slide images in, features out.

The names below load on first use, so that ``import wsi_engine`` stays light: torch, timm and Numba load only when
something needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_engine import errors, kernels, metrics, models, synthetic
    from wsi_engine.bags import ArrayBags, StoredBags, prefetch
    from wsi_engine.classification.ensemble import Ensemble, load_ensemble
    from wsi_engine.classification.explanation import ExplainSettings
    from wsi_engine.classification.outcomes import ClassifyReport
    from wsi_engine.classification.prediction import Prediction
    from wsi_engine.classification.slides import classify
    from wsi_engine.cohorts.audit import TrainingSet, prepare_training_set
    from wsi_engine.cohorts.roster import Roster
    from wsi_engine.cohorts.splits import Fold, SplitSettings, split_patients
    from wsi_engine.encoders import create_encoder, list_encoders
    from wsi_engine.encoders.base import Encoder, EncoderCard
    from wsi_engine.errors import WsiError
    from wsi_engine.evaluation import Comparison, Evaluation, compare_runs, evaluate_run, write_evaluation
    from wsi_engine.extraction import ExtractReport, extract
    from wsi_engine.grid import TileGrid, lay_grid
    from wsi_engine.integrity import CheckReport, check_stores
    from wsi_engine.nuclei.instances import InstanceSet
    from wsi_engine.nuclei.keeping import read_nuclei
    from wsi_engine.nuclei.segmentation import segment_nuclei
    from wsi_engine.nuclei.slides import segment_slides
    from wsi_engine.picture import draw_overview, save_picture
    from wsi_engine.predictions import PredictionTable
    from wsi_engine.slide import Slide, open_slide
    from wsi_engine.store import FeatureStore
    from wsi_engine.stream import TileBatch, stream_tiles
    from wsi_engine.studies.cohort import Cohort
    from wsi_engine.tissue import TissueMask, TissueSettings, detect_tissue
    from wsi_engine.training import (
        FittedFold,
        HeadPlan,
        PromptSettings,
        TrainReport,
        TrainSettings,
        fit_fold,
        train_head,
        train_prompt,
    )
    from wsi_engine.version import __version__

_HOMES = {
    "ArrayBags": "bags",
    "Cohort": "studies.cohort",
    "ClassifyReport": "classification.outcomes",
    "Ensemble": "classification.ensemble",
    "ExplainSettings": "classification.explanation",
    "Fold": "cohorts.splits",
    "Prediction": "classification.prediction",
    "Roster": "cohorts.roster",
    "SplitSettings": "cohorts.splits",
    "StoredBags": "bags",
    "TrainReport": "training",
    "TrainSettings": "training",
    "TrainingSet": "cohorts.audit",
    "classify": "classification.slides",
    "load_ensemble": "classification.ensemble",
    "prefetch": "bags",
    "prepare_training_set": "cohorts.audit",
    "split_patients": "cohorts.splits",
    "train_head": "training",
    "train_prompt": "training",
    "PromptSettings": "training",
    "fit_fold": "training",
    "HeadPlan": "training",
    "FittedFold": "training",
    "Comparison": "evaluation",
    "Evaluation": "evaluation",
    "compare_runs": "evaluation",
    "evaluate_run": "evaluation",
    "write_evaluation": "evaluation",
    "PredictionTable": "predictions",
    "InstanceSet": "nuclei.instances",
    "read_nuclei": "nuclei.keeping",
    "CheckReport": "integrity",
    "check_stores": "integrity",
    "segment_nuclei": "nuclei.segmentation",
    "segment_slides": "nuclei.slides",
    "Encoder": "encoders.base",
    "EncoderCard": "encoders.base",
    "ExtractReport": "extraction",
    "FeatureStore": "store",
    "Slide": "slide",
    "draw_overview": "picture",
    "save_picture": "picture",
    "TileBatch": "stream",
    "TileGrid": "grid",
    "TissueMask": "tissue",
    "TissueSettings": "tissue",
    "WsiError": "errors",
    "__version__": "version",
    "create_encoder": "encoders",
    "detect_tissue": "tissue",
    "extract": "extraction",
    "lay_grid": "grid",
    "list_encoders": "encoders",
    "open_slide": "slide",
    "stream_tiles": "stream",
}
_SUBMODULES = ("errors", "kernels", "metrics", "models", "synthetic")

__all__ = [  # noqa: RUF022 - in the order of the flow
    "open_slide",
    "Slide",
    "detect_tissue",
    "TissueMask",
    "TissueSettings",
    "lay_grid",
    "TileGrid",
    "stream_tiles",
    "TileBatch",
    "create_encoder",
    "list_encoders",
    "Encoder",
    "EncoderCard",
    "extract",
    "ExtractReport",
    "FeatureStore",
    "Cohort",
    "Roster",
    "SplitSettings",
    "Fold",
    "split_patients",
    "prepare_training_set",
    "TrainingSet",
    "StoredBags",
    "ArrayBags",
    "prefetch",
    "train_head",
    "TrainSettings",
    "TrainReport",
    "train_prompt",
    "PromptSettings",
    "fit_fold",
    "HeadPlan",
    "FittedFold",
    "evaluate_run",
    "compare_runs",
    "write_evaluation",
    "Evaluation",
    "Comparison",
    "PredictionTable",
    "classify",
    "ClassifyReport",
    "ExplainSettings",
    "load_ensemble",
    "Ensemble",
    "Prediction",
    "segment_nuclei",
    "segment_slides",
    "InstanceSet",
    "read_nuclei",
    "check_stores",
    "CheckReport",
    "draw_overview",
    "save_picture",
    "WsiError",
    "errors",
    "kernels",
    "metrics",
    "models",
    "synthetic",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"wsi_engine.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"wsi_engine.{name}")
    raise AttributeError(f"module 'wsi_engine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
