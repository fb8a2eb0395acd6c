"""Training runs without training: heads with fresh weights in a folder as ``wsi train`` leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from wsi_engine.models import create_head, save_head
from wsi_engine.runs import FeatureOrigin, RunFolder, RunRecord
from wsi_engine.version import __version__


def make_origin(dim: int, **changes: Any) -> FeatureOrigin:
    """Where made-up features come from."""
    values: dict[str, Any] = {
        "encoder": "made-up", "dim": dim, "weights_digest": "a" * 64, "precision": "fp32", "mpp": 0.5, "tile_px": 64,
        "stride_px": 64,
    }  # fmt: skip
    return FeatureOrigin(**(values | changes))


def make_card(origin: FeatureOrigin, classes: Sequence[str], fold: int, temperature: float) -> dict[str, Any]:
    """The card of a fold's head."""
    return {
        "features": asdict(origin), "classes": list(classes), "label": "subtype", "fold": fold,
        "calibration": {"temperature": temperature, "threshold": None}, "training": {}, "engine_version": __version__,
    }  # fmt: skip


def make_run(
    path: Path,
    origin: FeatureOrigin,
    head: str = "clam_sb",
    classes: Sequence[str] = ("benign", "tumour"),
    temperatures: Sequence[float] = (1.0, 1.7, 0.6),
    **options: Any,
) -> Path:
    """A finished run with a head for each temperature, fold k from seed k."""
    folder = RunFolder(path)
    for fold, temperature in enumerate(temperatures):
        torch.manual_seed(fold)
        network = create_head(head, origin.dim, len(classes), **options)
        folder.fold(fold).mkdir(parents=True, exist_ok=True)
        save_head(network, folder.head_file(fold), make_card(origin, classes, fold, temperature))
    folder.write_record(
        RunRecord("subtype", tuple(classes), head, {}, len(temperatures), origin, {}, __version__, complete=True)
    )
    return path
