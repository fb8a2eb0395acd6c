"""Trained prompts in use: features made with them, and slides classified by a run of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support_prompt import QUICK, SIDE, TILE, save_tiny_prompts, train, write_slides

from wsi_engine import FeatureStore, create_encoder
from wsi_engine.classification.ensemble import load_ensemble
from wsi_engine.classification.explanation import ExplainSettings
from wsi_engine.classification.slides import classify
from wsi_engine.encoders.prompted import TunedEncoder, check_tuned, create_tuned_encoder, read_tuned_card, save_tuned
from wsi_engine.encoders.weights import digest_state
from wsi_engine.errors import EncoderError, ModelError
from wsi_engine.extraction import extract
from wsi_engine.models import read_head_card
from wsi_engine.models.cards import CardFile
from wsi_engine.predictions import PredictionTable
from wsi_engine.runs import RunFolder
from wsi_engine.slide import open_slide
from wsi_engine.training.prompt_fold import build_tuned
from wsi_engine.training.prompt_settings import Tuning

BARE = ExplainSettings(attention=True, heatmaps=False, geojson=False, sheets=False)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slides(tmp_path_factory.mktemp("cohort"))


def test_prompted_features_are_kept_apart(cohort: Path, tmp_path: Path) -> None:
    path = save_tiny_prompts(tmp_path / "prompts.safetensors", mpp=0.5, tile_px=TILE)
    slide, out = cohort / "slides" / "s00.png", tmp_path / "out"
    options: dict[str, Any] = {
        "weights": "random:0", "slide_mpp": 0.5, "tile_px": TILE, "tissue": None, "device": "cpu", "dtype": "float32",
        "precision": "fp32",
    }  # fmt: skip
    extract(slide, out, "timm:test_vit", **options)
    report = extract(slide, out, prompts=path, **options)
    assert not report.failed
    store = FeatureStore.open(out / "s00.zarr")
    prompted = create_tuned_encoder(path, None, "random:0", "cpu", "fp32")
    assert store.encoders() == ("timm_test_vit", f"timm_test_vit+{prompted.card.weights_digest[:8]}")
    made = store.provenance(store.encoders()[1])["encoder"]
    assert made["weights_digest"] == prompted.card.weights_digest
    assert dict(made["options"])["prompts_digest"] == digest_state({"prompts": prompted.backbone.prompted.prompts})  # type: ignore[union-attr]
    with open_slide(str(slide), 0.5) as opened:
        picture = opened.read_region(0, 0, SIDE, SIDE)
    pixels = picture.reshape(3, TILE, 3, TILE, 3).swapaxes(1, 2).reshape(9, TILE, TILE, 3)
    stored = store.features(store.encoders()[1])
    assert np.allclose(stored, prompted.encode(pixels), atol=1e-5)
    plain = store.features("timm:test_vit")
    assert np.abs(plain - stored).max() > 1e-3
    assert extract(slide, out, prompts=path, **options).results[0].status == "already complete"


def test_prompts_of_another_backbone_are_refused(
    tmp_path: Path, cohort: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_tiny_prompts(tmp_path / "prompts.safetensors", mpp=1.0, tile_px=64)
    with pytest.raises(EncoderError, match="holds prompts for the backbone with weights"):
        create_tuned_encoder(path, None, "random:1", "cpu")
    with pytest.raises(EncoderError, match="made for the encoder timm:test_vit, not for vit_tiny_patch16_224"):
        extract(cohort / "slides" / "s00.png", tmp_path / "out", "vit_tiny_patch16_224", prompts=path)
    with pytest.raises(EncoderError, match="given by its name"):
        encoder = create_encoder("timm:test_vit", "random:0", "cpu")
        extract(cohort / "slides" / "s00.png", tmp_path / "out", encoder, prompts=path)
    with pytest.raises(EncoderError, match="no file of prompts at"):
        read_tuned_card(tmp_path / "nowhere.safetensors")
    assert check_tuned(path, "timm:test_vit", 0.5, 64) is not None
    assert "was trained on tiles of 64 px at 1.0 mpp, not of 64 px at 0.5 mpp" in caplog.text


@pytest.mark.parametrize("mode", ["prompt", "finetune"])
def test_a_run_classifies_slides_as_it_was_trained(cohort: Path, tmp_path: Path, mode: Any) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    encoder = create_encoder("timm:test_vit", "random:0", "cpu", "fp32")
    train(cohort, run, encoder=encoder, mode=mode, prompts=1, tile_px=TILE, settings=replace(QUICK, epochs=1))
    slides = [cohort / "slides" / f"s{number:02}.png" for number in range(2)]
    report = classify(
        slides, run, out, weights="random:0", slide_mpp=0.5, settings=BARE, device="cpu", precision="fp32"
    )  # fmt: skip
    assert not report.failed, [result.message for result in report.results]
    ensemble = load_ensemble(run, "cpu", "fp32")
    assert len({source.origin.encoder for source in ensemble.sources}) == ensemble.folds == 2
    store = FeatureStore.open(out / "features" / "s00.zarr")
    assert len(store.encoders()) == 2
    assert store.attention("run").shape == (9, 1)
    # the fold that did not train on a slide says of it what it said when it was trained
    table = PredictionTable.read(RunFolder(run).predictions_file)
    row = table.slide_ids.index("s00")
    fold = int(table.folds[row])
    alone = load_ensemble(RunFolder(run).head_file(fold), "cpu", "fp32")
    prediction = alone.predict(store.features(alone.features.encoder))
    temperature = read_head_card(RunFolder(run).head_file(fold))["calibration"]["temperature"]
    raw = np.log(table.probabilities[row]) / temperature
    expected = np.exp(raw - raw.max()) / np.exp(raw - raw.max()).sum()
    assert np.allclose(prediction.probabilities, expected, atol=2e-3)  # features are float16 there
    with pytest.raises(ModelError, match="takes features of 2 encoders"):
        ensemble.predict(store.features(alone.features.encoder))
    if mode == "finetune":
        file = RunFolder(run).fold(fold) / "encoder.safetensors"
        assert isinstance(create_tuned_encoder(file, None, None, "cpu", "fp32"), TunedEncoder)
    else:
        with pytest.raises(EncoderError, match="holds prompts for the backbone with weights"):
            classify(slides, run, tmp_path / "other", weights="random:1", slide_mpp=0.5, settings=BARE, device="cpu")


def test_the_card_of_tuned_weights_is_read_alone(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = create_encoder("timm:test_vit", "random:0", "cpu", "fp32")
    tuned = build_tuned(encoder, Tuning("finetune"), 0)  # type: ignore[arg-type]
    save_tuned(tuned, tmp_path / "encoder.safetensors", {"encoder": "timm:test_vit", "features": "timm:test_vit+1"})
    prompts = save_tiny_prompts(tmp_path / "prompts.safetensors")
    monkeypatch.setattr(CardFile, "read", lambda *_: pytest.fail("the tensors are read"))
    assert read_tuned_card(tmp_path / "encoder.safetensors")["features"] == "timm:test_vit+1"
    assert read_tuned_card(prompts)["encoder"] == "timm:test_vit"
    assert check_tuned(tmp_path / "encoder.safetensors", None, 0.5, TILE) == "timm:test_vit+1"
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(EncoderError, match="holds tensors but no card of prompts"):
        read_tuned_card(tmp_path / "plain.safetensors")
