"""Prompts in a frozen transformer, their files, and exact gradients over bags cut into chunks."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from torch import Tensor, nn

from wsi_engine.encoders.weights import digest_state
from wsi_engine.models.backbones import PooledBackbone, TokenBackbone
from wsi_engine.models.heads import Head, create_head, list_heads
from wsi_engine.models.prompt import PromptedViT, PromptError
from wsi_engine.models.prompt_files import PROMPT_FILE, load_prompts, read_prompts_card, save_prompts
from wsi_engine.models.prompt_gradients import BagStep, bag_backward, encode_bag
from wsi_engine.models.prompt_tiles import Normalise

SMALL = {"img_size": 32, "depth": 3, "num_classes": 0}
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


def build_vit(name: str = "vit_tiny_patch16_224", seed: int = 3, **options: Any) -> Any:
    torch.manual_seed(seed)
    network = timm.create_model(name, **(SMALL | options))
    with torch.no_grad():  # fresh class tokens and positions are almost nothing: make them count
        for key, value in network.named_parameters():
            if key.endswith(("token", "pos_embed")):
                value.normal_()
    return network


def images(count: int = 5, side: int = 32, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pixels(count: int, side: int = 32, seed: int = 6) -> Tensor:
    return torch.randint(
        0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def flags(network: nn.Module) -> list[bool]:
    return [module.training for module in network.modules()] + [value.requires_grad for value in network.parameters()]


# prompts in a transformer


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


# files


@pytest.mark.parametrize(("deep", "count", "pooling"), [(False, 1, "cls"), (True, 3, "cls+mean"), (False, 0, "token")])
def test_prompts_come_back_as_they_were(tmp_path: Path, deep: bool, count: int, pooling: Any) -> None:
    network, path = build_vit().eval(), tmp_path / "prompts.safetensors"
    module, digest = PromptedViT(network, count, deep, pooling), digest_state(network.state_dict())
    save_prompts(module, path, digest, {"encoder": {"name": "vit"}, "classes": ["a", "ç"]})
    before = torch.get_rng_state()
    again = load_prompts(path, network, digest)
    assert torch.equal(before, torch.get_rng_state())
    assert (again.count, again.deep, again.pooling, again.training) == (count, deep, pooling, False)
    assert torch.equal(again(images()), module(images()))
    card = read_prompts_card(path)
    assert (card["backbone"], card["classes"], card["width"], card["layers"]) == (digest, ["a", "ç"], 192, 3)
    assert set(load_file(path)) == {"prompts"}
    assert path.stat().st_size < 4 * module.prompts.numel() + 1000
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_prompts_of_another_backbone_are_refused(tmp_path: Path) -> None:
    network, other, path = build_vit(), build_vit(seed=4), tmp_path / "prompts.safetensors"
    digest = digest_state(network.state_dict())
    save_prompts(PromptedViT(network, 1), path, digest)
    with pytest.raises(PromptError, match=f"weights {digest[:12]} and this one has .*; load the weights"):
        load_prompts(path, other, digest_state(other.state_dict()))
    for shape, name in (({"depth": 2}, "layers 3"), ({"embed_dim": 96}, "width 192")):
        with pytest.raises(PromptError, match=name):
            load_prompts(path, build_vit(**shape), digest)
    with pytest.raises(PromptError, match="ResNet is none"):
        load_prompts(path, timm.create_model("resnet18", num_classes=0), digest)
    with pytest.raises(PromptError, match="digest must be"):
        load_prompts(path, network, "")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "version 2 and this engine reads version 1"),
        ({"prompts": 2}, r"prompts of shape \(1, 1, 192\) where its other tensors ask for \(1, 2, 192\)"),
        ({"prompts": -1}, "at least 0"),
        ({"pooling": "max"}, "not 'max'"),
        ({"deep": 1}, "lacks one of version, prompts, deep"),
    ],
)
def test_damaged_cards_of_prompts_are_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    network, path = build_vit(), tmp_path / "prompts.safetensors"
    module = PromptedViT(network, 1)
    save_prompts(module, path, "d" * 64)
    card = read_prompts_card(path) | change
    save_file({"prompts": module.prompts.detach()}, path, metadata={PROMPT_FILE.key: json.dumps(card)})
    with pytest.raises(PromptError, match=match):
        load_prompts(path, network, "d" * 64)


def test_what_holds_no_prompts_is_refused(tmp_path: Path) -> None:
    network, path = build_vit(), tmp_path / "prompts.safetensors"
    module = PromptedViT(network, 1)
    with pytest.raises(PromptError, match="no file of prompts"):
        load_prompts(path, network, "d")
    save_file({"prompts": module.prompts.detach()}, path)
    with pytest.raises(PromptError, match="no card of prompts; give a file that save_prompts wrote"):
        load_prompts(path, network, "d")
    path.write_bytes(b"nothing")
    with pytest.raises(PromptError, match="cannot be read as safetensors"):
        read_prompts_card(path)
    with pytest.raises(PromptError, match="gives deep as True, and the prompts' own is False"):
        save_prompts(module, path, "d", {"deep": True})
    with torch.no_grad():
        module.prompts[0, 0, 0] = float("nan")
    save_prompts(module, path, "d")
    with pytest.raises(PromptError, match="NaN or infinite weights in prompts"):
        load_prompts(path, network, "d")


# gradients over bags


def augment(tiles: Tensor) -> Tensor:
    """Normalised tiles, each flipped or not and shifted in brightness, at random."""
    flip = torch.rand(len(tiles)) < 0.5
    tiles = Normalise()(torch.where(flip[:, None, None, None], tiles.flip(2), tiles))
    return tiles + 0.2 * torch.randn(len(tiles), 1, 1, 1)


def one_graph(encoder: Any, head: Head, chunks: Sequence[Tensor], label: int, prepare: Any) -> Tensor:
    """The ordinary way: everything in one graph."""
    features = torch.cat([encoder(prepare(chunk)) for chunk in chunks])
    loss = head.loss(head(features), label)
    loss.backward()
    return loss.detach()


def gradients(*modules: nn.Module) -> list[Tensor]:
    """Copies of all gradients, which are cleared."""
    taken = []
    for module in modules:
        for value in module.parameters():
            taken.append(torch.zeros_like(value) if value.grad is None else value.grad.clone())
            value.grad = None
    return taken


def assert_same_gradients(mine: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    """Each parameter's gradient to ``tolerance`` of its norm; parameters that a head never uses have none."""
    assert len(mine) == len(theirs)
    for one, two in zip(mine, theirs, strict=True):
        assert float((one - two).norm()) <= tolerance * float(two.norm()) + 1e-9


