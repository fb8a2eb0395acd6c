"""Scale-attention networks on disk: F and τ in one safetensors file, with a card inside.

The classifier of scales serves training alone and is not kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsi_engine.models.cards import CardFile
from wsi_engine.models.scale_attention import SCALES_MPP, ScaleAttention, ScaleAttentionError, ScaleAttentionSettings

_MOST_CHANNELS = 1 << 16
_MOST_BLOCKS = 1000

SCALE_FILE = CardFile(
    what="a scale-attention network",
    key="wsi_engine.scale_attention",
    version=1,
    entries={"width": int, "dilations": list, "sharpness": float, "share": float, "scales_mpp": list},
    writer="wsi train nuclei",
    refused=ScaleAttentionError,
    unreadable=ScaleAttentionError,
)


def save_scale_attention(
    network: ScaleAttention, path: str | os.PathLike[str], card: Mapping[str, Any] | None = None
) -> None:
    """Write a trained network as one safetensors file, replacing ``path`` in one step.

    Args:
        network: trained, so that its τ is known.
        path: the file to write.
        card: what else to keep (data, recipe, licence), anything JSON takes.

    Raises:
        ScaleAttentionError: the network was never trained, or the card claims an entry that is the network's own.
        OSError: the file cannot be written.
    """
    network.known_tau()
    SCALE_FILE.write(path, _tensors(network), _describe(network.settings), card)


def load_scale_attention(path: str | os.PathLike[str]) -> tuple[ScaleAttention, dict[str, Any]]:
    """Read a network: on the CPU, float32, in eval mode, and its card.

    Raises:
        ScaleAttentionError: no such file, unreadable, damaged, or of another kind of model.
    """
    source = SCALE_FILE.find(path)
    state, found = SCALE_FILE.read(source)
    card = SCALE_FILE.require(found, source)
    if card["scales_mpp"] != list(SCALES_MPP):
        raise ScaleAttentionError(
            f"{source} tells the scales {card['scales_mpp']} apart and this engine's network {list(SCALES_MPP)}; "
            "use the engine that wrote it"
        )
    try:
        settings = ScaleAttentionSettings(card["width"], tuple(card["dilations"]), card["sharpness"], card["share"])
    except ScaleAttentionError as error:
        raise ScaleAttentionError(f"the card in {source} is damaged ({error}); train again") from error
    _check_sizes(settings, state, source)
    network = ScaleAttention(settings, seed=0)
    network.load_state_dict(SCALE_FILE.fit(state, _tensors(network), str(source)), strict=False)
    return network.eval(), card


def _check_sizes(settings: ScaleAttentionSettings, state: Mapping[str, Tensor], source: Path) -> None:
    """Refuse a card that asks for a network of another size than the tensors beside it, before one is built."""
    held = sum(tensor.numel() for tensor in state.values())
    wanted = 18 * settings.width**2 * len(settings.dilations)  # two convolutions of 3 × 3 a block
    if settings.width > _MOST_CHANNELS or len(settings.dilations) > _MOST_BLOCKS or wanted > max(2 * held, 1 << 20):
        raise ScaleAttentionError(
            f"the card in {source} is damaged (width {settings.width} and {len(settings.dilations)} blocks beside "
            f"{held} numbers); train again"
        )


def _tensors(network: ScaleAttention) -> dict[str, Tensor]:
    """What is kept: all but the counters of batches, which inference does not read."""
    return {name: value for name, value in network.state_dict().items() if value.dtype == torch.float32}


def _describe(settings: ScaleAttentionSettings) -> dict[str, Any]:
    """The entries of the card that are the network's own."""
    return {
        "width": settings.width,
        "dilations": list(settings.dilations),
        "sharpness": float(settings.sharpness),
        "share": float(settings.share),
        "scales_mpp": list(SCALES_MPP),
    }
