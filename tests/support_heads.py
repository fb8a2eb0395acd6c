"""Small heads, bags for them, and how their numbers are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsi_engine.models import Head, create_head

TOLERANCE = 1e-4


def small_head(name: str, in_dim: int = 20, n_classes: int = 3, **options: Any) -> Head:
    torch.manual_seed(3)
    if name == "transmil":
        options = {"dim": 32, "heads": 4} | options
    return create_head(name, in_dim, n_classes, **options).eval()


def bag(tiles: int, dim: int = 20, seed: int = 1) -> Tensor:
    return torch.randn(tiles, dim, generator=torch.Generator().manual_seed(seed))


def assert_close(mine: Tensor | None, theirs: Any, tolerance: float = TOLERANCE) -> None:
    assert mine is not None
    wanted = torch.as_tensor(np.asarray(theirs.detach() if isinstance(theirs, Tensor) else theirs), dtype=torch.float64)
    assert mine.shape == wanted.shape
    torch.testing.assert_close(mine.detach().double(), wanted, rtol=0, atol=tolerance)
