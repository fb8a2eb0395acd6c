"""Weights of encoders: from the hub, from a file, or random; checked name by name, and digested.

Files are read without running anything in them: ``.safetensors`` holds tensors only, and pickled files
are opened with ``weights_only=True``, which refuses every other object.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from wsi_engine.encoders.base import EncoderCard
from wsi_engine.encoders.hub import fetch_weights
from wsi_engine.errors import WeightsError, first_line
from wsi_engine.models.backbones import Backbone, build_backbone, convert_published
from wsi_engine.models.dinov2 import convert_dinov2, is_transformers_dinov2

log = logging.getLogger("wsi_engine")

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
NESTS = ("state_dict", "model_state_dict", "model", "teacher")
PREFIXES = ("module.", "model.", "backbone.", "encoder.", "dinov2.")
UNUSED = ("fc.", "head.", "head_dist.", "classifier.", "dino_head.", "ibot_head.", "mask_token", "layer4.")
"""Names left out where the network has none of them: classifiers, training heads, and what CLAM's cut removes."""

MAX_SEED = 2**63 - 1


def load_backbone(card: EncoderCard, weights: str | None) -> tuple[Backbone, str]:
    """Build the network of ``card`` and give it weights.

    Args:
        card: what to build.
        weights: None or ``hub`` for the published weights, ``random:SEED`` for fresh ones, else the path of a file.

    Returns:
        The backbone on the CPU in float32 and eval mode, and where its weights came from:
        ``hub:REPOSITORY``, ``random:SEED`` or ``file:NAME``.

    Raises:
        WeightsError: the weights are missing, unreadable, or do not fit the network.
    """
    if weights is None or weights == "hub":
        path, origin = fetch_weights(card), f"hub:{card.source}"
        convert: Callable[..., dict[str, Tensor]] | None = convert_published if _is_timms_own(card) else None
    elif weights.startswith("random:"):
        seed = parse_seed(weights)
        log.warning(
            "Encoder %s has RANDOM weights (%s): its features are good for smoke tests only.", card.name, weights
        )
        return build_backbone(card.architecture, dict(card.options), card.pooling, seed=seed), f"random:{seed}"
    else:
        path, convert = Path(weights), None
        origin = f"file:{path.name}"
    return _fill_backbone(card, path, convert), origin


