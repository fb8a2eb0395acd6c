"""A small vision transformer of timm with random weights, and tiles for it."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor

SMALL = {"img_size": 32, "depth": 3, "num_classes": 0}


def build_vit(name: str = "vit_tiny_patch16_224", seed: int = 3, **options: Any) -> Any:
    torch.manual_seed(seed)
    network = timm.create_model(name, **(SMALL | options))
    with torch.no_grad():  # fresh class tokens and positions are almost nothing: make them count
        for key, value in network.named_parameters():
            if key.endswith(("token", "pos_embed")):
                value.normal_()
    return network


def images(count: int = 5, side: int = 32, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pixels(count: int, side: int = 32, seed: int = 6) -> Tensor:
    return torch.randint(
        0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
