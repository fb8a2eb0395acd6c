"""Encoders: tiles in, features out. The table lists without torch; networks load when one is created."""

from __future__ import annotations

import difflib

from wsi_engine.encoders.base import IMAGENET_MEAN, IMAGENET_STD, Encoder, EncoderCard, Pooling
from wsi_engine.encoders.cards import DEEP_ENCODERS, TEXTURE, find_card, list_encoders
from wsi_engine.errors import EncoderError

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Encoder",
    "EncoderCard",
    "Pooling",
    "create_encoder",
    "describe_encoder",
    "list_encoders",
]


def create_encoder(
    name: str,
    weights: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    tiles: int | None = None,
) -> Encoder:
    """Make an encoder that is ready to encode.

    Args:
        name: a name of :func:`list_encoders`, or ``timm:NAME`` for any model of timm.
        weights: None for the published weights, ``random:SEED`` for a smoke test, or the path of a
            ``.safetensors`` or ``.pt`` file.
        device: ``auto`` (a CUDA device where there is one), or a device by torch's name.
        precision: ``auto`` (the fastest that the device computes in natively), ``fp32``, ``bf16`` or ``fp16``, and any
            of them with ``+compile``.
        tiles: how many tiles are to be encoded, about; ``auto`` compiles for a long job.

    Raises:
        EncoderError: the name is unknown or the device absent.
        WeightsError: the weights are missing, unreadable or of the wrong shape.

    Example:
        >>> encoder = create_encoder("resnet50", weights="random:0", device="cpu")
        >>> encoder.encode(np.zeros((2, 256, 256, 3), np.uint8)).shape
        (2, 1024)
    """
    if name == TEXTURE:
        if weights is not None:
            raise EncoderError(f"encoder {name!r} computes its features and has no weights; leave `--weights` out")
        from wsi_engine.encoders.texture import TextureEncoder  # noqa: PLC0415  # loads Numba

        return TextureEncoder()
    card = describe_encoder(name)
    from wsi_engine.encoders.deep import DeepEncoder  # noqa: PLC0415  # loads torch and timm

    return DeepEncoder(card, weights=weights, device=device, precision=precision, tiles=tiles)


def describe_encoder(name: str) -> EncoderCard:
    """The card of an encoder with a network, by the name that :func:`create_encoder` takes; no weights are loaded.

    Raises:
        EncoderError: the name is unknown, or its encoder has no network.
    """
    if name == TEXTURE:
        raise EncoderError(f"encoder {name!r} computes its features and has no network; choose one that has")
    card = find_card(name)
    if card is not None:
        return card
    if not name.startswith("timm:"):
        raise _unknown(name)
    from wsi_engine.encoders.timm_names import describe_timm  # noqa: PLC0415  # loads torch and timm

    return describe_timm(name)


def _unknown(name: str) -> EncoderError:
    """The error for a name that no encoder has, with the names most like it."""
    names = [TEXTURE, *(card.name for card in DEEP_ENCODERS)]
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}, " if close else "a model of timm is called timm:NAME, "
    return EncoderError(f"there is no encoder called {name!r}; {hint}run `wsi encoders` for the list")
