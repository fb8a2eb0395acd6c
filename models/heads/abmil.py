"""ABMIL: attention-based pooling, plain or gated, and a linear classifier.

Source: M. Ilse, J. M. Tomczak, M. Welling, "Attention-based deep multiple instance learning", ICML 2018, section 2.4:
a_k = softmax over tiles of w·tanh(V h_k), gated w·(tanh(V h_k) ⊙ sigmoid(U h_k)); the bag is Σ a_k h_k. The h_k come
from the features through fully connected layers with ReLU; for the classic data sets the paper has three, of 256, 128
and 64 units, and 64 units of attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from wsi_engine.models.heads.attention import build_attention, init_xavier
from wsi_engine.models.heads.base import HeadSettings
from wsi_engine.models.heads.checks import check_count, check_flag, check_share, check_widths
from wsi_engine.models.heads.output import HeadOutput
from wsi_engine.models.heads.pooling import PooledBag, PoolingHead


@dataclass(frozen=True)
class AbmilSettings(HeadSettings):
    """How an ABMIL head is built.

    Attributes:
        hidden: widths of the layers before attention; empty to pool the features themselves.
        attention: width of the attention network.
        gated: gated attention, else plain.
        dropout: share of units dropped after each layer and inside attention, in training.
    """

    hidden: tuple[int, ...] = (512,)
    attention: int = 128
    gated: bool = True
    dropout: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", check_widths("hidden", self.hidden))
        check_count("attention", self.attention)
        check_flag("gated", self.gated)
        check_share("dropout", self.dropout, below_one=True)


def build_layers(in_dim: int, widths: tuple[int, ...], dropout: float) -> nn.Sequential:
    """Linear, ReLU, dropout for each width; the identity where there is none."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(in_dim, width), nn.ReLU(), nn.Dropout(dropout)]
        in_dim = width
    return nn.Sequential(*layers)


class Abmil(PoolingHead):
    """Attention pooling after Ilse et al.; one attention map."""

    name = "abmil"
    lowers = True
    settings: AbmilSettings

    def __init__(self, in_dim: int, n_classes: int, settings: AbmilSettings | None = None) -> None:
        settings = settings or AbmilSettings()
        super().__init__(in_dim, n_classes, settings)
        width = (in_dim, *settings.hidden)[-1]
        self.layers = build_layers(in_dim, settings.hidden, settings.dropout)
        self.attention = build_attention(settings.gated, width, settings.attention, 1, settings.dropout)
        self.classifier = nn.Linear(width, n_classes)
        init_xavier(self)

    def score_tiles(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) to hidden rows (n, H) and raw attention (n, 1)."""
        hidden = self.layers(features)
        return hidden, self.attention(hidden)

    def finish(self, bag: PooledBag) -> HeadOutput:
        """From the pooled bag to the output."""
        return HeadOutput(self.classifier(bag.embedding)[0], bag.scores, bag.embedding)
