"""Heads of multiple-instance learning: a bag of tile features in, a slide's classes and its attention out."""

from __future__ import annotations

from wsi_engine.models.heads.base import Head
from wsi_engine.models.heads.checkpoints import load_head, read_head_card, save_head
from wsi_engine.models.heads.errors import CheckpointError, HeadError
from wsi_engine.models.heads.output import HeadOutput
from wsi_engine.models.heads.smooth_svm import SmoothTop1SVM
from wsi_engine.models.heads.table import create_head, head_lowers, list_heads

__all__ = [
    "CheckpointError",
    "Head",
    "HeadError",
    "HeadOutput",
    "SmoothTop1SVM",
    "create_head",
    "head_lowers",
    "list_heads",
    "load_head",
    "read_head_card",
    "save_head",
]
