"""Scale attention: a network that finds nuclei because it must tell a picture's scale through a sparse attention map.

Source: M. Sahasrabudhe et al., "Self-supervised nuclei segmentation in histopathological images using attention",
MICCAI 2020, section 2. F gives a logit per pixel; A = sigmoid(r · (F(I) - τ)), where τ is chosen so that a share of
the pixels is above it; G tells from A ⊙ I at which of three scales I was seen. What tells scales apart in a few
pixels is nuclei, so A comes to lie on them. Training sees no mask.

Tensors of F carry the names of the paper's own code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wsi_engine.models.backbones import build_backbone
from wsi_engine.models.seeding import seeded

DILATIONS = (1, 2, 3, 5, 10, 20)
"""Of both convolutions of each residual block."""

SCALES_MPP = (0.25, 0.5, 1.0)
"""Micrometres per pixel of the classes of G: 40x, 20x, 10x."""

_KEPT = 0.9
"""Share of the running τ that a training batch leaves."""

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
"""Of ImageNet, in R, G, B, for values within 0-1."""


class ScaleAttentionError(ValueError):
    """A scale-attention network cannot be built, kept or read, or cannot take these pixels."""


@dataclass(frozen=True)
class ScaleAttentionSettings:
    """How a scale-attention network is built; the defaults are the paper's.

    Attributes:
        width: channels of F.
        dilations: of the residual blocks of F.
        sharpness: r, the slope of the sigmoid.
        share: part of the pixels that attention should be above one half on, above 0 and below 1.
    """

    width: int = 64
    dilations: tuple[int, ...] = DILATIONS
    sharpness: float = 20.0
    share: float = 0.07

    def __post_init__(self) -> None:
        for name, values in (("width", (self.width,)), ("dilations", self.dilations)):
            if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
                raise ScaleAttentionError(f"{name} must be whole numbers of at least 1, not {getattr(self, name)!r}")
        if not (self.sharpness > 0 and math.isfinite(self.sharpness)):
            raise ScaleAttentionError(f"sharpness must be above 0, not {self.sharpness!r}")
        if not 0 < self.share < 1:
            raise ScaleAttentionError(f"share must be above 0 and below 1, not {self.share!r}")

    @property
    def receptive_field(self) -> int:
        """Side in pixels of the square that one value of attention depends on: 167 for the paper's network."""
        return 1 + 2 + 4 * sum(self.dilations)

    @property
    def reach(self) -> int:
        """Pixels on either side that a value of attention depends on: 83 for the paper's network."""
        return self.receptive_field // 2


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """What a forward pass of F gives: ``logits`` and ``attention`` float32 (B, 1, H, W), ``tau`` ()."""

    logits: Tensor
    tau: Tensor
    attention: Tensor


class _Stem(nn.Module):
    """The first convolution of F."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, width, H, W)."""
        features: Tensor = self.main(images)
        return features


class _Block(nn.Module):
    """A residual block of F that keeps the size."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.res = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, width, H, W) to the same."""
        return torch.relu(features + self.res(features))


class AttentionNet(nn.Sequential):
    """F: an attention logit for each pixel of a picture of any size."""

    def __init__(self, settings: ScaleAttentionSettings) -> None:
        blocks = [_Block(settings.width, dilation) for dilation in settings.dilations]
        super().__init__(_Stem(settings.width), *blocks, nn.Conv2d(settings.width, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised to float32 (B, 1, H, W), also where convolutions run in bf16."""
        features = images
        for part in list(self)[:-1]:
            features = part(features)
        with torch.autocast(images.device.type, enabled=False):  # r multiplies what bf16 would round away
            logits: Tensor = self[-1](features.float())
        return logits


def threshold_of(logits: Tensor, share: float) -> Tensor:
    """τ of a batch: the mean over its pictures of the logit that the given share of their pixels is above.

    Of n = H · W logits in descending order, counted from 0, it is number ⌊share · n⌋.

    Args:
        logits: (B, 1, H, W).
        share: part of the pixels above τ.

    Returns:
        A scalar without gradient.
    """
    flat = logits.detach().flatten(1)  # (B, H·W)
    above = math.floor(share * flat.shape[1])
    return flat.topk(above + 1, dim=1).values[:, above].mean()


def sharpen(logits: Tensor, tau: Tensor | float, sharpness: float) -> Tensor:
    """Attention within 0-1: the sigmoid of ``sharpness`` times the distance of the logits from ``tau``."""
    return torch.sigmoid(sharpness * (logits - tau))


class ScaleAttention(nn.Module):
    """F and τ: pixels in, attention out.

    In training τ is that of the batch, and a running mean of it is kept; in eval mode the running mean is used.
    """

    tau: Tensor

    def __init__(self, settings: ScaleAttentionSettings | None = None, seed: int | None = None) -> None:
        """Fresh weights; with ``seed`` they depend on it alone and the caller's random state is left as it was."""
        super().__init__()
        self.settings = settings or ScaleAttentionSettings()
        with seeded(seed):
            self.attention_net = AttentionNet(self.settings)
        self.register_buffer("tau", torch.tensor(float("nan")))  # until a batch has been seen

    def forward(self, images: Tensor) -> AttentionMaps:
        """(B, 3, H, W) normalised.

        Raises:
            ScaleAttentionError: in eval mode, the network was never trained.
        """
        logits = self.attention_net(images)
        tau = self._take_in(threshold_of(logits, self.settings.share)) if self.training else self.known_tau()
        return AttentionMaps(logits, tau, sharpen(logits, tau, self.settings.sharpness))

    def attend(self, images: Tensor, tau: Tensor | float | None = None) -> Tensor:
        """Attention alone, (B, 3, H, W) to float32 (B, 1, H, W), with ``tau`` or else the running one.

        Raises:
            ScaleAttentionError: no τ was given and the network was never trained.
        """
        return sharpen(self.attention_net(images), self.known_tau() if tau is None else tau, self.settings.sharpness)

    def known_tau(self) -> Tensor:
        """The running τ, a scalar.

        Raises:
            ScaleAttentionError: no batch was seen in training.
        """
        if torch.isnan(self.tau):
            raise ScaleAttentionError("the scale-attention network was never trained: train it or load trained weights")
        return self.tau

    def _take_in(self, tau: Tensor) -> Tensor:
        """The same τ; the running mean takes it in."""
        mixed = _KEPT * self.tau + (1 - _KEPT) * tau
        self.tau.copy_(torch.where(torch.isnan(self.tau), tau, mixed))
        return tau


class ScaleClassifier(nn.Module):
    """G: which of the three scales a picture was seen at, judged through its attention. Used in training alone."""

    def __init__(self, seed: int | None = None) -> None:
        """A ResNet34 with fresh weights; put published ones into ``backbone.network``, under timm's names."""
        super().__init__()
        with seeded(seed):
            self.backbone = build_backbone("resnet34")
            self.classifier = nn.Linear(512, len(SCALES_MPP))

    def forward(self, images: Tensor, attention: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) and attention (B, 1, H, W) to logits float32 (B, 3)."""
        pooled = self.backbone(attention * images)  # (B, 512)
        logits: Tensor = self.classifier(pooled)
        return logits.float()


def normalise_pixels(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) as the network takes it."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ScaleAttentionError(
            f"pixels must be uint8 of shape (B, H, W, 3), not {pixels.dtype} of shape {tuple(pixels.shape)}"
        )
    mean = torch.tensor(PIXEL_MEAN, device=pixels.device)
    std = torch.tensor(PIXEL_STD, device=pixels.device)
    scaled = (pixels.float() / 255 - mean) / std
    return scaled.permute(0, 3, 1, 2)
