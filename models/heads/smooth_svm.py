"""The smooth top-1 SVM loss, by which CLAM trains its instance classifiers.

Source: L. Berrada, A. Zisserman, M. P. Kumar, "Smooth loss functions for deep top-k classification", ICLR 2018, for
k = 1. With margin α and temperature τ, a row x of label y costs τ·logsumexp_j((x_j + α·[j ≠ y] - x_y) / τ). Where the
best score leads the second by τ·ln 1000 or more the smooth form equals the hinge max_j(x_j + α·[j ≠ y]) - x_y to the
third digit, and the hinge is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

HARD_LEAD = math.log(1000.0)
"""Lead of the best score over the second, in units of τ, from which a row takes the hinge."""


def smooth_top1_svm_rows(scores: Tensor, labels: Tensor, alpha: float = 1.0, tau: float = 1.0) -> Tensor:
    """Loss of each row.

    Args:
        scores: (n, C) floating, C at least 2.
        labels: int64 (n,), 0 … C-1.
        alpha: margin, in units of the scores.
        tau: temperature, above 0, in units of the scores.

    Returns:
        (n,), each at least 0.
    """
    others = 1 - one_hot(labels, scores.shape[1]).to(scores.dtype)  # (n, C)
    margins = scores + alpha * others - scores.gather(1, labels[:, None])
    best, second = scores.topk(2, dim=1).values.unbind(dim=1)
    hard = best - second >= tau * HARD_LEAD
    return torch.where(hard, margins.amax(dim=1), tau * torch.logsumexp(margins / tau, dim=1))


class SmoothTop1SVM(nn.Module):
    """Mean of :func:`smooth_top1_svm_rows` over the rows; keeps no tensors, so it adds none to a state dict."""

    def __init__(self, alpha: float = 1.0, tau: float = 1.0) -> None:
        super().__init__()
        self.alpha, self.tau = alpha, tau

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """(n, C) scores and int64 (n,) labels to a scalar."""
        return smooth_top1_svm_rows(scores, labels, self.alpha, self.tau).mean()
