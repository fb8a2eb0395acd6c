"""Attention for segmentation: the mean over several views of a picture, whole or by windows that leave no seam."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from wsi_engine.models.scale_attention import ScaleAttention, ScaleAttentionError, ScaleAttentionSettings
from wsi_engine.models.scale_losses import apply_symmetry, halve, undo_symmetry

RIGID_VIEWS = (5, 7, 2, 4, 1, 3)
"""Symmetries of the views after the first two: two flips, half turn, transposition, quarter turns."""

MOST_VIEWS = 2 + len(RIGID_VIEWS)


def attend_views(network: ScaleAttention, images: Tensor, views: int = 8, tau: Tensor | float | None = None) -> Tensor:
    """Mean attention over views: the picture itself, its half enlarged again, then turned and flipped ones.

    Args:
        network: in eval mode, trained.
        images: (B, 3, H, W) normalised, at the native scale.
        views: how many, 1 to 8; 8 are the paper's, 1 is the picture itself. The second costs a quarter of the others.
        tau: threshold of the logits for all views, in place of the network's own; for one of the picture itself give
            :func:`~wsi_engine.models.scale_attention.threshold_of` its logits.

    Returns:
        float32 (B, 1, H, W) within 0-1.

    Raises:
        ScaleAttentionError: ``views`` is out of range, or the network is in training mode or was never trained.
    """
    check_views(views)
    if network.training:
        raise ScaleAttentionError("the scale-attention network is in training mode: call eval() first")
    with torch.inference_mode():
        total = network.attend(images, tau)
        if views >= 2:
            total = total + _attend_half(network, images, tau)
        for symmetry in RIGID_VIEWS[: max(0, views - 2)]:
            turned = apply_symmetry(images, symmetry).contiguous()
            total = total + undo_symmetry(network.attend(turned, tau), symmetry)
        return total / views


def check_views(views: int) -> None:
    """Refuse a number of views out of range."""
    if isinstance(views, bool) or not isinstance(views, int) or not 1 <= views <= MOST_VIEWS:
        raise ScaleAttentionError(f"views must be a whole number from 1 to {MOST_VIEWS}, not {views!r}")


def context_margin(settings: ScaleAttentionSettings, views: int) -> int:
    """Pixels around a window beyond which nothing matters to :func:`attend_views` inside it; even.

    The half of the picture sees twice as far, and enlarging looks at the neighbours.
    """
    check_views(views)
    margin = settings.reach if views < 2 else 2 * (settings.reach + 1)
    return margin + margin % 2


def attend_windows(
    read: Callable[[int, int, int, int], Tensor],
    network: ScaleAttention,
    size: tuple[int, int],
    keep: Callable[[int, int, Tensor], None],
    window: int = 1024,
    views: int = 8,
    tau: Tensor | float | None = None,
) -> None:
    """:func:`attend_views` of a large picture, window by window; the size of the window does not change the values.

    Each window is read with :func:`context_margin` around it, cut off at the picture's border, where the network
    must see the same border as it does on the whole.

    Args:
        read: takes top, left, height, width and gives that part as (1, 3, height, width), normalised, on the device
            of the network.
        network: in eval mode, trained.
        size: (H, W) of the picture.
        keep: takes top, left and the attention of a window, float32 (h, w).
        window: side of a window without its margin, even.
        views: as for :func:`attend_views`.
        tau: as for :func:`attend_views`; one serves all windows.

    Raises:
        ScaleAttentionError: ``window`` is not even and positive, or as :func:`attend_views`.
    """
    if window < 2 or window % 2:
        raise ScaleAttentionError(f"a window must have an even side of at least 2 pixels, not {window}")
    margin = context_margin(network.settings, views)
    height, width = size
    for top in range(0, height, window):
        for left in range(0, width, window):
            bottom, right = min(height, top + window), min(width, left + window)
            y, x = max(0, top - margin), max(0, left - margin)  # even, so that halves lie on one lattice
            part = read(y, x, min(height, bottom + margin) - y, min(width, right + margin) - x)
            attention = attend_views(network, part, views, tau)[0, 0]
            keep(top, left, attention[top - y : bottom - y, left - x : right - x])


def _attend_half(network: ScaleAttention, images: Tensor, tau: Tensor | float | None) -> Tensor:
    """Attention of the halved picture, enlarged to its size; an odd side is first continued by its last pixel."""
    height, width = images.shape[-2:]
    even = pad(images, (0, width % 2, 0, height % 2), mode="replicate")
    small = network.attend(halve(even), tau)
    large = interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    return large[..., :height, :width]
