"""ResNet50 features as most scripts compute them: OpenSlide, Pillow and fp32 PyTorch, one step after the other.

Run as a process of its own by the end-to-end benchmark: ``python -m benchmarks.plain_loop SLIDE GRID.npy TILE_LEVEL0``.
"""

from __future__ import annotations

import sys

import numpy as np
import openslide
import timm
import torch

TILE_PX = 256
BATCH = 64


def main(path: str, origins: str, size_level0: int) -> None:
    """Features of every tile of a grid, kept in memory."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50", pretrained=False, features_only=True, out_indices=(3,)).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    features = []
    with openslide.OpenSlide(path) as slide, torch.inference_mode():
        corners = np.load(origins).tolist()
        for start in range(0, len(corners), BATCH):
            tiles = [
                np.asarray(slide.read_region(corner, 0, (size_level0,) * 2).convert("RGB").resize((TILE_PX, TILE_PX)))
                for corner in corners[start : start + BATCH]
            ]
            batch = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous().float() / 255
            features.append(model((batch - mean) / std)[0].mean(dim=(2, 3)).numpy())
    print(np.concatenate(features).shape)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
