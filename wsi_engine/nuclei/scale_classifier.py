"""The weights that the classifier of scales begins with: ImageNet's, a file's, or random ones."""

from __future__ import annotations

import re
from pathlib import Path

from wsi_engine.encoders.base import EncoderCard
from wsi_engine.encoders.hub import fetch_weights
from wsi_engine.encoders.weights import fit_state, read_state
from wsi_engine.errors import WeightsError
from wsi_engine.models.scale_attention import ScaleClassifier

IMAGENET = EncoderCard(
    name="resnet34",
    builder="timm",
    architecture="resnet34",
    input_px=224,
    dim=512,
    pooling="token",
    licence="BSD-3-Clause (torchvision)",
    source="timm/resnet34.tv_in1k",
)
"""Where the published weights are."""


def create_classifier(weights: str, seed: int) -> ScaleClassifier:
    """Build the classifier with its first weights.

    Args:
        weights: ``hub`` (ImageNet), ``random``, ``random:SEED``, or the path of a ``.safetensors`` or ``.pt`` file of a
            ResNet34 with timm's or torchvision's names.
        seed: of everything that no file holds.

    Raises:
        WeightsError: the weights are missing, cannot be reached, or are those of another network.
    """
    match = re.fullmatch(r"random(?::(\d{1,18}))?", weights)
    if match:
        return ScaleClassifier(seed=int(match[1]) if match[1] else seed)
    classifier = ScaleClassifier(seed=seed)
    path = _fetch() if weights == "hub" else Path(weights)
    network = classifier.backbone.network
    network.load_state_dict(fit_state(read_state(path), network.state_dict(), path), strict=False)
    return classifier


def _fetch() -> Path:
    try:
        return fetch_weights(IMAGENET)
    except WeightsError as error:
        raise WeightsError(
            f"the ImageNet weights of the scale classifier ({IMAGENET.source}) are not in the local cache and cannot "
            "be fetched: go online, or give a file of ResNet34 weights with --weights FILE, or --weights random"
        ) from error
