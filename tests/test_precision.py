"""Precision: chosen by the device, checked on tissue, written down, and never mixed unasked."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from wsi_engine import FeatureStore, create_encoder, extract
from wsi_engine.encoders import deep, precision
from wsi_engine.encoders.cards import find_card
from wsi_engine.encoders.deep import DeepEncoder
from wsi_engine.encoders.precision import COMPILE_FROM_TILES, Precision, choose_precision, lower_network, probe_tiles
from wsi_engine.errors import EncoderError, SettingsError

CPU = torch.device("cpu")


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any CPU can compute in bf16, if slowly."""
    monkeypatch.setattr(precision, "_cpu_flags", lambda: frozenset({"avx512_bf16"}))


def tiny(name: str = "auto") -> DeepEncoder:
    card = find_card("vit_tiny_patch16_224")
    assert card
    return DeepEncoder(card, "random:0", "cpu", name)


@pytest.mark.parametrize("name", precision.PRECISIONS[1:])
def test_names_go_there_and_back(name: str) -> None:
    assert str(Precision.parse(name)) == name


@pytest.mark.parametrize("name", ["auto", "fp8", "", "+compile", "bf16+"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="is unknown"):
        Precision.parse(name)


def test_auto_takes_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.shutil, "which", lambda _: None)
    for flags, expected in (({"avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16"), ({"avx2"}, "fp32"), (set(), "fp32")):
        monkeypatch.setattr(precision, "_cpu_flags", lambda flags=flags: frozenset(flags))
        assert str(choose_precision("auto", CPU, 10**6)) == expected
    assert str(choose_precision("fp32", CPU)) == "fp32"
    with pytest.raises(EncoderError, match="does not compute in bf16; use --precision fp32"):
        choose_precision("bf16", CPU)


def test_long_jobs_are_compiled_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch, bf16: None) -> None:
    monkeypatch.setattr(precision.shutil, "which", lambda _: "/usr/bin/g++")
    for tiles, expected in ((None, "bf16"), (COMPILE_FROM_TILES - 1, "bf16"), (COMPILE_FROM_TILES, "bf16+compile")):
        assert str(choose_precision("auto", CPU, tiles)) == expected
    monkeypatch.setattr(precision.shutil, "which", lambda _: None)
    assert str(choose_precision("auto", CPU, 10**6)) == "bf16"
    with pytest.raises(EncoderError, match="C\\+\\+ compiler"):
        choose_precision("bf16+compile", CPU)


@pytest.mark.parametrize("name", ["resnet50", "vit_tiny_patch16_224"])
def test_bf16_features_point_the_same_way(bf16: None, name: str) -> None:
    exact = create_encoder(name, "random:0", "cpu", "fp32")
    fast = create_encoder(name, "random:0", "cpu", "bf16")
    assert (exact.precision, fast.precision) == ("fp32", "bf16")
    tiles = probe_tiles(256)[:, ::-1].copy()
    a, b = exact.encode(tiles).astype(np.float64), fast.encode(tiles).astype(np.float64)
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() >= 0.999
    assert not np.array_equal(a, b)
    assert exact.card.weights_digest == fast.card.weights_digest


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_features_do_not_depend_on_place_or_neighbours(bf16: None, name: str) -> None:
    encoder = tiny(name)
    tiles = np.concatenate([probe_tiles(224), 255 - probe_tiles(224)])
    whole = encoder.encode(tiles)
    assert np.array_equal(encoder.encode(tiles[::-1])[::-1], whole)
    changed = tiles.copy()
    changed[1:] = 7
    assert np.array_equal(encoder.encode(changed)[0], whole[0])


def test_batch_norms_are_folded_exactly() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean, norm.running_var = torch.randn(8), torch.rand(8) + 0.1
    folded = lower_network(network, Precision("fp32"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images = torch.randn(2, 3, 9, 9)
    assert torch.allclose(folded(images), network(images), atol=1e-5)
    assert isinstance(network[1], nn.BatchNorm2d), "the original is left alone"


def test_auto_falls_back_with_a_warning(
    bf16: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deep, "least_cosine", lambda *_: 0.9981)
    with caplog.at_level(logging.WARNING, "wsi_engine"):
        assert tiny().precision == "fp32"
    assert "cosine 0.9981" in caplog.text
    with pytest.raises(EncoderError, match=r"0\.9981.*use --precision fp32"):
        tiny("bf16")


def test_features_that_are_not_numbers_count_as_different() -> None:
    reference = torch.ones(2, 3)
    assert precision.least_cosine(reference, reference) == pytest.approx(1)
    assert precision.least_cosine(torch.tensor([[1.0, 1, 1], [torch.nan, 1, 1]]), reference) == 0
    assert precision.least_cosine(-reference, reference) == pytest.approx(-1)


def test_probe_tiles_are_tissue_of_any_size() -> None:
    for side in (64, 224, 518, 1024):
        tiles = probe_tiles(side)
        assert tiles.shape == (4, side, side, 3)
        assert tiles.std() > 30
        assert not np.array_equal(tiles[0], tiles[1])


def test_a_batch_too_large_is_halved_and_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny("fp32")
    tiles = np.concatenate([probe_tiles(224)] * 2)
    whole = encoder.encode(tiles)
    plain, sizes = DeepEncoder._run, []

    def small(self: DeepEncoder, pixels: np.ndarray) -> torch.Tensor:
        sizes.append(len(pixels))
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("the device is full")
        return plain(self, pixels)

    monkeypatch.setattr(DeepEncoder, "_run", small)
    assert np.allclose(encoder.encode(tiles), whole, rtol=1e-4, atol=1e-5)
    assert sizes == [8, 4, 2, 2, 2, 2]
    sizes.clear()
    encoder.encode(tiles)
    assert sizes == [2, 2, 2, 2]
    monkeypatch.setattr(DeepEncoder, "_run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(EncoderError, match="does not fit in the memory"):
        encoder.encode(tiles)


def test_a_folder_keeps_to_the_precision_it_was_begun_with(bf16: None, picture: Path, tmp_path: Path) -> None:
    (picture.parent / "second.png").write_bytes(picture.read_bytes())
    options = {"encoder": "vit_tiny_patch16_224", "weights": "random:0", "mpp": 2.0, "tile_px": 224, "slide_mpp": 0.5}
    out = tmp_path / "out"
    first = extract(picture, out, **options, precision="fp32")  # type: ignore[arg-type]
    assert first.precision == "fp32"
    both = extract(picture.parent, out, **options)  # type: ignore[arg-type]
    assert both.precision == "fp32"
    assert sorted(result.status for result in both.results) == ["already complete", "done"]
    assert FeatureStore.open(out / "second.zarr").provenance()["precision"] == "fp32"
    other = extract(picture, out, **options, precision="bf16")  # type: ignore[arg-type]
    assert other.results[0].status == "failed"
    assert "precision fp32, now bf16" in other.results[0].message
    assert extract(picture, tmp_path / "new", **options).precision == "bf16"  # type: ignore[arg-type]
