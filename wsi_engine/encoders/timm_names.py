"""Cards for ``timm:NAME``: any model of timm, described by what timm itself says about it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, split_model_name_tag

from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import EncoderError
from wsi_engine.models.backbones import build_backbone

PREFIX = "timm:"


def describe_timm(name: str) -> EncoderCard:
    """The card of ``timm:NAME``: size, normalisation and licence from timm, dim from the network itself.

    A network that timm says takes any size is shown tiles as they are; others get the size of their weights.

    Raises:
        EncoderError: timm has no such model, or it does not turn an RGB tile into one vector.
    """
    architecture = name.removeprefix(PREFIX)
    _check_known(name, architecture)
    published = get_pretrained_cfg(architecture)
    if published is None:
        raise EncoderError(f"timm describes no input for {name!r}; choose another model of timm")
    channels, height, _ = published.input_size
    interpolation: Literal["bilinear", "bicubic"] = "bilinear" if published.interpolation == "bilinear" else "bicubic"
    return EncoderCard(
        name=name,
        builder="timm",
        architecture=architecture,
        input_px=height if published.fixed_input_size else 0,
        interpolation=interpolation,
        mean=_three(published.mean),
        std=_three(published.std),
        pooling="token",
        dim=_measure_dim(name, architecture, channels, height),
        licence=published.license or "not stated",
        source=published.hf_hub_id if isinstance(published.hf_hub_id, str) else "",
    )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    """One number per colour."""
    red, green, blue = values
    return float(red), float(green), float(blue)


def _check_known(name: str, architecture: str) -> None:
    """Refuse names that timm does not list, and tags of weights that it does not have."""
    plain, tag = split_model_name_tag(architecture)
    if "/" in architecture or not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), n=3, cutoff=0.6)
        hint = f", did you mean {' or '.join(PREFIX + one for one in close)}" if close else ""
        raise EncoderError(f"timm has no model for {name!r}{hint}; timm.list_models() has them all")
    tags = [one.partition(".")[2] for one in get_arch_pretrained_cfgs(plain)]
    if tag and tag not in tags:
        raise EncoderError(f"timm has no weights tagged {tag!r} for {plain}; it has {', '.join(filter(None, tags))}")


def _measure_dim(name: str, architecture: str, channels: int, height: int) -> int:
    """Length of the vector that the network makes of one tile, found without memory or arithmetic."""
    try:
        with torch.inference_mode():
            backbone = build_backbone(architecture, device="meta")
            features = backbone(torch.empty(1, channels, height, height, device="meta"))
        if channels != 3 or features.ndim != 2:
            raise ValueError(f"(1, {channels}, {height}, {height}) became {tuple(features.shape)}")
    except Exception as error:
        raise EncoderError(f"{name!r} does not turn an RGB tile into one vector; choose another model") from error
    return int(features.shape[1])
