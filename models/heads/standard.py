"""Standard scores of features, kept with the head so that nobody has to remember them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsi_engine.models.heads.errors import HeadError

LEAST_SPREAD = 1e-6
"""A feature that varies by less over all training tiles is only centred."""


class Standard(nn.Module):
    """(x - mean) / spread for each of D features; changes nothing until :meth:`fit` was called.

    Attributes:
        mean: float32 (D,).
        spread: float32 (D,), standard deviations over the tiles of the training bags.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("spread", torch.ones(in_dim))

    def fit(self, mean: Tensor, spread: Tensor) -> None:
        """Take over mean and standard deviation (D,) of the training tiles.

        Raises:
            HeadError: of another length, or not finite.
        """
        for name, values in (("mean", mean), ("spread", spread)):
            if values.shape != self.mean.shape or not values.isfinite().all():
                raise HeadError(f"the {name} of features must be {len(self.mean)} finite numbers to standardise them")
        self.mean.copy_(mean)
        self.spread.copy_(torch.where(spread < LEAST_SPREAD, torch.ones_like(spread), spread))

    def forward(self, features: Tensor) -> Tensor:
        """(n, D) floating to float32 (n, D)."""
        return (features.float() - self.mean) / self.spread
