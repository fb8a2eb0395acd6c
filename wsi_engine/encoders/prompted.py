"""Encoders that were tuned to a task: a frozen transformer with prompts inside, or a fine-tuned network, from a file.

What such an encoder is called in a store is its backbone's name, a plus sign and the first eight digits of its digest,
so that prompted and plain features, and those of two folds, are never taken for one another.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from wsi_engine.encoders import describe_encoder
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.encoders.deep import DeepEncoder
from wsi_engine.encoders.weights import digest_state
from wsi_engine.errors import EncoderError, SettingsError
from wsi_engine.models.cards import CardFile
from wsi_engine.models.prompt import PromptedViT, PromptError
from wsi_engine.models.prompt_files import PROMPT_FILE, load_prompts

log = logging.getLogger("wsi_engine")

TUNED_FILE = CardFile(
    what="a tuned encoder",
    key="wsi_engine.encoder",
    version=1,
    entries={"encoder": str},
    writer="wsi train prompt --mode finetune",
    refused=PromptError,
    unreadable=PromptError,
)


class PromptedBackbone(nn.Module):
    """A backbone with prompts, network and prompts both inside, so that both move and are converted together."""

    def __init__(self, prompted: PromptedViT) -> None:
        super().__init__()
        self.network = prompted.backbone
        self.prompted = prompted

    def forward(self, tiles: Tensor) -> Tensor:
        """(B, 3, H, W) normalised float to (B, D)."""
        features: Tensor = self.prompted(tiles)
        return features


class PromptedEncoder(DeepEncoder):
    """An encoder with the prompts of a file inside. Arguments are those of :class:`DeepEncoder`.

    Its card's ``options`` tell ``prompts`` (how many), ``deep``, ``prompts_digest`` and ``backbone_digest``;
    ``weights_digest`` binds all of them.

    Raises:
        EncoderError: the file holds no prompts, or those of another backbone.
    """

    def __init__(
        self,
        card: EncoderCard,
        prompts: str | os.PathLike[str],
        weights: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        tiles: int | None = None,
    ) -> None:
        self._prompts_file = Path(prompts)
        super().__init__(card, weights, device, precision, tiles)

    def _load(self, card: EncoderCard, weights: str | None) -> tuple[nn.Module, EncoderCard]:
        backbone, loaded = super()._load(card, weights)
        try:
            prompted = load_prompts(self._prompts_file, cast(nn.Module, backbone.network), loaded.weights_digest)
        except PromptError as error:
            raise EncoderError(str(error)) from error
        return PromptedBackbone(prompted), describe_prompted(loaded, prompted, self._prompts_file.name)


class TunedEncoder(DeepEncoder):
    """An encoder with the fine-tuned weights of a file. Arguments are those of :class:`DeepEncoder`."""

    def _load(self, card: EncoderCard, weights: str | None) -> tuple[nn.Module, EncoderCard]:
        backbone, loaded = super()._load(card, weights)
        return backbone, replace(loaded, name=f"{card.name}+{loaded.weights_digest[:8]}")


def describe_prompted(card: EncoderCard, prompted: PromptedViT, origin: str) -> EncoderCard:
    """The card of an encoder with prompts inside, from the loaded card of its backbone."""
    prompts_digest = digest_state({"prompts": prompted.prompts})
    text = "\0".join((card.weights_digest, str(prompted.deep), prompted.pooling, prompts_digest))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return replace(
        card,
        name=f"{card.name}+{digest[:8]}",
        options=(
            *card.options, ("prompts", prompted.count), ("deep", prompted.deep), ("prompts_digest", prompts_digest),
            ("backbone_digest", card.weights_digest),
        ),
        weights=f"{card.weights}, prompts:{origin}",
        weights_digest=digest,
    )  # fmt: skip


def tune_backbone(backbone: nn.Module, blocks: int | None) -> nn.Module:
    """A copy of a transformer's backbone whose last ``blocks`` layers, and the norms behind them, learn; None: all.

    Raises:
        EncoderError: it is no transformer.
        SettingsError: it has not so many layers.
    """
    network = cast(Any, backbone).network
    layers = getattr(network, "blocks", None)
    if layers is None or not hasattr(network, "norm"):  # stages of a convolutional network may be called blocks too
        raise EncoderError(
            f"fine-tuning needs a vision transformer, and {type(network).__name__} is none; choose an encoder such as "
            "vit_small_patch16_224"
        )
    if blocks is not None and blocks > len(layers):
        raise SettingsError(f"tune_blocks is {blocks} and the encoder has {len(layers)} blocks; take fewer")
    tuned = copy.deepcopy(backbone).requires_grad_(blocks is None)
    if blocks is not None:
        inner = cast(Any, tuned).network
        for part in (*inner.blocks[len(layers) - blocks :], inner.norm, getattr(inner, "fc_norm", None)):
            if part is not None:
                part.requires_grad_(True)
    return tuned


def save_tuned(backbone: nn.Module, path: str | os.PathLike[str], card: Mapping[str, Any]) -> None:
    """Write a fine-tuned backbone, replacing ``path`` in one step; its weights load like any of that encoder.

    Args:
        backbone: what :func:`tune_backbone` gave.
        path: the file to write.
        card: what to keep beside the weights, plain values; ``encoder`` is its name.

    Raises:
        PromptError: the card holds what JSON cannot.
        OSError: the file cannot be written.
    """
    state = cast(Any, backbone).network.state_dict()
    extra = {name: value for name, value in card.items() if name != "encoder"}
    TUNED_FILE.write(path, state, {"encoder": card["encoder"]}, extra)


def read_tuned_card(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The card of a file of prompts, or of a fine-tuned encoder; its ``encoder`` names the backbone.

    Raises:
        EncoderError: there is no such file, it is damaged, or it is neither.
    """
    try:
        source = PROMPT_FILE.find(file)
        tuned = TUNED_FILE.find_card(source)
        return tuned if tuned is not None else PROMPT_FILE.read_card(source)
    except PromptError as error:
        raise EncoderError(str(error)) from error


