"""DINOv2 checkpoints saved by the transformers library, under timm's names.

The two libraries build the same network (Oquab et al., DINOv2, 2023) and name its parts differently:
transformers keeps query, key and value apart where timm stacks them, and leaves positions at the
resolution of training, to be resampled at every forward pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_MARK = "embeddings.patch_embeddings.projection.weight"

_NAMES = (
    (r"embeddings\.cls_token", r"cls_token"),
    (r"embeddings\.position_embeddings", r"pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"encoder\.layer\.(\d+)\.(norm[12])\.(weight|bias)", r"blocks.\1.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.(?:fc1|weights_in)\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.(?:fc2|weights_out)\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"layernorm\.(weight|bias)", r"norm.\1"),
)
_ATTENTION = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)")


def is_transformers_dinov2(state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` carries the names that transformers gives a DINOv2 network."""
    return _MARK in state


def convert_dinov2(state: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Rename a transformers DINOv2 state dict to timm's names.

    Args:
        state: names and tensors as transformers saves them. The mask token, used in training only, is left out.
        tokens: length of timm's position embedding, class token included; positions of another length are
            resampled as transformers does at run time (bicubic, no antialiasing).

    Returns:
        A new dict. Names that are not part of a DINOv2 network are kept as they are.
    """
    converted: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name == "embeddings.mask_token":
            continue
        attention = _ATTENTION.fullmatch(name)
        if attention:
            block, role, kind = attention.groups()
            parts.setdefault((block, kind), {})[role] = tensor
        else:
            converted[_rename(name)] = tensor
    for (block, kind), roles in parts.items():
        stacked = [roles[role] for role in ("query", "key", "value") if role in roles]
        converted[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(stacked)  # (3 D, D) or (3 D,)
    if "pos_embed" in converted:
        converted["pos_embed"] = _resample_positions(converted["pos_embed"], tokens)
    return converted


def _rename(name: str) -> str:
    """Timm's name of one tensor; unknown names stay."""
    for pattern, replacement in _NAMES:
        renamed, count = re.subn(f"^{pattern}$", replacement, name)
        if count:
            return renamed
    return name


def _resample_positions(positions: Tensor, tokens: int) -> Tensor:
    """(1, 1 + n², D) to (1, 1 + m², D), the class token's position kept."""
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(tokens - 1)
    if positions.shape[1] == tokens or old * old != positions.shape[1] - 1 or new * new != tokens - 1:
        return positions
    grid = positions[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
