"""The two attention networks of Ilse et al. (ICML 2018, eq. 8 and 9), which CLAM took over.

Their parts carry the names that CLAM's state dicts give them.
"""

from __future__ import annotations

from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Scores w·tanh(V h): hidden rows (n, H) to raw attention (n, K)."""

    def __init__(self, hidden: int, width: int, maps: int, dropout: float) -> None:
        super().__init__()
        self.module = nn.Sequential(
            nn.Linear(hidden, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, maps)
        )  # fmt: skip

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, H) to (n, K)."""
        scores: Tensor = self.module(hidden)
        return scores


class GatedAttention(nn.Module):
    """Scores w·(tanh(V h) ⊙ sigmoid(U h)): hidden rows (n, H) to raw attention (n, K)."""

    def __init__(self, hidden: int, width: int, maps: int, dropout: float) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(hidden, width), nn.Tanh(), nn.Dropout(dropout))
        self.attention_b = nn.Sequential(nn.Linear(hidden, width), nn.Sigmoid(), nn.Dropout(dropout))
        self.attention_c = nn.Linear(width, maps)

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, H) to (n, K)."""
        gated = self.attention_a(hidden) * self.attention_b(hidden)  # (n, width)
        scores: Tensor = self.attention_c(gated)
        return scores


def build_attention(gated: bool, hidden: int, width: int, maps: int, dropout: float) -> nn.Module:
    """The gated or the plain network, H = ``hidden``, K = ``maps``."""
    return (GatedAttention if gated else PlainAttention)(hidden, width, maps, dropout)


def init_xavier(network: nn.Module) -> None:
    """Xavier-normal weights and zero biases in every linear layer, as CLAM starts from."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
