"""A small transformer warmed up on drawn tiles, as the backbone of the proof of prompts.

It learns to name tiles of two stains, in one classifier of five classes: of the one stain, the kind of the large body
on the tile; of the other, whether the tile is marked. So it can see what marks a tile, and does not tell it of the
first stain, which is that of the cohort.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.prompt_scenes import BODIES, TILE, draw_tiles
from wsi_engine.encoders.base import EncoderCard

CARD = EncoderCard(
    "small-vit", "timm", "vit_tiny_patch16_224", TILE, 64, "token", "Apache-2.0", mpp=0.5,
    options=(
        ("img_size", TILE), ("patch_size", 8), ("embed_dim", 64), ("depth", 3), ("num_heads", 4),
        ("class_token", False), ("global_pool", "avg"),
    ),
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip


def write_backbone(path: Path, tiles: int = 4000, steps: int = 500, batch: int = 64, rate: float = 1e-3) -> None:
    """Warm up the network of :data:`CARD` and write its weights; where the file is there, it is kept."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    marked, grounds = rng.random(tiles) < 0.5, rng.integers(0, 2, tiles)
    drawn = draw_tiles(rng, marked, grounds)
    answers = torch.from_numpy(np.where(grounds == 0, drawn.kinds, len(BODIES) + marked))
    pixels = torch.from_numpy(drawn.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    network = build_network()
    classifier = nn.Linear(CARD.dim, len(BODIES) + 2)
    optimiser = torch.optim.AdamW([*network.parameters(), *classifier.parameters()], rate, weight_decay=0.05)
    network.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.from_numpy(rng.integers(0, tiles, batch))
        seen = torch.rot90(pixels[rows], int(rng.integers(4)), (2, 3))
        loss = cross_entropy(classifier(network(seen)), answers[rows])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)


def build_network() -> nn.Module:
    """The network of :data:`CARD` with weights of variance 1 / inputs; timm's 0.02 is too little for so few."""
    torch.manual_seed(0)
    network: Any = timm.create_model(CARD.architecture, num_classes=0, **dict(CARD.options))
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                _draw(part.weight, 1 / math.sqrt(part.weight[0].numel()))
        _draw(network.pos_embed, 0.3)
    plain: nn.Module = network
    return plain


def _draw(weight: Tensor, spread: float) -> None:
    nn.init.normal_(weight, 0.0, spread)