def build_head(name: str, dim: int, **options: Any) -> Head:
    torch.manual_seed(9)
    dropout = {} if name in {"transmil", "dsmil"} else {"dropout": 0.25}
    special = {"dsmil": {"passing_v": True, "dropout": 0.25}, "transmil": {"dim": 64, "heads": 4}}
    return create_head(name, dim, 2, **(dropout | special.get(name, {}) | options))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", list_heads())
def test_gradients_are_those_of_one_graph(name: str, deep: bool, training: bool) -> None:
    """With random augmentation, and dropout of the head in training mode, in the same order as one graph draws it."""
    encoder = PromptedViT(build_vit(), 2, deep, "cls+mean")
    head = build_head(name, encoder.dim).train(training)
    bag = pixels(19)
    torch.manual_seed(21)
    loss = one_graph(encoder, head, bag.split(4), 1, augment)
    state, expected = torch.get_rng_state(), gradients(encoder, head)
    torch.manual_seed(21)
    step = bag_backward(encoder, head, bag, 1, prepare=augment, chunk=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert step.loss == pytest.approx(float(loss), rel=1e-6)
    assert float(expected[0].norm()) > 1e-6
    assert_same_gradients(gradients(encoder, head), expected)
    assert step.features.shape == (19, 384)
    assert not step.output.logits.requires_grad
    assert head.training is training


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", list_heads())
def test_gradients_are_those_of_the_whole_bag_at_once(name: str, deep: bool) -> None:
    """Nothing random, so the ordinary way may encode all tiles in one batch; float64 leaves rounding out."""
    network = build_vit().double()
    encoder = PromptedViT(network, 1, deep).double()
    head, bag = build_head(name, encoder.dim).double().eval(), pixels(11)
    prepare = lambda tiles: Normalise()(tiles).double()  # noqa: E731
    one_graph(encoder, head, [bag], 0, prepare)
    expected = gradients(encoder, head)
    for chunk in (4, 10, 11, 12):
        bag_backward(encoder, head, bag, 0, prepare=prepare, chunk=chunk)
        assert_same_gradients(gradients(encoder, head), expected, 1e-6)  # losses are float32


def test_dropout_and_drop_path_of_a_tuned_encoder_stay_legal() -> None:
    """Fine-tuning: the whole network learns, in training mode, and drops the same in both passes."""
    encoder = build_vit(drop_path_rate=0.4, proj_drop_rate=0.2, attn_drop_rate=0.1, pos_drop_rate=0.1).train()
    assert sum(isinstance(module, DropPath) for module in encoder.modules()) > 2
    head, bag = build_head("abmil", 192).train(), pixels(17)
    torch.manual_seed(2)
    one_graph(encoder, head, bag.split(5), 1, augment)
    expected = gradients(encoder, head)
    torch.manual_seed(2)
    bag_backward(encoder, head, bag, 1, prepare=augment, chunk=5)
    assert_same_gradients(gradients(encoder, head), expected)
    bag_backward(encoder, head, bag, 1, prepare=augment, chunk=5)
    pairs = zip(gradients(encoder, head), expected, strict=True)
    assert any(
        float((one - two).norm()) > 1e-3 * float(two.norm()) for one, two in pairs
    )  # another draw: it was random


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("tuned", [False, True])
def test_under_autocast_gradients_reach_every_weight(outer: bool, tuned: bool) -> None:
    """Autocast remembers weights cast in the pass without gradients, which would cut the next pass off from them."""
    network = build_vit()
    encoder = network.train() if tuned else PromptedViT(network, 2, deep=True)
    head, bag = build_head("clam_sb", 192).eval(), pixels(12)
    with torch.autocast("cpu", torch.bfloat16):
        features = torch.cat([encoder(Normalise()(chunk)) for chunk in bag.split(4)])
        loss = head.loss(head(features), 1)
    loss.backward()
    theirs = gradients(encoder, head)
    if outer:
        with torch.autocast("cpu", torch.bfloat16):
            bag_backward(encoder, head, bag, 1, chunk=4)
    else:
        bag_backward(encoder, head, bag, 1, chunk=4, autocast=torch.bfloat16)
    mine = gradients(encoder, head)
    for one, two in zip(mine, theirs, strict=True):
        if float(two.norm()) > 0:
            assert float((one - two).norm()) <= 0.05 * float(two.norm())
            assert one.dtype == torch.float32


def test_gradients_add_up_and_are_scaled() -> None:
    encoder = PromptedViT(build_vit(), 1)
    head, bags = build_head("mean", 192).eval(), (pixels(9), pixels(6, seed=7))
    total = sum(head.loss(head(encoder(Normalise()(bag))), 1) for bag in bags) / 2
    assert isinstance(total, Tensor)
    total.backward()
    expected = gradients(encoder, head)
    steps = [bag_backward(encoder, head, bag, 1, chunk=4, scale=0.5) for bag in bags]
    assert_same_gradients(gradients(encoder, head), expected)
    assert sum(step.loss for step in steps) / 2 == pytest.approx(float(total.detach()), rel=1e-6)


class Counted(nn.Module):
    """An encoder that counts its calls, with gradients and without, and watches how many graphs are alive."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.calls: list[tuple[int, bool]] = []
        self.graphs: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def forward(self, tiles: Tensor) -> Tensor:
        features: Tensor = self.encoder(tiles)
        self.calls.append((len(tiles), torch.is_grad_enabled()))
        if features.requires_grad:
            self.graphs.add(features)
        self.most = max(self.most, len(self.graphs))
        return features


def test_one_graph_is_alive_at_a_time_and_one_chunk_is_encoded_once() -> None:
    encoder, head = Counted(PromptedViT(build_vit(), 1)), build_head("clam_mb", 192)
    bag_backward(encoder, head, pixels(11), 0, chunk=4)
    assert encoder.calls == [(4, False), (4, False), (3, False), (4, True), (4, True), (3, True)]
    assert encoder.most == 1
    assert not encoder.graphs
    encoder.calls.clear()
    bag_backward(encoder, head, pixels(4), 0, chunk=4)
    assert encoder.calls == [(4, True)]
    encoder.calls.clear()
    assert not encode_bag(encoder, pixels(5), chunk=4).requires_grad
    assert encoder.calls == [(4, False), (1, False)]


def test_one_chunk_gives_the_gradients_of_several() -> None:
    encoder, head, bag = PromptedViT(build_vit(), 2, deep=True), build_head("dsmil", 192).eval(), pixels(7)
    whole = bag_backward(encoder, head, bag, 1, chunk=7)
    expected = gradients(encoder, head)
    for chunk in (1, 2):
        step = bag_backward(encoder, head, bag, 1, chunk=chunk)
        assert_same_gradients(gradients(encoder, head), expected)
        torch.testing.assert_close(step.features, whole.features, atol=1e-5, rtol=1e-5)


def test_nothing_to_learn_in_the_encoder_leaves_the_head_to_learn() -> None:
    encoder, head, bag = PromptedViT(build_vit(), 0), build_head("abmil", 192).eval(), pixels(10)
    for chunk in (3, 10):
        step = bag_backward(encoder, head, bag, 1, chunk=chunk)
        mine = gradients(head)
        head.loss(head(step.features), 1).backward()
        assert_same_gradients(mine, gradients(head))
        assert encoder.prompts.grad is None


class Compressed(Sequence[np.ndarray]):
    """Blocks that are made when they are asked for, and how often."""

    def __init__(self, bag: Tensor) -> None:
        self.blocks = [block.numpy() for block in bag.split(5)]
        self.asked = 0

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, place: Any) -> Any:
        block = self.blocks[place]
        self.asked += 1
        return block.copy()


def test_sources_of_tiles_all_give_the_same() -> None:
    """In float64: chunks of other sizes round otherwise, which attention's small gradients show in float32."""
    encoder, head = PromptedViT(build_vit().double(), 1), build_head("clam_sb", 192).eval().double()
    bag = pixels(13)
    asked = []

    def prepare(tiles: Tensor) -> Tensor:
        return Normalise()(tiles).double()

    def stream() -> Iterator[np.ndarray]:
        for block in bag.split(5):
            asked.append(len(block))
            yield block.numpy()

    read_only = bag.numpy().copy()
    read_only.flags.writeable = False
    compressed = Compressed(bag)
    sources = [bag, bag.numpy(), read_only, list(bag.split(5)), tuple(bag.split(13)), stream(), stream, compressed]
    results: list[tuple[BagStep, list[Tensor]]] = []
    for source in sources:
        step = bag_backward(encoder, head, source, 1, prepare=prepare, chunk=4)
        results.append((step, gradients(encoder, head)))
    for step, grads in results[1:]:
        torch.testing.assert_close(step.features, results[0][0].features, atol=1e-5, rtol=1e-5)
        assert_same_gradients(grads, results[0][1])
    assert asked == [5, 5, 3] * 3  # the generator once, the callable in each of two passes
    assert compressed.asked == 6
    torch.testing.assert_close(
        encode_bag(encoder, stream(), prepare=prepare, chunk=4), results[0][0].features, atol=1e-5, rtol=1e-5
    )


def test_normalised_as_encoders_do_it() -> None:
    tiles = pixels(2)
    expected = (tiles.permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / 0.25
    torch.testing.assert_close(Normalise((0.5, 0.4, 0.3), (0.25, 0.25, 0.25))(tiles), expected)


@pytest.mark.parametrize(
    ("bag", "options", "match"),
    [
        (pixels(0), {}, "the bag holds no tiles; leave out"),
        ([], {}, "the bag holds no tiles"),
        (images(), {}, r"uint8 of shape \(n, H, W, 3\), not torch.float32"),
        (pixels(4).permute(0, 3, 1, 2), {}, r"not torch.uint8 of shape \(4, 3, 32, 32\)"),
        (pixels(4)[0], {}, r"not torch.uint8 of shape \(32, 32, 3\)"),
        (["slide.svs"], {}, "not str"),
        (pixels(4), {"chunk": 0}, "chunk must be a whole number of at least 1 tile, not 0"),
        (pixels(4), {"scale": 0.0}, "scale must be a positive number, not 0.0"),
        (pixels(4), {"scale": float("nan")}, "positive number"),
    ],
)
def test_bad_bags_and_settings_are_refused(bag: Any, options: dict[str, Any], match: str) -> None:
    encoder, head = PromptedViT(build_vit(), 1), build_head("mean", 192)
    with pytest.raises(PromptError, match=match):
        bag_backward(encoder, head, bag, 0, **options)
    assert all(value.grad is None for value in [*encoder.parameters(), *head.parameters()])


def test_encoders_that_do_not_repeat_themselves_are_found_out() -> None:
    encoder, head = PromptedViT(build_vit(), 1), build_head("mean", 192)
    rng = np.random.default_rng(0)
    elsewhere = lambda tiles: Normalise()(tiles) + float(rng.normal())  # noqa: E731 - not torch's generator
    with pytest.raises(PromptError, match=r"differed by .* from one pass to the other"):
        bag_backward(encoder, head, pixels(9), 0, prepare=elsewhere, chunk=4)
    counts = iter((9, 13, 9, 5))
    for _ in range(2):
        with pytest.raises(PromptError, match="gave 9 tiles in one pass and another number"):
            bag_backward(encoder, head, lambda: pixels(next(counts)).split(1), 0, chunk=4)
    with pytest.raises(PromptError, match=r"features of shape \(4, 3, 32, 32\) for 4 tiles"):
        bag_backward(nn.Identity(), head, pixels(9), 0, chunk=4)


def test_the_generators_are_as_one_graph_leaves_them_when_the_encoder_fails() -> None:
    head, calls = build_head("mean", 192), []

    def encoder(tiles: Tensor) -> Tensor:
        calls.append(len(tiles))
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return torch.rand(len(tiles), 192)

    torch.manual_seed(4)
    with pytest.raises(RuntimeError, match="out of memory"):
        bag_backward(encoder, head.eval(), pixels(6), 0, chunk=2)
    torch.manual_seed(4)
    torch.rand(2, 192), torch.rand(2, 192), torch.rand(2, 192)
    after = torch.rand(3)
    torch.manual_seed(4)
    calls.clear()
    with pytest.raises(RuntimeError):
        bag_backward(encoder, head, pixels(6), 0, chunk=2)
    assert torch.equal(torch.rand(3), after)


def test_steps_along_these_gradients_lower_the_loss() -> None:
    """The prompts alone, under a fresh head that never moves, make dark and bright tiles easier to tell."""
    bags = [(pixels(6) // 4, 0), (255 - pixels(6) // 4, 1)]
    encoder = PromptedViT(build_vit(), 4, deep=True, pooling="mean")
    head = build_head("mean", encoder.dim, dropout=0.0).requires_grad_(False)
    optimiser = torch.optim.Adam(encoder.parameters(), lr=0.03)
    losses = []
    for _ in range(15):
        losses.append(sum(bag_backward(encoder, head, bag, label, chunk=4, scale=0.5).loss for bag, label in bags))
        optimiser.step()
        optimiser.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.75 * losses[0]
