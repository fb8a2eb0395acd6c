"""Backbones: normalised tiles in, one vector per tile out, built by timm from a name and literal options.

A backbone's weights are those of its ``network``, under timm's own names, so a state dict saved from
timm loads here and the other way round.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

import timm
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from wsi_engine.models.seeding import seeded

_LAYER_CLASSES = {"mlp_layer": timm.layers}
"""Options whose value is a class in timm and the class's name here, so that options stay plain JSON."""


class FeatureMapBackbone(nn.Module):
    """A network cut after one of its stages; the feature map is averaged over its positions.

    CLAM's ResNet50 is this one, cut after ``layer3`` (Lu et al., Nature BME 2021, Methods).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tiles: Tensor) -> Tensor:
        """(B, 3, H, W) normalised float to (B, D)."""
        feature_map = self.network(tiles)[-1]  # (B, D, h, w)
        return adaptive_avg_pool2d(feature_map, 1).flatten(1)


class TokenBackbone(nn.Module):
    """A vision transformer whose tokens, after the last norm, are made into one vector by :func:`pool_tokens`."""

    def __init__(self, network: nn.Module, pooling: str) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling
        self.prefix_tokens = int(network.num_prefix_tokens)  # type: ignore[arg-type]

    def forward(self, tiles: Tensor) -> Tensor:
        """(B, 3, H, W) normalised float to (B, D)."""
        tokens = self.network.forward_features(tiles)  # type: ignore[operator]  # (B, T, D)
        return pool_tokens(tokens, self.pooling, self.prefix_tokens)


class PooledBackbone(nn.Module):
    """Any timm network without its classifier, pooled as timm pools it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tiles: Tensor) -> Tensor:
        """(B, 3, H, W) normalised float to (B, D)."""
        features: Tensor = self.network(tiles)
        return features


Backbone: TypeAlias = FeatureMapBackbone | TokenBackbone | PooledBackbone


def pool_tokens(tokens: Tensor, pooling: str, prefix_tokens: int) -> Tensor:
    """One vector from the tokens of each tile.

    Args:
        tokens: (B, T, D); the class token first, then register tokens, then tile tokens.
        pooling: ``cls`` (the class token), ``mean`` (of the tile tokens) or ``cls+mean`` (both joined).
        prefix_tokens: how many tokens come before the tile tokens.

    Returns:
        (B, D), or (B, 2 D) for ``cls+mean``.
    """
    if pooling == "cls":
        return tokens[:, 0]
    mean = tokens[:, prefix_tokens:].mean(dim=1)
    if pooling == "mean":
        return mean
    if pooling == "cls+mean":
        return torch.cat([tokens[:, 0], mean], dim=-1)
    raise ValueError(f"tokens are pooled by cls, mean or cls+mean, not {pooling!r}")


def build_backbone(
    architecture: str,
    options: Mapping[str, Any] | None = None,
    pooling: str = "token",
    seed: int | None = None,
    device: str | torch.device = "cpu",
) -> Backbone:
    """Build a backbone with fresh weights, in eval mode.

    Args:
        architecture: timm's name of the model.
        options: further arguments of ``timm.create_model``; ``features_only=True`` with ``out_indices``
            cuts the network after a stage. A layer class is given by its name in ``timm.layers``.
        pooling: ``mean`` of a cut network's map or of tile tokens, ``cls``, ``cls+mean``, or ``token``
            (timm's own pooling).
        seed: where timm's initialisation starts, as ``torch.manual_seed(seed)`` would set it just before
            ``timm.create_model``. The caller's random state is left as it was. None: the caller's state.
        device: where the weights are made; ``meta`` makes shapes without memory.

    Raises:
        RuntimeError: timm does not know the architecture.
        TypeError: the architecture does not take one of the options.
    """
    arguments = {name: _layer_class(name, value) for name, value in (options or {}).items()}
    cut = bool(arguments.get("features_only", False))
    if not cut:
        arguments.setdefault("num_classes", 0)
    with seeded(seed), torch.device(device):
        network = timm.create_model(architecture, pretrained=False, **arguments)
    if cut:
        return FeatureMapBackbone(network).eval()
    return PooledBackbone(network).eval() if pooling == "token" else TokenBackbone(network, pooling).eval()


def convert_published(backbone: Backbone, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring a checkpoint that timm publishes to the names of the network, by timm's own rules for its kind."""
    convert = getattr(sys.modules[type(backbone.network).__module__], "checkpoint_filter_fn", None)
    return dict(state) if convert is None else dict(convert(dict(state), backbone.network))


def _layer_class(name: str, value: Any) -> Any:
    """The class behind a layer's name; other values as they are."""
    return getattr(_LAYER_CLASSES[name], value) if name in _LAYER_CLASSES and isinstance(value, str) else value