def check_tuned(file: str | os.PathLike[str], name: str | None, mpp: float, tile_px: int) -> str | None:
    """Check that a file fits what is asked for, before anything is loaded; a warning where tiles are of another scale.

    Args:
        file: prompts, or a fine-tuned encoder.
        name: the encoder asked for; None for the file's own.
        mpp: micrometres per tile pixel.
        tile_px: side of a tile.

    Returns:
        What its features are called; None where the file does not tell.

    Raises:
        EncoderError: it is no such file, or made for another encoder.
    """
    return _check_card(read_tuned_card(file), file, name, mpp, tile_px)


def _check_card(
    card: Mapping[str, Any], file: str | os.PathLike[str], name: str | None, mpp: float, tile_px: int
) -> str | None:
    """As :func:`check_tuned`, of a card that is read."""
    own = card.get("encoder")
    if not isinstance(own, str):
        raise EncoderError(f"{file} does not name its encoder; give a file that wsi train prompt wrote")
    if name is not None and name != own:
        raise EncoderError(f"{file} was made for the encoder {own}, not for {name}; name that one, or none")
    had = card.get("mpp", mpp), card.get("tile_px", tile_px)
    if had != (mpp, tile_px):
        log.warning("%s was trained on tiles of %s px at %s mpp, not of %s px at %s mpp", file, had[1], had[0],
                    tile_px, mpp)  # fmt: skip
    features = card.get("features")
    return features if isinstance(features, str) else None


def create_tuned_encoder(
    file: str | os.PathLike[str],
    name: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    tiles: int | None = None,
) -> DeepEncoder:
    """Make the encoder of a file of prompts, or of fine-tuned weights, ready to encode.

    Args:
        file: ``prompts.safetensors`` or ``encoder.safetensors`` of a run of ``wsi train prompt``.
        name: the backbone's name where it is to be checked; None takes it from the file.
        weights: of the backbone, for prompts, as ``create_encoder`` takes them.
        device: where it runs.
        precision: what it computes in.
        tiles: how many are to be encoded, about.

    Raises:
        EncoderError: the file is none of these, or made for another backbone or other weights of it.
        WeightsError: the weights are missing, unreadable or of the wrong shape.
    """
    card = read_tuned_card(file)
    _check_card(card, file, name, card.get("mpp", 0.0), card.get("tile_px", 0))
    described = describe_encoder(card["encoder"])
    if "prompts" in card:
        return PromptedEncoder(described, file, weights, device, precision, tiles)
    return TunedEncoder(described, os.fspath(file), device, precision, tiles)
