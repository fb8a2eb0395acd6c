"""Networks: torch and timm only, no slides and no stores. Each name loads on first use, and torch with it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_engine.models.heads import (
        CheckpointError,
        Head,
        HeadError,
        HeadOutput,
        create_head,
        list_heads,
        load_head,
        read_head_card,
        save_head,
    )

_HOMES = {
    "CheckpointError": "heads",
    "Head": "heads",
    "HeadError": "heads",
    "HeadOutput": "heads",
    "create_head": "heads",
    "list_heads": "heads",
    "load_head": "heads",
    "read_head_card": "heads",
    "save_head": "heads",
}

__all__ = [
    "CheckpointError",
    "Head",
    "HeadError",
    "HeadOutput",
    "create_head",
    "list_heads",
    "load_head",
    "read_head_card",
    "save_head",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wsi_engine.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"wsi_engine.models.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
