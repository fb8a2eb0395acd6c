"""CLAM: attention pooling with instance classifiers that learn from the tiles attention picks.

Source: M. Y. Lu et al., "Data-efficient and weakly supervised computational pathology on whole-slide images",
Nature Biomedical Engineering 5 (2021), Methods. A tile passes Linear, ReLU and dropout to 512 numbers; attention
scores it; the bag is the mean of the hidden rows under the softmax of the scores. ``clam_sb`` has one attention map
for all classes, ``clam_mb`` one for each.

The instance classifier of the bag's class should call the k most attended tiles 1 and the k least attended 0; with
``subtyping`` (classes exclude each other) those of the other classes should call their most attended tiles 0. A bag
smaller than k gives all its tiles to both ends, as one smaller than 2k gives some.

Tensors carry the names of CLAM's own state dicts.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wsi_engine.models.heads.attention import build_attention, init_xavier
from wsi_engine.models.heads.base import HeadSettings
from wsi_engine.models.heads.checks import check_count, check_flag, check_share, check_widths
from wsi_engine.models.heads.errors import HeadError
from wsi_engine.models.heads.output import HeadOutput
from wsi_engine.models.heads.pooling import PooledBag, PoolingHead
from wsi_engine.models.heads.smooth_svm import SmoothTop1SVM

SIZES = {"small": (512, 256), "big": (512, 384)}
"""Width of the hidden rows and of the attention network, by the names of the paper's code."""


@dataclass(frozen=True)
class ClamSettings(HeadSettings):
    """How a CLAM head is built and trained.

    Attributes:
        size: ``small``, ``big``, or the two widths (hidden, attention).
        gated: gated attention, else plain.
        dropout: share of units dropped after the first layer and inside attention, in training.
        subtyping: whether classes exclude each other, so that other classes' instance classifiers learn too.
        k: tiles taken from either end of the attention for the instance loss.
        bag_weight: share of the bag's loss in the sum; the rest is the instance loss's.
    """

    size: str | tuple[int, ...] = "small"
    gated: bool = True
    dropout: float = 0.25
    subtyping: bool = False
    k: int = 8
    bag_weight: float = 0.7

    def __post_init__(self) -> None:
        if isinstance(self.size, str):
            if self.size not in SIZES:
                raise HeadError(
                    f"size must be {' or '.join(SIZES)} or two widths such as (512, 256), not {self.size!r}"
                )
        else:
            widths = check_widths("size", self.size)
            if len(widths) != 2:
                raise HeadError(f"size must be two widths (hidden, attention), not {len(widths)}")
            object.__setattr__(self, "size", widths)
        check_flag("gated", self.gated)
        check_share("dropout", self.dropout, below_one=True)
        check_flag("subtyping", self.subtyping)
        check_count("k", self.k)
        check_share("bag_weight", self.bag_weight)

    def widths(self) -> tuple[int, int]:
        """(hidden, attention)."""
        hidden, attention = SIZES[self.size] if isinstance(self.size, str) else self.size
        return hidden, attention


class _Clam(PoolingHead):
    """What both CLAM heads share."""

    lowers = True
    settings: ClamSettings
    instance_classifiers: nn.ModuleList

    def __init__(self, in_dim: int, n_classes: int, settings: ClamSettings, maps: int) -> None:
        super().__init__(in_dim, n_classes, settings)
        hidden, width = settings.widths()
        self.attention_net = nn.Sequential(
            nn.Linear(in_dim, hidden),
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            build_attention(settings.gated, hidden, width, maps, settings.dropout),
        )
        self.instance_classifiers = nn.ModuleList(nn.Linear(hidden, 2) for _ in range(n_classes))
        self.instance_loss_fn = SmoothTop1SVM()

    def score_tiles(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) to hidden rows (n, H) and raw attention (n, K)."""
        hidden = self.attention_net[:3](features)
        return hidden, self.attention_net[3](hidden)

    @abstractmethod
    def classify(self, embedding: Tensor) -> Tensor:
        """(K, H) to logits (C,)."""

    def finish(self, bag: PooledBag) -> HeadOutput:
        """From the pooled bag to the output."""
        return HeadOutput(self.classify(bag.embedding), bag.scores, bag.embedding, self._judge_ends(bag))

    def loss(self, output: HeadOutput, label: int | Tensor) -> Tensor:
        """``bag_weight`` · cross-entropy of the bag + (1 - ``bag_weight``) · instance loss: a scalar."""
        share = self.settings.bag_weight
        return share * self.bag_loss(output, label) + (1 - share) * self.instance_loss(output, label)

    def instance_loss(self, output: HeadOutput, label: int | Tensor) -> Tensor:
        """Smooth top-1 SVM of the instance classifiers: a scalar.

        The class of the bag on both ends of its attention; with ``subtyping`` also the others on their upper end, and
        the sum over classes divided by their number.
        """
        assert output.instance_logits is not None
        label = self.check_label(label)
        logits = output.instance_logits.float()  # (C, 2k, 2)
        k = logits.shape[1] // 2
        targets = torch.arange(2 * k, device=logits.device) < k  # the upper end is 1, the lower 0
        total: Tensor = self.instance_loss_fn(logits[label], targets.long())
        if not self.settings.subtyping:
            return total
        for other in range(self.n_classes):
            if other != label:
                total = total + self.instance_loss_fn(logits[other, :k], torch.zeros_like(targets[:k]).long())
        return total / self.n_classes

    def _judge_ends(self, bag: PooledBag) -> Tensor:
        """(C, 2k, 2): each class's instance classifier on the k most, then the k least attended tiles of its map."""
        k = min(self.settings.k, len(bag.scores))
        upper = bag.scores.topk(k, dim=0).indices  # (k, K)
        lower = bag.scores.topk(k, dim=0, largest=False).indices
        ends = torch.cat([upper, lower])  # (2k, K)
        rows = bag.rows(ends.T.reshape(-1)).reshape(ends.shape[1], 2 * k, -1)  # (K, 2k, H)
        one_map = len(rows) == 1
        return torch.stack(
            [classifier(rows[0 if one_map else c]) for c, classifier in enumerate(self.instance_classifiers)]
        )


class ClamSB(_Clam):
    """CLAM with a single attention branch: one map, one linear classifier of the bag."""

    name = "clam_sb"

    def __init__(self, in_dim: int, n_classes: int, settings: ClamSettings | None = None) -> None:
        settings = settings or ClamSettings()
        super().__init__(in_dim, n_classes, settings, maps=1)
        self.classifiers = nn.Linear(settings.widths()[0], n_classes)
        init_xavier(self)

    def classify(self, embedding: Tensor) -> Tensor:
        """(1, H) to logits (C,)."""
        logits: Tensor = self.classifiers(embedding)[0]
        return logits


class ClamMB(_Clam):
    """CLAM with an attention branch per class: C maps, and for each a linear classifier with one output."""

    name = "clam_mb"

    def __init__(self, in_dim: int, n_classes: int, settings: ClamSettings | None = None) -> None:
        settings = settings or ClamSettings()
        super().__init__(in_dim, n_classes, settings, maps=n_classes)
        self.classifiers = nn.ModuleList(nn.Linear(settings.widths()[0], 1) for _ in range(n_classes))
        init_xavier(self)

    def classify(self, embedding: Tensor) -> Tensor:
        """(C, H) to logits (C,)."""
        return torch.cat([classifier(row) for classifier, row in zip(self.classifiers, embedding, strict=True)])
