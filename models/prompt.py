"""Prompts: a handful of trainable tokens inside a frozen vision transformer.

Sources: J. Zhang et al., "Prompt-MIL: boosting multi-instance learning schemes via task-specific prompt tuning",
MICCAI 2023 (arXiv 2303.12214), section 2; M. Jia et al., "Visual prompt tuning", ECCV 2022, section 3.2.

Prompts join the tokens of every tile after the position embedding, between class and register tokens and the tile's
own; they carry no position. Shallow prompts pass through all layers; deep ones are replaced by new ones before each
layer but the first. They are left out of the features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wsi_engine.models.backbones import pool_tokens

Pooling = Literal["cls", "mean", "cls+mean", "token"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


class PromptError(ValueError):
    """A backbone cannot be prompted as asked, or a bag cannot be taken; one sentence: what, where, what to do."""


class PromptedViT(nn.Module):
    """A vision transformer with prompts among its tokens: the prompts train, the transformer does not.

    The backbone is shared, not copied and not a submodule: ``parameters()``, ``state_dict()`` and ``to()`` see the
    prompts alone, and the caller moves the backbone. During a forward pass, and only then, its parameters ask for no
    gradient and it is in eval mode; afterwards its flags are as they were. So one backbone serves many prompted
    modules, but not from two threads at once.

    Attributes:
        count: prompts at a layer; 0 gives the features of the backbone alone, bit for bit.
        deep: whether every layer has prompts of its own.
        pooling: how tokens become one vector, as on an encoder's card.
        dim: numbers per tile.
        prompts: (1, count, width), or (layers, count, width) where deep; float32 unless converted.
    """

    def __init__(self, backbone: nn.Module, prompts: int, deep: bool = False, pooling: Pooling = "token") -> None:
        """Draw prompts for a backbone from U(±√(6 / (3·side² + width))), with side² the pixels of a token.

        The numbers are drawn by torch's generator of the CPU, whatever the device: ``torch.manual_seed`` repeats them.

        Args:
            backbone: a ``VisionTransformer`` of timm without a classifier, such as ``encoder.network``.
            prompts: how many at a layer.
            deep: give each layer its own.
            pooling: ``cls``, ``mean`` (of the tile's own tokens), ``cls+mean``, or ``token`` (timm's own way).

        Raises:
            PromptError: another kind of network, or one that cannot be pooled so; a bad number of prompts.
        """
        super().__init__()
        if isinstance(prompts, bool) or not isinstance(prompts, int) or prompts < 0:
            raise PromptError(f"the number of prompts must be a whole number of at least 0, not {prompts!r}")
        if not isinstance(deep, bool):
            raise PromptError(f"deep must be True or False, not {deep!r}")
        _check_backbone(backbone, pooling)
        self._held = (backbone,)  # in a tuple, where nn.Module does not look for submodules
        self.count = prompts
        self.deep = deep
        self.pooling = pooling
        network: Any = backbone
        width = int(network.embed_dim)
        self.dim = 2 * width if pooling == "cls+mean" else width
        height_px, width_px = network.patch_embed.patch_size
        bound = math.sqrt(6 / (3 * height_px * width_px + width))
        drawn = torch.empty(len(network.blocks) if deep else 1, prompts, width, device="cpu").uniform_(-bound, bound)
        self.prompts = nn.Parameter(drawn.to(next(backbone.parameters()).device), requires_grad=prompts > 0)

    @property
    def backbone(self) -> Any:
        """The network that was given."""
        return self._held[0]

    def forward(self, tiles: Tensor) -> Tensor:
        """(B, 3, H, W) normalised float to (B, D).

        Raises:
            PromptError: prompts and backbone are on different devices.
        """
        self._check_device()
        network, prefix = self.backbone, self.backbone.num_prefix_tokens
        with self._frozen():
            if self.count == 0:
                return self._plain(tiles)
            tokens = network.patch_drop(network._pos_embed(network.patch_embed(tiles)))  # (B, prefix + T, width)
            tokens = network.norm_pre(self._join(tokens, 0, start=prefix))  # (B, prefix + count + T, width)
            tokens = self._run_layers(tokens)
            tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix + self.count :]], dim=1)
            return self._pool(network.norm(tokens))

    def extra_repr(self) -> str:
        """What stands in the brackets of the module's repr."""
        return f"{type(self.backbone).__name__}, prompts={self.count}, deep={self.deep}, pooling={self.pooling!r}"

    def _plain(self, tiles: Tensor) -> Tensor:
        """The features of the backbone as it is."""
        network = self.backbone
        features: Tensor = network(tiles) if self.pooling == "token" else self._pool(network.forward_features(tiles))
        return features

    def _pool(self, tokens: Tensor) -> Tensor:
        """(B, prefix + T, width), after the last norm, to (B, D)."""
        if self.pooling == "token":
            features: Tensor = self.backbone.forward_head(tokens)
            return features
        return pool_tokens(tokens, self.pooling, self.backbone.num_prefix_tokens)

    def _join(self, tokens: Tensor, layer: int, start: int) -> Tensor:
        """A layer's prompts behind the prefix tokens and before the tokens from ``start`` on."""
        prefix = self.backbone.num_prefix_tokens
        prompts = self.prompts[layer].to(tokens.dtype).expand(len(tokens), -1, -1)  # (B, count, width)
        return torch.cat([tokens[:, :prefix], prompts, tokens[:, start:]], dim=1)

    def _run_layers(self, tokens: Tensor) -> Tensor:
        """All layers; each recomputed in the backward pass where the backbone is set to."""
        network = self.backbone
        again = network.grad_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(network.blocks):
            if self.deep and layer > 0:
                tokens = self._join(tokens, layer, start=network.num_prefix_tokens + self.count)
            tokens = checkpoint(self._run_block, block, tokens, use_reentrant=False) if again else block(tokens)
        return tokens

    def _run_block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """One layer; frozen here too, for the backward pass runs it when the forward pass is over."""
        with self._frozen():
            result: Tensor = block(tokens)
            return result

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Backbone in eval mode and without gradients of its own inside; its flags as they were outside."""
        training = [module for module in self.backbone.modules() if module.training]
        learning = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        try:
            for module in training:
                module.training = False
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for module in training:
                module.training = True
            for parameter in learning:
                parameter.requires_grad_(True)

    def _check_device(self) -> None:
        here, there = self.prompts.device, next(self.backbone.parameters()).device
        if here != there:
            raise PromptError(f"the prompts are on {here} and their backbone is on {there}; move both to one device")


def _check_backbone(backbone: nn.Module, pooling: str) -> None:
    """Refuse a network that has no place for prompts, or no tokens for the pooling."""
    if not isinstance(backbone, VisionTransformer):
        raise PromptError(
            f"prompts need a VisionTransformer of timm, and {type(backbone).__name__} is none; "
            "choose an encoder such as vit_small_patch16_224"
        )
    network: Any = backbone
    if type(network).forward_features is not VisionTransformer.forward_features:
        raise PromptError(
            f"{type(network).__name__} runs its layers in a way of its own, which has no place for prompts; "
            "choose an encoder such as vit_small_patch16_224"
        )
    if pooling not in POOLINGS:
        raise PromptError(f"tokens are pooled by {', '.join(POOLINGS)}, not {pooling!r}")
    if pooling in {"cls", "cls+mean"} and not network.has_class_token:
        raise PromptError(f"the backbone has no class token to pool by {pooling}; use pooling mean")
    if pooling == "token" and network.num_classes > 0:
        raise PromptError(
            f"the backbone ends in a classifier of {network.num_classes} classes; build it with 0 classes"
        )
    if pooling == "token" and not network.global_pool:
        raise PromptError("the backbone pools no tokens by itself; use pooling cls, mean or cls+mean")
