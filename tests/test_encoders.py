from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import v2

from wsi_engine.encoders import create_encoder, list_encoders
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.encoders.cards import DEEP_ENCODERS, find_card
from wsi_engine.encoders.deep import DeepEncoder, resize_tiles
from wsi_engine.encoders.timm_names import describe_timm
from wsi_engine.errors import EncoderError, SettingsError
from wsi_engine.models.backbones import build_backbone, pool_tokens

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    """Four tiles of 256 px: smooth colours with a fine texture on them."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(60, 256, (4, 16, 16, 3)).repeat(16, axis=1).repeat(16, axis=2)
    return np.clip(coarse + generator.integers(-40, 40, coarse.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def resnet50() -> DeepEncoder:
    encoder = create_encoder("resnet50", weights="random:0", device="cpu", precision="fp32")
    assert isinstance(encoder, DeepEncoder)
    return encoder


@pytest.fixture(scope="module")
def vit_tiny() -> DeepEncoder:
    encoder = create_encoder("vit_tiny_patch16_224", weights="random:2", device="cpu", precision="fp32")
    assert isinstance(encoder, DeepEncoder)
    return encoder


def card_of(name: str) -> EncoderCard:
    card = find_card(name)
    assert card is not None
    return card


def normalise(tiles: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """The field's usual way from a tile to a network's input, tile by tile."""
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    return torch.stack([transform(tile) for tile in tiles])


def resize_by_pillow(tiles: np.ndarray, side: int, filter_: int) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(tile).resize((side, side), filter_)) for tile in tiles])


# --- against a plain loop over timm --------------------------------------------------------------------------


@pytest.mark.parametrize("side", [256, 224])
def test_resnet50_equals_a_plain_loop_over_timm(resnet50: DeepEncoder, tiles: np.ndarray, side: int) -> None:
    tiles = tiles[:, :side, :side]
    torch.manual_seed(0)
    network = timm.create_model("resnet50.tv_in1k", features_only=True, out_indices=[3]).eval()
    x = normalise(tiles, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = torch.cat([network(one[None])[-1].mean((2, 3)) for one in x]).numpy()
    features = resnet50.encode(tiles)
    assert features.shape == (4, 1024)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 0.01  # the tiles differ


def test_resnet50_is_the_whole_network_cut_after_layer3(resnet50: DeepEncoder, tiles: np.ndarray) -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet50", pretrained=False).eval()
    x = normalise(tiles, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        for stage in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"):
            x = getattr(network, stage)(x)
    np.testing.assert_allclose(resnet50.encode(tiles), x.mean((2, 3)).numpy(), atol=1e-5)


def test_vit_equals_timm_on_tiles_resized_by_pillow(vit_tiny: DeepEncoder, tiles: np.ndarray) -> None:
    torch.manual_seed(2)
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0).eval()
    resized = resize_by_pillow(tiles, 224, Image.Resampling.BICUBIC)
    with torch.no_grad():
        exact = network(normalise(tiles[:, :224, :224], (0.5,) * 3, (0.5,) * 3)).numpy()
        near = network(normalise(resized, (0.5,) * 3, (0.5,) * 3)).numpy()
    np.testing.assert_allclose(vit_tiny.encode(tiles[:, :224, :224]), exact, atol=1e-5)
    np.testing.assert_allclose(vit_tiny.encode(tiles), near, atol=1e-2)  # a few values fall on the other side of a half
    assert np.abs(near - exact).max() > 0.1


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050.lamb_in1k"])
def test_any_timm_name_is_timms_own_forward(tiles: np.ndarray, name: str) -> None:
    encoder = create_encoder(f"timm:{name}", weights="random:3", device="cpu", precision="fp32")
    torch.manual_seed(3)
    network = timm.create_model(name, pretrained=False, num_classes=0).eval()
    with torch.no_grad():
        expected = network(normalise(tiles, encoder.card.mean, encoder.card.std)).numpy()
    np.testing.assert_allclose(encoder.encode(tiles), expected, atol=1e-4)
    assert encoder.card.dim == expected.shape[1]


# --- preparing tiles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filter_", "pillow"), [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)]
)
@pytest.mark.parametrize("side", [224, 100, 300])
def test_resizing_is_pillows_but_for_values_on_a_half(tiles: np.ndarray, filter_: str, pillow: int, side: int) -> None:
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).float()
    ours = resize_tiles(x, side, filter_).permute(0, 2, 3, 1).numpy()  # type: ignore[arg-type]
    theirs = resize_by_pillow(tiles, side, pillow).astype(float)
    assert np.abs(ours - theirs).max() <= 2  # a half may go the other way in each of the two passes
    assert np.mean(ours != theirs) < 0.1
    assert np.array_equal(ours, np.round(ours))


def test_a_resize_larger_than_the_input_cuts_the_centre(vit_tiny: DeepEncoder, tiles: np.ndarray) -> None:
    cutting = DeepEncoder(
        dataclasses.replace(card_of("vit_tiny_patch16_224"), resize_px=256), "random:2", "cpu", "fp32"
    )
    assert np.array_equal(cutting.encode(tiles), vit_tiny.encode(tiles[:, 16:240, 16:240]))


def test_a_tile_does_not_depend_on_its_neighbours(
    resnet50: DeepEncoder, vit_tiny: DeepEncoder, tiles: np.ndarray
) -> None:
    others = tiles.copy()
    others[[0, 2, 3]] = 255
    for encoder in (resnet50, vit_tiny):
        assert np.array_equal(encoder.encode(tiles)[1], encoder.encode(others)[1])
        assert np.array_equal(encoder.encode(tiles), encoder.encode(tiles))


def test_views_and_read_only_tiles_are_taken_and_left_alone(resnet50: DeepEncoder, tiles: np.ndarray) -> None:
    frozen = tiles.copy()
    frozen.flags.writeable = False
    expected = resnet50.encode(tiles.copy())
    assert np.array_equal(resnet50.encode(frozen), expected)
    assert np.array_equal(resnet50.encode(tiles[::-1]), resnet50.encode(tiles[::-1].copy()))
    assert np.array_equal(frozen, tiles)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((1, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8), np.zeros((1, 3, 64, 64), np.uint8)],
)
def test_pixels_of_another_kind_are_refused(resnet50: DeepEncoder, pixels: np.ndarray) -> None:
    with pytest.raises(SettingsError, match="uint8 of shape"):
        resnet50.encode(pixels)


def test_tiles_that_are_not_square_are_refused_where_a_size_is_fixed(vit_tiny: DeepEncoder) -> None:
    with pytest.raises(SettingsError, match="square"):
        vit_tiny.encode(np.zeros((1, 64, 96, 3), np.uint8))


# --- random weights ------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_weights_and_leaves_the_callers_numbers_alone() -> None:
    torch.manual_seed(99)
    untouched = torch.rand(3)
    torch.manual_seed(99)
    digests = [
        create_encoder(
            "vit_tiny_patch16_224", weights=f"random:{seed}", device="cpu", precision="fp32"
        ).card.weights_digest
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(3), untouched)
    assert digests[0] == digests[1] != digests[2]


# --- the table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", DEEP_ENCODERS, ids=lambda card: card.name)
def test_every_row_builds_and_gives_its_dim(card: EncoderCard) -> None:
    backbone = build_backbone(card.architecture, dict(card.options), card.pooling, device="meta")
    side = card.input_px or 256
    with torch.inference_mode():
        assert backbone(torch.empty(2, 3, side, side, device="meta")).shape == (2, card.dim)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as their authors give them; GigaPath's to the last one
        ("uni", 303e6),
        ("uni2-h", 681e6),
        ("virchow", 631e6),
        ("virchow2", 631e6),
        ("prov-gigapath", 1_134_953_984),
        ("h-optimus-0", 1.13e9),
        ("phikon-v2", 303e6),
    ],
)
def test_networks_have_the_published_size(name: str, parameters: float) -> None:
    card = card_of(name)
    backbone = build_backbone(card.architecture, dict(card.options), card.pooling, device="meta")
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert count == parameters if isinstance(parameters, int) else abs(count / parameters - 1) < 0.005


def test_names_are_unique_and_cards_are_json() -> None:
    cards = list_encoders()
    assert len({card.name for card in cards}) == len(cards)
    assert cards[0].name == "texture"
    for card in cards:
        assert json.loads(json.dumps(card.to_json()))["name"] == card.name


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_tokens_are_pooled_without_registers(pooling: str) -> None:
    tokens = torch.randn(2, 9, 5)  # one class token, four registers, four tiles
    for row, pooled in zip(tokens.numpy(), pool_tokens(tokens, pooling, prefix_tokens=5).numpy(), strict=True):
        mean = sum(row[i] for i in range(5, 9)) / 4
        parts = {"cls": [row[0]], "mean": [mean], "cls+mean": [row[0], mean]}[pooling]
        np.testing.assert_allclose(pooled, np.concatenate(parts), atol=1e-6)


def test_register_tokens_are_known_to_the_backbone() -> None:
    for name, prefix in (("virchow", 1), ("virchow2", 5), ("midnight", 1)):
        card = card_of(name)
        backbone = build_backbone(card.architecture, dict(card.options), card.pooling, device="meta")
        assert backbone.prefix_tokens == prefix


def test_listing_loads_no_heavy_library() -> None:
    code = (
        "import sys, wsi_engine.encoders as e; e.list_encoders();"
        "print([m for m in ('torch', 'timm', 'numba', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def row_of(card: EncoderCard) -> str:
    """The card as docs/encoders.md shows it."""
    size = f"{card.resize_px} → {card.input_px}" if card.resize_px else str(card.input_px or "any")
    cells = [
        f"`{card.name}`",
        f"`{card.architecture}`",
        size,
        "–" if card.mpp is None else f"{card.mpp:g}",
        str(card.dim),
        card.pooling,
        card.licence,
        f"[{card.source}](https://huggingface.co/{card.source})",
        "yes" if card.gated else "no",
    ]
    return "| " + " | ".join(cells) + " |"


def test_the_page_shows_the_table() -> None:
    lines = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("| `")] == [row_of(card) for card in DEEP_ENCODERS]


# --- wrong use -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet5", r"'resnet5'; did you mean resnet50.*wsi encoders"),
        ("UNI", r"did you mean uni\b"),
        ("zzzz", r"timm:NAME.*wsi encoders"),
        ("timm:resnet51", r"timm has no model for 'timm:resnet51', did you mean .*timm:resnet50 "),
        ("timm:hf-hub:who/what", "timm has no model"),
        ("timm:resnet50.nonsense", r"no weights tagged 'nonsense' for resnet50; it has .*tv_in1k"),
    ],
)
def test_unknown_names_get_the_closest(name: str, words: str) -> None:
    with pytest.raises(EncoderError, match=words):
        create_encoder(name, weights="random:0", device="cpu", precision="fp32")


def test_timm_describes_size_and_normalisation() -> None:
    convolutional, transformer = describe_timm("timm:resnet18.a1_in1k"), describe_timm("timm:vit_small_patch14_dinov2")
    assert (convolutional.input_px, convolutional.dim, convolutional.source) == (0, 512, "timm/resnet18.a1_in1k")
    assert (transformer.input_px, transformer.dim, transformer.mean) == (518, 384, (0.485, 0.456, 0.406))


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cpu:x"])
def test_an_absent_device_is_an_error(device: str) -> None:
    with pytest.raises(EncoderError, match=r"not available here.*--device auto"):
        create_encoder("resnet50", weights="random:0", device=device)


def test_an_unknown_precision_is_an_error() -> None:
    with pytest.raises(SettingsError, match="auto, fp32"):
        create_encoder("resnet50", weights="random:0", precision="fp8")  # type: ignore[arg-type]


def test_the_built_in_encoder_takes_no_weights() -> None:
    with pytest.raises(EncoderError, match="has no weights"):
        create_encoder("texture", weights="random:0")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_full_memory_is_one_sentence(tiles: np.ndarray, error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = DeepEncoder(card_of("vit_tiny_patch16_224"), "random:0", "cpu", "fp32")

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(encoder, "_backbone", fail)
    with pytest.raises(EncoderError, match="4 tiles of 256 × 256 px does not fit in the memory of cpu; use a smaller"):
        encoder.encode(tiles)
