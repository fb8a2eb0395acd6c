"""DSMIL: one stream finds each class's critical tile, the other attends to the tiles that resemble it.

Source: B. Li, Y. Li, K. W. Eliceiri, "Dual-stream multiple instance learning network for whole slide image
classification with self-supervised contrastive learning", CVPR 2021, section 3.2. With instance logits i(h), critical
tile m_c = argmax_n i_c(h_n), queries q and values v, the attention of class c is the softmax over tiles of
q(h)·q(h_m)/√Q, the bag is B = AᵀV, one row per class, and its logits a convolution over all of B.

Tensors carry the names of DSMIL's own state dicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from wsi_engine.models.heads.base import Head, HeadSettings
from wsi_engine.models.heads.checks import check_count, check_flag, check_share
from wsi_engine.models.heads.errors import HeadError
from wsi_engine.models.heads.output import HeadOutput
from wsi_engine.models.heads.pooling import SoftmaxPool


@dataclass(frozen=True)
class DsmilSettings(HeadSettings):
    """How a DSMIL head is built.

    Attributes:
        nonlinear: queries from Linear, ReLU, Linear, Tanh; else from one Linear, as in the first releases.
        passing_v: values from dropout, Linear and ReLU; else the features themselves.
        query: width of the queries.
        dropout: share of units dropped before the values with ``passing_v``, in training.
    """

    nonlinear: bool = True
    passing_v: bool = False
    query: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_flag("nonlinear", self.nonlinear)
        check_flag("passing_v", self.passing_v)
        check_count("query", self.query)
        check_share("dropout", self.dropout, below_one=True)


class _InstanceStream(nn.Module):
    """Logits of single tiles."""

    def __init__(self, in_dim: int, n_classes: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(in_dim, n_classes))


class _BagStream(nn.Module):
    """Queries, values, and the convolution over the bag's rows."""

    def __init__(self, in_dim: int, n_classes: int, settings: DsmilSettings) -> None:
        super().__init__()
        query = settings.query
        self.q: nn.Module = nn.Linear(in_dim, query)
        if settings.nonlinear:
            self.q = nn.Sequential(nn.Linear(in_dim, query), nn.ReLU(), nn.Linear(query, query), nn.Tanh())
        self.v: nn.Module = nn.Identity()
        if settings.passing_v:
            self.v = nn.Sequential(nn.Dropout(settings.dropout), nn.Linear(in_dim, in_dim), nn.ReLU())
        self.fcc = nn.Conv1d(n_classes, n_classes, kernel_size=in_dim)


class Dsmil(Head):
    """Dual-stream MIL; an attention map per class.

    Its classes stand each for themselves: one output (0 against 1) will do for two classes, and a slide may have
    several.
    """

    name = "dsmil"
    least_classes = 1
    settings: DsmilSettings

    def __init__(self, in_dim: int, n_classes: int, settings: DsmilSettings | None = None) -> None:
        settings = settings or DsmilSettings()
        super().__init__(in_dim, n_classes, settings)
        self.i_classifier = _InstanceStream(in_dim, n_classes)
        self.b_classifier = _BagStream(in_dim, n_classes, settings)

    def forward(self, features: Tensor) -> HeadOutput:
        """(N, D) floating to :class:`HeadOutput`; HeadError where the bag is empty or of another width."""
        self.check_features(features)
        chunks, bag = self.chunks(features), self.b_classifier
        instance_logits = torch.cat([self.i_classifier.fc(self.cast(chunk)) for chunk in chunks])  # (N, C)
        critical = instance_logits.argmax(dim=0)  # (C,)
        critical_queries = bag.q(self.cast(features[critical]))  # (C, Q)
        pool, attention = SoftmaxPool(), []
        for chunk in map(self.cast, chunks):
            scores = bag.q(chunk) @ critical_queries.T / math.sqrt(self.settings.query)  # (n, C)
            pool.add(scores, bag.v(chunk))
            attention.append(scores)
        embedding = pool.mean()  # (C, D)
        logits = bag.fcc(embedding[None])[0, :, 0]  # (1, C, D) to (C,)
        return HeadOutput(logits, torch.cat(attention), embedding, instance_logits)

    def bag_loss(self, output: HeadOutput, label: int | Tensor) -> Tensor:
        """Binary cross-entropy of the bag's logits, mean over classes: a scalar.

        Args:
            output: what the head returned for the bag.
            label: the bag's class (with one output, 0 or 1), or a floating tensor (C,) with 1 for each class it has.
        """
        return bce(output.logits.float(), self._targets(output, label))

    def loss(self, output: HeadOutput, label: int | Tensor) -> Tensor:
        """Half ``bag_loss``, half the same of each class's highest instance logit: a scalar."""
        assert output.instance_logits is not None
        highest = output.instance_logits.float().max(dim=0).values  # (C,)
        return 0.5 * self.bag_loss(output, label) + 0.5 * bce(highest, self._targets(output, label))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sigmoid of each logit: (…, C) to the same; the classes need not sum to 1."""
        return logits.float().sigmoid()

    def _targets(self, output: HeadOutput, label: int | Tensor) -> Tensor:
        """(C,) float32 of 0 and 1."""
        if isinstance(label, Tensor) and label.is_floating_point():
            if label.shape != (self.n_classes,):
                raise HeadError(f"dsmil takes a label of shape ({self.n_classes},), not {tuple(label.shape)}")
            return label.to(output.logits.device, torch.float32)
        label = self.check_label(label)
        targets = torch.zeros(self.n_classes, device=output.logits.device)
        if self.n_classes == 1:
            return targets + label
        targets[label] = 1.0
        return targets
