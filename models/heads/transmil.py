"""TransMIL: a transformer over the tiles of a bag, with attention approximated by landmarks.

Sources: Z. Shao et al., "TransMIL: transformer based correlated multiple instance learning for whole slide image
classification", NeurIPS 2021, algorithms 1 to 3; Y. Xiong et al., "Nyströmformer", AAAI 2021, equations 13 and 14.

Tiles lose their place on the slide: in the order given they fill a square, row by row, and convolutions over it (PPEG)
stand for position. Memory is linear in the tiles, about 25 kB a tile at the widths published, and a bag is taken whole:
its tiles all see each other, so it is not cut into chunks.

Tensors carry the names of TransMIL's own state dicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from wsi_engine.models.heads.base import Head, HeadSettings
from wsi_engine.models.heads.checks import check_count, check_share
from wsi_engine.models.heads.errors import HeadError
from wsi_engine.models.heads.nystrom import NystromAttention
from wsi_engine.models.heads.output import HeadOutput

LEAST_WEIGHT = 1e-12
"""Weights below this, which the approximation can make negative, are raised to it before the logarithm is taken."""


@dataclass(frozen=True)
class TransmilSettings(HeadSettings):
    """How a TransMIL head is built.

    Attributes:
        dim: numbers per token, even; half as many landmarks are taken, as published.
        heads: attention heads, a divisor of ``dim``.
        dropout: share of units dropped after each attention, in training.
    """

    dim: int = 512
    heads: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_count("dim", self.dim, 2)
        check_count("heads", self.heads)
        if self.dim % 2 or self.dim % self.heads:
            raise HeadError(f"dim must be even and a multiple of heads, not {self.dim} with {self.heads} heads")
        check_share("dropout", self.dropout, below_one=True)


class _Layer(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, settings: TransmilSettings) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(settings.dim)
        self.attn = NystromAttention(settings.dim, settings.heads, settings.dim // 2, settings.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(T, dim) to the same."""
        mixed: Tensor = self.attn(self.norm(tokens))[0]
        return tokens + mixed

    def watch_first(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As ``forward``, and the attention (T,) that the first token pays to all, mean over heads."""
        mixed, attention = self.attn(self.norm(tokens), watched=0)
        return tokens + mixed, attention


class _Position(nn.Module):
    """Pyramid position encoding (PPEG): the square of tiles plus its depthwise convolutions of 7, 5 and 3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.proj1 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """(1 + side², dim), the class token first, to the same."""
        square = tokens[1:].T.reshape(1, -1, side, side)  # (1, dim, side, side)
        square = square + self.proj(square) + self.proj1(square) + self.proj2(square)
        return torch.cat([tokens[:1], square.flatten(2)[0].T])


class Transmil(Head):
    """Transformer MIL.

    ``attention`` (N, 1) is the logarithm of what the class token pays to each tile in the second layer, as the
    landmarks approximate it, mean over heads. What the first layer and the convolutions carried from tile to tile is
    not in it. No gradient flows into it.
    """

    name = "transmil"
    settings: TransmilSettings

    def __init__(self, in_dim: int, n_classes: int, settings: TransmilSettings | None = None) -> None:
        settings = settings or TransmilSettings()
        super().__init__(in_dim, n_classes, settings)
        dim = settings.dim
        self._fc1 = nn.Sequential(nn.Linear(in_dim, dim), nn.ReLU())
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.layer1 = _Layer(settings)
        self.pos_layer = _Position(dim)
        self.layer2 = _Layer(settings)
        self.norm = nn.LayerNorm(dim)
        self._fc2 = nn.Linear(dim, n_classes)

    def forward(self, features: Tensor) -> HeadOutput:
        """(N, D) floating to :class:`HeadOutput`; HeadError where the bag is empty or of another width."""
        self.check_features(features)
        n = len(features)
        tiles = self._fc1(self.cast(features))  # (N, dim)
        side = math.isqrt(n - 1) + 1  # the smallest square that holds them
        repeated = side * side - n  # never more than N
        tokens = torch.cat([self.cls_token[0].to(tiles.dtype), tiles, tiles[:repeated]])  # (1 + side², dim)
        tokens = self.pos_layer(self.layer1(tokens), side)
        tokens, paid = self.layer2.watch_first(tokens)
        embedding = self.norm(tokens[:1])  # (1, dim)
        shares = paid[1 : n + 1] + pad(paid[n + 1 :], (0, n - repeated))  # a repeated tile has both its shares
        return HeadOutput(self._fc2(embedding)[0], shares.clamp_min(LEAST_WEIGHT).log()[:, None], embedding)