def parse_seed(weights: str) -> int:
    """The seed of ``random:SEED``."""
    match = re.fullmatch(r"random:(\d+)", weights, flags=re.ASCII)
    if match is None or int(match[1]) > MAX_SEED:
        raise WeightsError(
            f"random weights are asked for by random:SEED with a whole number from 0 to {MAX_SEED}, not {weights!r}; "
            "use for example random:0"
        )
    return int(match[1])


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` or pickled file, without running anything in it.

    A state dict nested under ``state_dict``, ``model`` or ``teacher`` is found; what is not a tensor is left out.

    Raises:
        WeightsError: no such file, an unknown kind, unreadable, or no tensors in it.
    """
    if not path.is_file():
        raise WeightsError(
            f"there is no file of weights at {path}; give a .safetensors or {'/'.join(PICKLED)} file, or random:SEED"
        )
    content: Any
    if path.suffix == ".safetensors":
        try:
            content = safetensors.torch.load_file(path)
        except Exception as error:
            raise WeightsError(
                f"{path} cannot be read as safetensors ({first_line(error)}); download it again"
            ) from error
    elif path.suffix in PICKLED:
        content = _read_pickled(path)
    else:
        raise WeightsError(
            f"{path} has the ending {path.suffix or '(none)'}; weights are read from .safetensors or "
            f"{'/'.join(PICKLED)} files"
        )
    state = _find_tensors(content)
    if not state:
        raise WeightsError(f"{path} holds no tensors by name; save the state dict of the network and give that file")
    return state


def fit_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of ``state`` that the network asks for, float32, under the network's names.

    Prefixes that wrappers add are taken off, classifiers left out, and names that transformers gives DINOv2
    translated. ``expected`` is the network's state dict (a meta device will do); ``path`` is for messages.

    Raises:
        WeightsError: names the file, and the first tensor of the wrong shape, missing or unknown.
    """
    found = _align_names(state, expected)
    for name, tensor in found.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise WeightsError(
                f"{path} holds weights of the wrong shape: {name} is {_shape(tensor)} where the encoder needs "
                f"{_shape(expected[name])}; give the weights of this encoder or choose the encoder they belong to"
            )
    missing = [name for name in expected if name not in found and not is_counter(name)]
    if missing:
        raise WeightsError(
            f"{path} lacks {len(missing)} of the {len(expected)} tensors the encoder needs, the first is {missing[0]}; "
            "give the weights of this encoder or choose the encoder they belong to"
        )
    unknown = [name for name in found if name not in expected]
    if unknown:
        raise WeightsError(
            f"{path} holds {len(unknown)} tensors that the encoder has no place for, the first is {unknown[0]}; "
            "give the weights of this encoder or choose the encoder they belong to"
        )
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def digest_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict: names, dtypes, shapes and little-endian bytes, sorted by name.

    It depends on the values alone, not on the file they came from. Counters of batches seen in training,
    which inference does not read, are left out.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in state if not is_counter(name)):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        if sys.byteorder == "big":
            raw = raw.reshape(-1, tensor.element_size())[:, ::-1].copy()
        digest.update(raw.data)
    return digest.hexdigest()


def is_counter(name: str) -> bool:
    """Whether a tensor only counts the batches that a normalisation layer saw in training."""
    return name.endswith("num_batches_tracked")


def _fill_backbone(card: EncoderCard, path: Path, convert: Callable[..., dict[str, Tensor]] | None) -> Backbone:
    """Build without memory, put the file's tensors in; fresh values are drawn only for what no file holds."""
    state = read_state(path)
    backbone = build_backbone(card.architecture, dict(card.options), card.pooling, device="meta")
    if convert is not None:
        state = convert(backbone, state)
    fitted = fit_state(state, backbone.network.state_dict(), path)
    backbone.network.load_state_dict(fitted, strict=False, assign=True)
    left = [*backbone.parameters(), *backbone.buffers()]
    if any(tensor.is_meta for tensor in left):
        backbone = build_backbone(card.architecture, dict(card.options), card.pooling, seed=0)
        backbone.network.load_state_dict(fitted, strict=False)
    return backbone


def _is_timms_own(card: EncoderCard) -> bool:
    """Whether the published file is timm's, so that timm's own conversion of it applies."""
    return card.source.startswith("timm/")


def _read_pickled(path: Path) -> Any:
    """What ``torch.load`` gives where only tensors and plain containers are let in."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path} is damaged or holds Python objects other than tensors, which are refused because they could run "
            "code; save the state dict alone, best as .safetensors"
        ) from error


def _find_tensors(content: Any) -> dict[str, Tensor]:
    """The innermost mapping of names to tensors."""
    while isinstance(content, Mapping):
        nested = next((content[key] for key in NESTS if isinstance(content.get(key), Mapping)), None)
        if nested is None:
            return {name: value for name, value in content.items() if isinstance(value, Tensor)}
        content = nested
    return {}


def _align_names(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under the network's names as far as that can be told, without what the network has no use for."""
    found = dict(state)
    while True:
        if is_transformers_dinov2(found) and "pos_embed" in expected:
            found = convert_dinov2(found, expected["pos_embed"].shape[1])
        found = {name: value for name, value in found.items() if name in expected or not name.startswith(UNUSED)}
        if not found or any(name in expected for name in found):
            return found
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in found)), None)
        if prefix is None:
            return found
        found = {name.removeprefix(prefix): value for name, value in found.items()}


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a single number"
