"""DINOv2 as transformers saves it: the same numbers in timm, whatever the names and the resolution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wsi_engine.encoders.weights import fit_state
from wsi_engine.errors import WeightsError
from wsi_engine.models.backbones import build_backbone
from wsi_engine.models.dinov2 import convert_dinov2, is_transformers_dinov2

FILE = Path("given.pt")
DIM, HEADS, DEPTH, SIDE, TILE = 32, 4, 2, 16, 4


def transformers_state(swiglu: bool, grid: int = SIDE // TILE) -> dict[str, Tensor]:
    """A DINOv2 state dict under the names transformers gives it, all values random."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    state = {
        "embeddings.cls_token": draw(1, 1, DIM),
        "embeddings.mask_token": draw(1, DIM),
        "embeddings.position_embeddings": draw(1, 1 + grid * grid, DIM),
        "embeddings.patch_embeddings.projection.weight": draw(DIM, 3, TILE, TILE),
        "embeddings.patch_embeddings.projection.bias": draw(DIM),
        "layernorm.weight": draw(DIM),
        "layernorm.bias": draw(DIM),
    }
    mlp = {"weights_in": (176, DIM), "weights_out": (DIM, 88)} if swiglu else {"fc1": (128, DIM), "fc2": (DIM, 128)}
    linears = {f"attention.attention.{role}": (DIM, DIM) for role in ("query", "key", "value")}
    linears |= {"attention.output.dense": (DIM, DIM)} | {f"mlp.{name}": shape for name, shape in mlp.items()}
    for i in range(DEPTH):
        block = f"encoder.layer.{i}"
        for name, shape in linears.items():
            state[f"{block}.{name}.weight"], state[f"{block}.{name}.bias"] = draw(*shape), draw(shape[0])
        for name in ("norm1", "norm2"):
            state[f"{block}.{name}.weight"], state[f"{block}.{name}.bias"] = draw(DIM), draw(DIM)
        state[f"{block}.layer_scale1.lambda1"], state[f"{block}.layer_scale2.lambda1"] = draw(DIM), draw(DIM)
    return state


def run_dinov2(state: dict[str, Tensor], tiles: Tensor, swiglu: bool) -> Tensor:
    """The tokens after the last norm, written out from the paper and the names alone."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    projection = "embeddings.patch_embeddings.projection"
    x = F.conv2d(tiles, state[f"{projection}.weight"], state[f"{projection}.bias"], stride=TILE).flatten(2).mT
    x = (
        torch.cat([state["embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
        + state["embeddings.position_embeddings"]
    )
    for i in range(DEPTH):
        block = f"encoder.layer.{i}"
        y = norm(f"{block}.norm1", x)
        q, k, v = (
            linear(f"{block}.attention.attention.{role}", y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for role in ("query", "key", "value")
        )
        attended = ((q @ k.mT) / (DIM / HEADS) ** 0.5).softmax(-1) @ v
        y = linear(f"{block}.attention.output.dense", attended.transpose(1, 2).flatten(2))
        x = x + state[f"{block}.layer_scale1.lambda1"] * y
        y = norm(f"{block}.norm2", x)
        if swiglu:
            gate, value = linear(f"{block}.mlp.weights_in", y).chunk(2, dim=-1)
            y = linear(f"{block}.mlp.weights_out", F.silu(gate) * value)
        else:
            y = linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", y)))
        x = x + state[f"{block}.layer_scale2.lambda1"] * y
    return norm("layernorm", x)


def tiny_options(swiglu: bool) -> dict[str, object]:
    options: dict[str, object] = {"img_size": SIDE, "patch_size": TILE, "embed_dim": DIM, "depth": DEPTH}
    options |= {"num_heads": HEADS, "init_values": 1e-5}
    return options | ({"mlp_layer": "SwiGLUPacked", "act_layer": "silu", "mlp_ratio": 5.5} if swiglu else {})


@pytest.mark.parametrize("swiglu", [False, True])
def test_transformers_dinov2_computes_the_same_in_timm(swiglu: bool) -> None:
    state = transformers_state(swiglu)
    backbone = build_backbone("vit_tiny_patch16_224", tiny_options(swiglu), "cls+mean")
    fitted = fit_state({f"dinov2.{name}": value for name, value in state.items()}, backbone.network.state_dict(), FILE)
    backbone.network.load_state_dict(fitted)
    tiles = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        tokens = run_dinov2(state, tiles, swiglu)
        np.testing.assert_allclose(
            backbone(tiles), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1), rtol=1e-4, atol=1e-5
        )


def test_positions_of_another_resolution_are_resampled() -> None:
    state = transformers_state(swiglu=False, grid=9)
    converted = convert_dinov2(state, tokens=17)["pos_embed"]
    given = state["embeddings.position_embeddings"]
    assert torch.equal(converted[:, 0], given[:, 0])
    for channel in (0, 31):
        grid = given[0, 1:, channel].reshape(1, 1, 9, 9)
        resampled = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
        assert torch.equal(converted[0, 1:, channel], resampled.flatten())


def test_a_missing_part_of_attention_is_noticed() -> None:
    state = transformers_state(swiglu=False)
    assert is_transformers_dinov2(state)
    del state["encoder.layer.1.attention.attention.key.bias"]
    network = build_backbone("vit_tiny_patch16_224", tiny_options(False), "cls", device="meta").network
    with pytest.raises(WeightsError, match=r"blocks\.1\.attn\.qkv\.bias is 64 where the encoder needs 96"):
        fit_state(state, network.state_dict(), FILE)


@pytest.mark.parametrize("swiglu", [False, True])
def test_transformers_own_dinov2_agrees(swiglu: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=TILE,
        use_swiglu_ffn=swiglu,
        layerscale_value=0.5,
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    backbone = build_backbone("vit_tiny_patch16_224", tiny_options(swiglu), "cls")
    backbone.network.load_state_dict(fit_state(model.state_dict(), backbone.network.state_dict(), FILE))
    tiles = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        np.testing.assert_allclose(backbone(tiles), model(tiles).last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)
