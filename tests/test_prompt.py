"""Prompts in a frozen transformer: their features, that they alone learn, and what cannot be prompted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from support_vit import build_vit, images
from torch import Tensor, nn

from wsi_engine.models.backbones import PooledBackbone, TokenBackbone
from wsi_engine.models.prompt import PromptedViT, PromptError

VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "class token": ({}, "cls"),
    "class token, timm's pooling": ({}, "token"),
    "both": ({}, "cls+mean"),
    "no class token": ({"class_token": False, "global_pool": "avg"}, "mean"),
    "no class token, timm's pooling": ({"class_token": False, "global_pool": "avg"}, "token"),
    "registers": ({"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}, "cls+mean"),
    "registers with position": ({"reg_tokens": 2}, "mean"),
    "registers without class token": ({"reg_tokens": 2, "class_token": False, "global_pool": "avg"}, "token"),
    "dynamic size": ({"dynamic_img_size": True}, "cls"),
    "dynamic size, registers": ({"dynamic_img_size": True, "reg_tokens": 4, "no_embed_class": True}, "mean"),
    "pre-norm": ({"pre_norm": True}, "cls"),
    "no positions": ({"pos_embed": "none"}, "mean"),
    "norm after pooling": ({"global_pool": "avg"}, "token"),
    "norm before pooling": ({"global_pool": "avg", "fc_norm": False}, "token"),
    "attention pooling": ({"global_pool": "map"}, "token"),
    "drop rates": ({"drop_path_rate": 0.5, "proj_drop_rate": 0.5, "pos_drop_rate": 0.5, "patch_drop_rate": 0.5}, "cls"),
}


def flags(network: nn.Module) -> list[bool]:
    return [module.training for module in network.modules()] + [value.requires_grad for value in network.parameters()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_prompts_give_the_features_of_the_encoder_bit_for_bit(variant: str) -> None:
    options, pooling = VARIANTS[variant]
    network = build_vit(**options)
    plain = PooledBackbone(network) if pooling == "token" else TokenBackbone(network, pooling)
    for side in (32, 48) if options.get("dynamic_img_size") else (32,):
        tiles = images(side=side)
        module = PromptedViT(network.train(), 0, pooling=pooling)  # type: ignore[arg-type]
        features = module(tiles)
        with torch.no_grad():
            expected = plain.eval()(tiles)
        assert torch.equal(features, expected)
        assert not features.requires_grad
        assert features.shape == (5, module.dim)


def layers_by_hand(network: Any, tokens: Tensor, prompts: Tensor) -> Tensor:
    """Multi-head attention and feed-forward as formulas, prompts put in and taken out layer by layer."""
    prefix, k = network.num_prefix_tokens, prompts.shape[1]
    tokens = torch.cat([tokens[:, :prefix], prompts[:1].expand(len(tokens), -1, -1), tokens[:, prefix:]], dim=1)
    for layer, block in enumerate(network.blocks):
        if layer and len(prompts) > 1:
            tokens = tokens.clone()
            tokens[:, prefix : prefix + k] = prompts[layer]
        b, t, d = tokens.shape
        heads = block.attn.num_heads
        q, key, v = block.attn.qkv(block.norm1(tokens)).reshape(b, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ key.transpose(-1, -2) / math.sqrt(d // heads)).softmax(dim=-1)
        tokens = tokens + block.attn.proj((weights @ v).transpose(1, 2).reshape(b, t, d))
        tokens = tokens + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(tokens))))
    return torch.cat([tokens[:, :prefix], tokens[:, prefix + k :]], dim=1)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4, "no_embed_class": True}, {"class_token": False}])
def test_prompted_features_are_those_of_the_formulas(options: dict[str, Any], deep: bool) -> None:
    network = build_vit(**options, global_pool="avg", fc_norm=False).eval()
    module = PromptedViT(network, 4, deep, "mean")
    tiles = images()
    with torch.no_grad():
        module.prompts.normal_(generator=torch.Generator().manual_seed(1))
        embedded = network.patch_embed.proj(tiles).flatten(2).transpose(1, 2)  # (5, 4, 192)
        before = [token.expand(5, -1, -1) for token in (network.cls_token, network.reg_token) if token is not None]
        if network.no_embed_class:
            tokens = torch.cat([*before, embedded + network.pos_embed], dim=1)
        else:
            tokens = torch.cat([*before, embedded], dim=1) + network.pos_embed
        tokens = network.norm(layers_by_hand(network, tokens, module.prompts))
        expected = tokens[:, network.num_prefix_tokens :].mean(dim=1)
        features = module(tiles)
    torch.testing.assert_close(features, expected, atol=2e-6, rtol=1e-5)
    with torch.no_grad():  # and the prompts do matter
        assert (PromptedViT(network, 0, pooling="mean")(tiles) - features).abs().max() > 1e-2


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_prompts_learn_and_the_backbone_stays_as_it_was(variant: str, deep: bool) -> None:
    options, pooling = VARIANTS[variant]
    network = build_vit(**options).train()
    network.blocks[1].eval()
    network.norm.requires_grad_(False)
    network.blocks[0].attn.qkv.requires_grad_(False)
    before, state = flags(network), {name: value.clone() for name, value in network.state_dict().items()}
    module = PromptedViT(network, 2, deep, pooling).train()  # type: ignore[arg-type]
    features = module(images())
    assert flags(network) == before
    features.square().sum().backward()
    assert flags(network) == before
    assert all(value.grad is None for value in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert module.prompts.grad is not None
    assert (module.prompts.grad.abs().amax(dim=(1, 2)) > 0).all()
    assert [name for name, _ in module.named_parameters()] == ["prompts"]
    assert list(module.state_dict()) == ["prompts"]
    assert module.backbone is network
    assert torch.equal(features, module.eval()(images()))  # nothing is dropped in training mode


def test_a_failing_forward_pass_leaves_the_flags_as_they_were() -> None:
    network = build_vit().train()
    before = flags(network)
    with pytest.raises(AssertionError):
        PromptedViT(network, 1)(images(side=48))
    assert flags(network) == before


def test_the_number_of_parameters() -> None:
    with torch.device("meta"):
        tiny = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    count = lambda module: sum(value.numel() for value in module.parameters() if value.requires_grad)  # noqa: E731
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    assert count(PromptedViT(network, 1)) == 192
    assert count(PromptedViT(network, 1, deep=True)) == 12 * 192
    assert count(PromptedViT(network, 5)) == 5 * 192
    assert count(PromptedViT(network, 0)) == 0
    assert count(tiny) > 192 / 0.003  # under 0.3 % of the network


def test_prompts_start_uniform_and_seeds_repeat_them() -> None:
    network = build_vit()
    torch.manual_seed(8)
    one = PromptedViT(network, 400, deep=True).prompts.detach()
    torch.manual_seed(8)
    assert torch.equal(one, PromptedViT(network, 400, deep=True).prompts)
    bound = math.sqrt(6 / (3 * 16 * 16 + 192))
    assert one.shape == (3, 400, 192)
    assert bound * 0.999 < one.abs().max() <= bound
    assert abs(float(one.std()) - bound / math.sqrt(3)) < 1e-3 * bound
    assert abs(float(one.mean())) < 5e-3 * bound


def test_prompts_carry_no_position_and_shallow_ones_pass_through_all_layers() -> None:
    network = build_vit()
    module = PromptedViT(network, 3, pooling="cls")
    tiles = images()
    with torch.no_grad():
        features = module(tiles)
        module.prompts.copy_(module.prompts[:, [2, 0, 1]])
        torch.testing.assert_close(module(tiles), features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("deep", [False, True])
def test_fused_attention_and_recomputed_layers_change_nothing(deep: bool) -> None:
    results = []
    for fused, again in ((True, False), (False, False), (True, True)):
        network = build_vit(drop_path_rate=0.5)
        network.train().set_grad_checkpointing(again)
        for block in network.blocks:
            block.attn.fused_attn = fused
        before = flags(network)
        torch.manual_seed(1)
        module = PromptedViT(network, 2, deep)
        features = module(images())
        features.square().sum().backward()
        assert flags(network) == before
        assert all(value.grad is None for value in network.parameters())
        results.append((features.detach(), module.prompts.grad))
    for features, gradient in results[1:]:
        torch.testing.assert_close(features, results[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-4, rtol=1e-4)


def test_the_hybrid_and_the_distilled_transformer_take_prompts() -> None:
    for name in ("vit_tiny_r_s16_p8_224", "deit_tiny_distilled_patch16_224"):
        network = build_vit(name, img_size=64, depth=2)
        tiles = images(3, 64)
        assert torch.equal(PromptedViT(network, 0)(tiles), network.eval()(tiles))
        module = PromptedViT(network, 2, deep=True)
        module(tiles).sum().backward()
        assert module.prompts.grad is not None
        assert module.prompts.grad.abs().max() > 0


def test_under_autocast_and_in_bfloat16() -> None:
    network = build_vit()
    module = PromptedViT(network, 2, deep=True)
    with torch.no_grad():
        exact = module(images())
        with torch.autocast("cpu", torch.bfloat16):
            cast = module(images()).float()
        network.to(torch.bfloat16)
        low = module(images().to(torch.bfloat16))
    assert module.prompts.dtype == torch.float32
    assert low.dtype == torch.bfloat16
    for other in (cast, low.float()):
        assert torch.nn.functional.cosine_similarity(other, exact).min() > 0.999


@pytest.mark.parametrize(
    ("make", "prompts", "pooling", "match"),
    [
        (
            lambda: timm.create_model("resnet18", num_classes=0),
            1,
            "token",
            "need a VisionTransformer .* ResNet is none",
        ),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=0), 1, "token", "SwinTransformer is"),
        (lambda: nn.Linear(2, 2), 1, "token", "Linear is none"),
        (build_vit, -1, "cls", "at least 0, not -1"),
        (build_vit, 1.0, "cls", "whole number"),
        (build_vit, True, "cls", "whole number"),
        (build_vit, 1, "max", "pooled by cls, mean, cls.mean, token, not 'max'"),
        (lambda: build_vit(class_token=False, global_pool="avg"), 1, "cls", "no class token to pool by cls"),
        (lambda: build_vit(num_classes=7), 1, "token", "classifier of 7 classes"),
        (lambda: build_vit(global_pool=""), 1, "token", "pools no tokens by itself"),
    ],
)
def test_wrong_backbones_and_settings_are_refused(
    make: Callable[[], Any], prompts: Any, pooling: Any, match: str
) -> None:
    with pytest.raises(PromptError, match=match) as caught:
        PromptedViT(make(), prompts, pooling=pooling)
    assert "\n" not in str(caught.value)
    assert not str(caught.value).endswith(".")


def test_prompts_and_backbone_on_two_devices_are_refused() -> None:
    module = PromptedViT(build_vit(), 1).to("meta")
    assert next(module.backbone.parameters()).device.type == "cpu"
    with pytest.raises(PromptError, match="prompts are on meta and their backbone is on cpu"):
        module(images())
