"""Fold by fold: prompts or encoders trained and written with their heads, and what that took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from wsi_engine.cohorts.splits import Fold
from wsi_engine.encoders.prompted import describe_prompted, save_tuned
from wsi_engine.encoders.weights import digest_state
from wsi_engine.models import save_head
from wsi_engine.models.prompt import PromptedViT
from wsi_engine.models.prompt_files import save_prompts
from wsi_engine.runs import ENCODER_NAME, HEAD_NAME, PROMPTS_NAME, FeatureOrigin
from wsi_engine.training.fold import FittedFold
from wsi_engine.training.log import TrainLog
from wsi_engine.training.plan import EpochRecord, HeadPlan
from wsi_engine.training.prompt_fold import FittedPrompts, PromptTask, fit_prompts
from wsi_engine.training.run import HeadTrainer
from wsi_engine.version import __version__


class PromptTrainer:
    """Trains tuned encoders with heads; a :class:`~wsi_engine.training.folds.FoldTrainer`."""

    def __init__(self, task: PromptTask, folds: Sequence[Fold], origin: FeatureOrigin) -> None:
        self.task, self.folds, self.origin = task, folds, origin

    def fit(self, number: int, state_file: Path, told: Callable[[EpochRecord], None]) -> FittedPrompts:
        """Train a fold, or go on with it from its state file."""
        return fit_prompts(self.task, self.folds[number], number, state_file, told)

    def save(self, fitted: FittedFold, folder: Path, card: Mapping[str, Any]) -> None:
        """Write what was tuned, then the head, whose card says which features it takes."""
        assert isinstance(fitted, FittedPrompts)
        encoder = fitted.encoder
        assert encoder is not None
        base = self.task.encoder.card
        kept = {
            "encoder": base.name, "mpp": self.origin.mpp, "tile_px": self.origin.tile_px, "label": card["label"],
            "fold": card["fold"], "engine_version": __version__,
        }  # fmt: skip
        if isinstance(encoder, PromptedViT):
            file = PROMPTS_NAME
            described = describe_prompted(base, encoder, file)
            name, digest = described.name, described.weights_digest
            save_prompts(encoder, folder / file, base.weights_digest, {**kept, "features": name})
        else:
            file = ENCODER_NAME
            backbone: Any = encoder
            digest = digest_state(backbone.network.state_dict())
            name = f"{base.name}+{digest[:8]}"
            save_tuned(encoder, folder / file, {**kept, "features": name})
        origin = replace(self.origin, encoder=name, weights_digest=digest)
        save_head(fitted.head, folder / HEAD_NAME, {**card, "features": asdict(origin), "tuned": file})

    def summarise(self, log: TrainLog) -> dict[str, Any]:
        """What learned, in how much memory and time."""
        encoder = self.task.build_encoder(0)
        learning = sum(weight.numel() for weight in encoder.parameters() if weight.requires_grad)
        return {"tuning": summarise_cost(self.task.tuning.mode, learning, self.task.plan, log)}


class FrozenTrainer(HeadTrainer):
    """Trains heads on frozen features, and says what it took."""

    def summarise(self, log: TrainLog) -> dict[str, Any]:
        """What learned, in how much memory and time."""
        return {"tuning": summarise_cost("conventional", 0, self.plan, log)}


def summarise_cost(mode: str, learning: int, plan: HeadPlan, log: TrainLog) -> dict[str, Any]:
    """Trainable parameters, memory at the peak beyond that before (MiB), and seconds of an epoch on average."""
    with torch.device("meta"):
        head = sum(weight.numel() for weight in plan.build(0).parameters() if weight.requires_grad)
    memory = [entry["memory_mb"] for entry in log.entries if entry.get("memory_mb") is not None]
    seconds = [entry["seconds"] for entry in log.entries if "seconds" in entry]
    return {
        "mode": mode,
        "encoder_parameters": learning,
        "head_parameters": head,
        "peak_memory_mb": max(memory, default=None),
        "seconds_per_epoch": sum(seconds) / len(seconds) if seconds else None,
    }
