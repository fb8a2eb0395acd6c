"""Losses of scale attention, each a pure function, and the symmetries of the square that one of them uses.

Source: M. Sahasrabudhe et al., MICCAI 2020, section 2.3; all weights are 1. Targets carry no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, mse_loss

SYMMETRIES = 8
"""Flips, transposition and rotations of the square, the identity (0) included."""


def scale_loss(scale_logits: Tensor, scales: Tensor) -> Tensor:
    """Cross-entropy of the scale: (B, 3) logits, (B,) int64 classes, to a scalar."""
    return cross_entropy(scale_logits, scales)


def smoothness_loss(attention: Tensor) -> Tensor:
    """Mean |∂x A| plus mean |∂y A| by differences of neighbours: (B, 1, H, W) to a scalar."""
    across = (attention[..., :, 1:] - attention[..., :, :-1]).abs().mean()
    down = (attention[..., 1:, :] - attention[..., :-1, :]).abs().mean()
    return across + down


def rigid_loss(attention: Tensor, returned: Tensor) -> Tensor:
    """Mean squared difference to the attention of the transformed pictures, transformed back; both (B, 1, H, W)."""
    return mse_loss(attention, returned.detach())


def scale_equivariance_loss(attention: Tensor, of_halved: Tensor, scales: Tensor) -> Tensor:
    """Half the sum, over 40x and 20x, of the mean squared difference between halved attention and that of halves.

    Args:
        attention: (B, 1, H, W), H and W even.
        of_halved: (B, 1, H/2, W/2), attention on :func:`halve` of the pictures.
        scales: (B,) classes; 0 is 40x, 1 is 20x, others do not count.

    Returns:
        A scalar; a class without pictures adds 0.
    """
    errors = (halve(attention) - of_halved.detach()).square().mean(dim=(1, 2, 3))  # (B,)
    total = errors.new_zeros(())
    for scale in (0, 1):
        chosen = (scales == scale).to(errors.dtype)
        total = total + (errors * chosen).sum() / chosen.sum().clamp(min=1)
    return total / 2


def halve(images: Tensor) -> Tensor:
    """Bilinear reduction by 2, the mean of 2 × 2 pixels: (B, C, H, W) to (B, C, H/2, W/2), H and W even."""
    return avg_pool2d(images, 2)


def apply_symmetry(images: Tensor, symmetry: int) -> Tensor:
    """Transpose (for 4 to 7), then turn by ``symmetry`` mod 4 quarters: (..., H, W)."""
    turned = images.transpose(-2, -1) if symmetry >= 4 else images
    return torch.rot90(turned, symmetry % 4, (-2, -1))


def undo_symmetry(images: Tensor, symmetry: int) -> Tensor:
    """The exact inverse of :func:`apply_symmetry`."""
    turned = torch.rot90(images, -(symmetry % 4), (-2, -1))
    return turned.transpose(-2, -1) if symmetry >= 4 else turned


def apply_symmetries(images: Tensor, symmetries: Sequence[int]) -> Tensor:
    """:func:`apply_symmetry` with one symmetry per picture: square (B, C, S, S)."""
    return torch.stack([apply_symmetry(image, one) for image, one in zip(images, symmetries, strict=True)])


def undo_symmetries(images: Tensor, symmetries: Sequence[int]) -> Tensor:
    """The exact inverse of :func:`apply_symmetries`."""
    return torch.stack([undo_symmetry(image, one) for image, one in zip(images, symmetries, strict=True)])


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms inside use the batch's statistics as before, but leave their running ones as they are.

    Passes that only make a target would otherwise count a batch twice, and halved pictures as new ones.
    """
    norms = [one for one in module.modules() if isinstance(one, nn.BatchNorm2d)]
    momenta = [one.momentum for one in norms]
    try:
        for one in norms:
            one.momentum = 0.0
        yield
    finally:
        for one, momentum in zip(norms, momenta, strict=True):
            one.momentum = momentum
