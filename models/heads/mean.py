"""The baseline: the mean of all tiles, and a linear classifier. It cannot tell a small lesion from noise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from wsi_engine.models.heads.abmil import build_layers
from wsi_engine.models.heads.attention import init_xavier
from wsi_engine.models.heads.base import HeadSettings
from wsi_engine.models.heads.checks import check_share, check_widths
from wsi_engine.models.heads.output import HeadOutput
from wsi_engine.models.heads.pooling import PooledBag, PoolingHead


@dataclass(frozen=True)
class MeanSettings(HeadSettings):
    """How the baseline is built.

    Attributes:
        hidden: widths of the layers before the mean; none, as here, makes the head linear in the features.
        dropout: share of units dropped after each layer, in training.
    """

    hidden: tuple[int, ...] = ()
    dropout: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", check_widths("hidden", self.hidden))
        check_share("dropout", self.dropout, below_one=True)


class Mean(PoolingHead):
    """Mean pooling; its attention is 0 for every tile, which as weights is the same share for each."""

    name = "mean"
    settings: MeanSettings

    def __init__(self, in_dim: int, n_classes: int, settings: MeanSettings | None = None) -> None:
        settings = settings or MeanSettings()
        super().__init__(in_dim, n_classes, settings)
        self.layers = build_layers(in_dim, settings.hidden, settings.dropout)
        self.classifier = nn.Linear((in_dim, *settings.hidden)[-1], n_classes)
        init_xavier(self)

    def score_tiles(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) to hidden rows (n, H) and scores (n, 1), all 0."""
        hidden = self.layers(features)
        return hidden, hidden.new_zeros(len(hidden), 1)

    def finish(self, bag: PooledBag) -> HeadOutput:
        """From the pooled bag to the output."""
        return HeadOutput(self.classifier(bag.embedding)[0], bag.scores, bag.embedding)
