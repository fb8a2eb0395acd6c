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
    from wsi_engine.models.prompt import (
        PromptedViT,
        PromptError,
    )
    from wsi_engine.models.prompt_files import (
        load_prompts,
        read_prompts_card,
        save_prompts,
    )
    from wsi_engine.models.prompt_gradients import (
        bag_backward,
        encode_bag,
    )
    from wsi_engine.models.prompt_tiles import (
        Normalise,
    )
    from wsi_engine.models.scale_attention import (
        ScaleAttention,
        ScaleAttentionError,
    )
    from wsi_engine.models.scale_files import (
        load_scale_attention,
        save_scale_attention,
    )
    from wsi_engine.models.scale_inference import (
        attend_views,
    )

_HOMES = {
    "CheckpointError": "heads",
    "Head": "heads",
    "HeadError": "heads",
    "HeadOutput": "heads",
    "Normalise": "prompt_tiles",
    "PromptError": "prompt",
    "PromptedViT": "prompt",
    "ScaleAttention": "scale_attention",
    "ScaleAttentionError": "scale_attention",
    "attend_views": "scale_inference",
    "bag_backward": "prompt_gradients",
    "create_head": "heads",
    "encode_bag": "prompt_gradients",
    "list_heads": "heads",
    "load_head": "heads",
    "load_prompts": "prompt_files",
    "load_scale_attention": "scale_files",
    "read_head_card": "heads",
    "read_prompts_card": "prompt_files",
    "save_head": "heads",
    "save_prompts": "prompt_files",
    "save_scale_attention": "scale_files",
}

__all__ = [
    "CheckpointError",
    "Head",
    "HeadError",
    "HeadOutput",
    "Normalise",
    "PromptError",
    "PromptedViT",
    "ScaleAttention",
    "ScaleAttentionError",
    "attend_views",
    "bag_backward",
    "create_head",
    "encode_bag",
    "list_heads",
    "load_head",
    "load_prompts",
    "load_scale_attention",
    "read_head_card",
    "read_prompts_card",
    "save_head",
    "save_prompts",
    "save_scale_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wsi_engine.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"wsi_engine.models.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
