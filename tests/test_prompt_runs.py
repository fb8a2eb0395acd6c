"""Runs of prompts: what they leave, what a kill changes, and wrong use."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from support_prompt import QUICK, SIDE, SPLITS, TILE, TINY, make_encoder, slide_tiles, train, write_slides
from support_training import StopsAt, kept_bytes

from wsi_engine import FeatureStore
from wsi_engine.classification.ensemble import load_ensemble
from wsi_engine.encoders.prompted import PromptedEncoder
from wsi_engine.encoders.texture import TextureEncoder
from wsi_engine.errors import EncoderError, InputError, ModelError
from wsi_engine.evaluation import evaluate_run
from wsi_engine.models import load_head, read_head_card
from wsi_engine.models.prompt_files import load_prompts, read_prompts_card
from wsi_engine.models.prompt_gradients import encode_bag
from wsi_engine.predictions import PredictionTable
from wsi_engine.runs import RunFolder
from wsi_engine.tissue import TissueSettings
from wsi_engine.training import fold as fold_module
from wsi_engine.training.prompt_run import train_prompt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slides(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def whole(cohort: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompted run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(cohort, out)
    return out


def test_a_run_is_all_there(cohort: Path, whole: Path) -> None:
    run = RunFolder(whole)
    record = run.read_record()
    assert record.complete
    assert record.classes == ("high", "low")
    assert {"mode": "prompt", "prompts": 2, "deep": False}.items() <= record.settings.items()
    assert record.features.encoder == "tiny"
    assert (record.features.tile_px, record.features.mpp) == (TILE, 0.5)
    cost = record.summary["tuning"]
    assert (cost["mode"], cost["encoder_parameters"], cost["head_parameters"]) == ("prompt", 2 * 192, 2 * 193)
    lines = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    assert [(line["fold"], line["epoch"]) for line in lines] == [(f, e) for f in range(2) for e in range(3)]
    assert cost["seconds_per_epoch"] == pytest.approx(np.mean([line["seconds"] for line in lines]))
    table = PredictionTable.read(run.predictions_file)
    assert sorted(table.slide_ids) == sorted(f"s{n:02}" for n in range(16))
    for number, fold in enumerate(record.summary["folds"]):
        own = table.folds == number
        assert fold["auroc"] == pytest.approx(roc_auc_score(table.labels[own], table.probabilities[own, 1]))
        assert fold["auroc"] > 0.8
    assert evaluate_run(whole).figures["auroc"].value > 0.7
    with open(run.splits_file, newline="") as stream:
        assert {row["label"] for row in csv.DictReader(stream)} == {"high", "low"}


def test_files_of_a_fold_say_what_they_are(whole: Path) -> None:
    encoder = make_encoder()
    names = set()
    for number in range(2):
        folder = RunFolder(whole).fold(number)
        card, prompts = read_head_card(folder / "head.safetensors"), read_prompts_card(folder / "prompts.safetensors")
        assert prompts["backbone"] == encoder.card.weights_digest
        assert (prompts["encoder"], prompts["tile_px"], prompts["prompts"]) == ("tiny", TILE, 2)
        assert card["tuned"] == "prompts.safetensors"
        made = PromptedEncoder(TINY, folder / "prompts.safetensors", "random:3", "cpu", "fp32")
        assert (made.card.name, made.card.weights_digest) == (
            card["features"]["encoder"], card["features"]["weights_digest"],
        )  # fmt: skip
        assert made.card.name == f"tiny+{made.card.weights_digest[:8]}" == prompts["features"]
        assert dict(made.card.options)["backbone_digest"] == encoder.card.weights_digest
        names.add(made.card.name)
    assert len(names) == 2  # each fold has prompts of its own


def test_kept_predictions_are_those_of_the_files(cohort: Path, whole: Path) -> None:
    """Prompts and head read back give what predictions.csv says, by another way through the engine."""
    run, encoder = RunFolder(whole), make_encoder()
    table = PredictionTable.read(run.predictions_file)
    tiles = slide_tiles(cohort, 16)
    backbone: Any = encoder.backbone
    for number in range(2):
        folder = run.fold(number)
        prompted = load_prompts(folder / "prompts.safetensors", backbone.network, encoder.card.weights_digest)
        head = load_head(folder / "head.safetensors").eval()
        for row in np.flatnonzero(table.folds == number):
            pixels = tiles.read(int(table.slide_ids[row][1:]))
            with torch.inference_mode():
                output = head(encode_bag(prompted, pixels, prepare=encoder.prepare, chunk=5))
                found = head.probabilities(output.logits)
            assert np.allclose(found.numpy(), table.probabilities[row], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "epochs"),
    [
        ({}, 2),
        ({"settings": replace(QUICK, augment=True, max_tiles=5, keep_share=0.0), "head": "dsmil", "deep": True}, 4),
        ({"mode": "finetune", "tune_blocks": 1, "settings": replace(QUICK, epochs=2)}, 3),
    ],
)
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], epochs: int
) -> None:
    monkeypatch.setattr(fold_module, "SAVE_SECONDS", 0.0)
    straight, out = tmp_path / "straight", tmp_path / "stopped"
    train(cohort, straight, **changes)
    with pytest.raises(KeyboardInterrupt):
        train(cohort, out, progress=StopsAt(epochs), **changes)
    assert not RunFolder(out).read_record().complete
    again = StopsAt(0)
    train(cohort, out, progress=again, **changes)
    assert kept_bytes(out) == kept_bytes(straight)
    assert len(kept_bytes(out)) == 3 + 2 * 2
    total = 2 * (changes.get("settings") or QUICK).epochs
    assert again.epochs == total - (epochs - 1)  # the epoch that raised was not saved yet
    with pytest.raises(ModelError, match="holds a run with another"):
        train(cohort, out, **(changes | {"head": "abmil"}))


def test_conventional_is_frozen_features_and_a_head(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = train(cohort, out, mode="conventional")
    assert report.record.summary["tuning"]["encoder_parameters"] == 0
    store = FeatureStore.open(out / "features" / "s03.zarr")
    assert store.encoders() == ("tiny",)
    assert not list(out.glob("fold-*/prompts.safetensors"))
    ensemble = load_ensemble(out, "cpu")
    prediction = ensemble.predict(store.features("tiny"))
    assert prediction.probabilities.shape == (2,)
    assert ensemble.sources[0].tuned is None


# Wrong use


@pytest.mark.parametrize(
    ("encoder", "match"),
    [
        (TextureEncoder, "encoder texture has no network to train with; choose one such as vit_small"),
        (
            lambda: make_encoder(
                replace(TINY, architecture="resnet18", options=(), pooling="token", dim=512), "random:0"
            ),
            "tiny cannot be prompted: prompts need a VisionTransformer of timm, and ResNet is none; choose an encoder",
        ),
    ],
)
def test_an_encoder_that_cannot_be_prompted(cohort: Path, tmp_path: Path, encoder: Any, match: str) -> None:
    with pytest.raises(EncoderError, match=match):
        train(cohort, tmp_path / "run", encoder=encoder())
    assert not (tmp_path / "run").exists()


def test_wrong_cohorts_are_told(cohort: Path, tmp_path: Path) -> None:
    rows = list(csv.DictReader((cohort / "cohort.csv").read_text().splitlines()))
    for row in rows:
        row["slide"] = str(cohort / row["slide"])
    settings: dict[str, Any] = {
        "encoder": make_encoder(), "head": "mean", "tissue": None, "splits": SPLITS, "settings": QUICK,
    }  # fmt: skip
    bare = [{key: value for key, value in row.items() if key != "slide"} for row in rows]
    with pytest.raises(InputError, match='no column "slide"'):
        train_prompt(bare, "grade", tmp_path / "a", **settings)
    broken = [dict(row) for row in rows]
    (tmp_path / "broken.png").write_bytes(b"nothing")
    broken[2]["slide"] = str(tmp_path / "broken.png")
    broken[3]["mpp"] = "half"
    with pytest.raises(InputError, match=r"1 row whose \"mpp\" is no number"):
        train_prompt(broken, "grade", tmp_path / "b", **settings)
    broken[3]["mpp"] = "0.5"
    with pytest.raises(InputError, match=r"(?s)1 slide that cannot be read.*s02: .*broken.png"):
        train_prompt(broken, "grade", tmp_path / "b", **settings)
    with pytest.raises(ModelError, match="no head named 'clam'"):
        train_prompt(rows, "grade", tmp_path / "c", **(settings | {"head": "clam"}))


def test_a_slide_without_tissue_is_left_out(cohort: Path, tmp_path: Path) -> None:
    from PIL import Image

    rows = list(csv.DictReader((cohort / "cohort.csv").read_text().splitlines()))
    for row in rows:
        row["slide"] = str(cohort / row["slide"])
    Image.new("RGB", (SIDE, SIDE), "white").save(tmp_path / "white.png")
    white = str(tmp_path / "white.png")
    rows.append({"slide": white, "slide_id": "white", "patient": "w", "grade": "low", "mpp": "0.5"})
    report = train_prompt(
        rows, "grade", tmp_path / "run", encoder=make_encoder(), head="mean", splits=SPLITS,
        settings=replace(QUICK, epochs=1), tissue=TissueSettings(min_tissue_mm2=0), min_tissue=0.25,
    )  # fmt: skip
    assert any("1 slide left out, for want of a tile (white)" in warning for warning in report.warnings)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, leases and logs included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mpp": 1.0}, r"another features mpp \(0\.5, now 1\.0\)"),
        ({"tissue": "otsu"}, r"another tissue|another setting tissue"),
        ({"min_tissue": 0.5}, r"another setting min_tissue \(0\.25, now 0\.5\)"),
        ({"options": {"dropout": 0.5}}, r"another option dropout \(0\.25, now 0\.5\)"),
        ({"mode": "conventional"}, r"another setting mode \(prompt, now conventional\)"),
        ({"settings": replace(QUICK, learning_rate=1e-3)}, "another setting learning_rate"),
    ],
)
def test_another_run_is_refused_before_a_slide_is_opened(
    cohort: Path, whole: Path, changes: dict[str, Any], match: str
) -> None:
    before = files_of(whole)
    with pytest.raises(ModelError, match=match):
        train(cohort, whole, **changes)
    assert files_of(whole) == before


def test_threads_and_memory_may_change(cohort: Path, tmp_path: Path) -> None:
    """What decides nothing is compared with nothing, in a conventional run too, whose features have a precision."""
    first = replace(QUICK, epochs=1)
    run, heads = RunFolder(tmp_path / "run"), set()
    for settings in (first, replace(first, workers=1, keep_share=0.5)):
        train(cohort, run.path, mode="conventional", settings=settings)
        heads.add(run.head_file(0).read_bytes())
    assert run.read_record().complete
    assert len(heads) == 1
