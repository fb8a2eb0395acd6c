"""Training of slide-level heads from labels alone. Names load on first use; the settings need no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_engine.training.fold import FittedFold, fit_fold
    from wsi_engine.training.plan import EpochRecord, HeadPlan
    from wsi_engine.training.prompt_run import train_prompt
    from wsi_engine.training.prompt_settings import PromptSettings
    from wsi_engine.training.report import FoldSummary, TrainProgress, TrainReport
    from wsi_engine.training.run import train_head
    from wsi_engine.training.settings import TrainSettings

_HOMES = {
    "EpochRecord": "plan",
    "FittedFold": "fold",
    "FoldSummary": "report",
    "HeadPlan": "plan",
    "PromptSettings": "prompt_settings",
    "TrainProgress": "report",
    "TrainReport": "report",
    "TrainSettings": "settings",
    "fit_fold": "fold",
    "train_head": "run",
    "train_prompt": "prompt_run",
}

__all__ = [
    "EpochRecord",
    "FittedFold",
    "FoldSummary",
    "HeadPlan",
    "PromptSettings",
    "TrainProgress",
    "TrainReport",
    "TrainSettings",
    "fit_fold",
    "train_head",
    "train_prompt",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wsi_engine.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"wsi_engine.training.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
