"""Prompts on disk: one safetensors file with a card, bound to the weights of the backbone that they were trained in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from wsi_engine.models.cards import CardFile
from wsi_engine.models.prompt import PromptedViT, PromptError

PROMPT_FILE = CardFile(
    what="prompts",
    key="wsi_engine.prompts",
    version=1,
    entries={"prompts": int, "deep": bool, "pooling": str, "width": int, "layers": int, "backbone": str},
    writer="save_prompts",
    refused=PromptError,
    unreadable=PromptError,
)


def save_prompts(
    module: PromptedViT, path: str | os.PathLike[str], backbone_digest: str, card: Mapping[str, Any] | None = None
) -> None:
    """Write the prompts of a module as one safetensors file, replacing ``path`` in one step.

    Args:
        module: the prompted backbone; the backbone's weights are not written.
        path: the file to write.
        backbone_digest: SHA-256 of the backbone's state dict, as an encoder's card gives it (``weights_digest``).
        card: what else to keep (encoder, head, training summary), anything JSON takes; the entries version, prompts,
            deep, pooling, width, layers and backbone are the prompts' own.

    Raises:
        PromptError: no digest; the card claims an entry that is the prompts' own, or holds what JSON cannot.
        OSError: the file cannot be written.
    """
    own = _describe(module, _check_digest(backbone_digest))
    PROMPT_FILE.write(path, {"prompts": module.prompts}, own, card)


def read_prompts_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The card of prompts that :func:`save_prompts` wrote, without the tensors; its ``backbone`` is the digest.

    Raises:
        PromptError: no such file, not readable as safetensors, or without a card of prompts.
    """
    return PROMPT_FILE.read_card(path)


def load_prompts(path: str | os.PathLike[str], backbone: nn.Module, backbone_digest: str) -> PromptedViT:
    """Put the prompts of a file into their backbone.

    Args:
        path: a file that :func:`save_prompts` wrote.
        backbone: the network that they were trained in, with the same weights.
        backbone_digest: SHA-256 of its state dict, as an encoder's card gives it (``weights_digest``).

    Returns:
        The prompted backbone, in eval mode; prompts are float32, on the backbone's device. No random numbers are drawn.

    Raises:
        PromptError: no such file, unreadable, damaged, or prompts of another backbone.
    """
    source = PROMPT_FILE.find(path)
    state, found = PROMPT_FILE.read(source)
    card = PROMPT_FILE.require(found, source)
    if card["backbone"] != _check_digest(backbone_digest):
        raise PromptError(
            f"{source} holds prompts for the backbone with weights {card['backbone'][:12]} and this one has "
            f"{backbone_digest[:12]}; load the weights that they were trained with"
        )
    with torch.random.fork_rng(devices=[]):
        module = PromptedViT(backbone, card["prompts"], card["deep"], card["pooling"])
    expected = _describe(module, backbone_digest)
    different = [name for name, value in expected.items() if card[name] != value]
    if different:
        name = different[0]
        raise PromptError(
            f"{source} holds prompts for a backbone with {name} {card[name]!r} and this one has {expected[name]!r}; "
            "build the backbone that they were trained in"
        )
    tensors = PROMPT_FILE.fit(state, {"prompts": module.prompts}, str(source))
    with torch.no_grad():
        module.prompts.copy_(tensors["prompts"])
    return module.eval()


def _describe(module: PromptedViT, digest: str) -> dict[str, Any]:
    """The entries of the card that are the prompts' own."""
    return {
        "prompts": module.count,
        "deep": module.deep,
        "pooling": module.pooling,
        "width": module.prompts.shape[2],
        "layers": len(module.backbone.blocks),
        "backbone": digest,
    }


def _check_digest(digest: str) -> str:
    if not isinstance(digest, str) or not digest:
        raise PromptError(f"the backbone's digest must be the SHA-256 of its weights as text, not {digest!r}")
    return digest
