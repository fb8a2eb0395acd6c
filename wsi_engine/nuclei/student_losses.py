"""What the student is asked for: the mask and the depth, where the labels can be trusted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss

DICE_WEIGHT, DEPTH_WEIGHT, SLOPE_WEIGHT = 0.5, 1.5, 1.0

_SMOOTH = 20.0
"""Pixels added to both sides of the Dice ratio, so that a tile with hardly any nucleus does not swing it."""

_GROUND = 0.3
"""Weight of the depth of a pixel outside nuclei, where it is 0."""


def mask_loss(logits: Tensor, mask: Tensor, trust: Tensor) -> Tensor:
    """Cross-entropy of each pixel plus half of 1 − Dice of each tile, weighted by trust.

    Args:
        logits: float32 (B, H, W).
        mask: (B, H, W), 1 in nuclei and 0 elsewhere.
        trust: (B, H, W), 0 … 1.

    Returns:
        scalar.
    """
    each = binary_cross_entropy_with_logits(logits, mask, reduction="none")
    entropy = (each * trust).sum() / trust.sum().clamp(min=1)
    chance = logits.sigmoid()
    shared = (chance * mask * trust).sum((1, 2))
    both = ((chance + mask) * trust).sum((1, 2))
    return entropy + DICE_WEIGHT * (1 - (2 * shared + _SMOOTH) / (both + _SMOOTH)).mean()


def depth_loss(depth: Tensor, target: Tensor, mask: Tensor, trust: Tensor) -> Tensor:
    """Smooth L1 distance of the depth and of its slopes, weighted by trust; shapes as in :func:`mask_loss`.

    The slopes count within nuclei alone: without them the seam between two nuclei that touch is smoothed away (the
    gradient term of S. Graham et al., "HoVer-Net", Medical Image Analysis 2019, section 3.1).
    """
    weight = trust * (_GROUND + mask)
    values = _weighted(depth - target, weight)
    inside = trust * mask
    down = _weighted((depth - target).diff(dim=1), inside[:, 1:] * inside[:, :-1])
    right = _weighted((depth - target).diff(dim=2), inside[:, :, 1:] * inside[:, :, :-1])
    return values + SLOPE_WEIGHT * (down + right)


def _weighted(away: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of the smooth L1 norm."""
    each = smooth_l1_loss(away, torch.zeros_like(away), reduction="none", beta=0.1)
    return (each * weight).sum() / weight.sum().clamp(min=1)


def student_loss(out: Tensor, mask: Tensor, depth: Tensor, trust: Tensor) -> Tensor:
    """Both together: outputs (B, 2, H, W) of the network against mask, depth and trust (B, H, W); a scalar."""
    out = out.float()
    return mask_loss(out[:, 0], mask, trust) + DEPTH_WEIGHT * depth_loss(out[:, 1], depth, mask, trust)
