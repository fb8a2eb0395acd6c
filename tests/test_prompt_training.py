"""Prompts trained on slides: the whole run, what a kill leaves, and what is made of it afterwards."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from support_prompt import SIDE, TILE, TINY, make_encoder, write_slides

from wsi_engine import FeatureStore, create_encoder
from wsi_engine.classification.ensemble import load_ensemble
from wsi_engine.classification.explanation import ExplainSettings
from wsi_engine.classification.slides import classify
from wsi_engine.cohorts.splits import Fold, SplitSettings
from wsi_engine.encoders.prompted import (
    PromptedEncoder,
    TunedEncoder,
    check_tuned,
    create_tuned_encoder,
    describe_prompted,
    read_tuned_card,
)
from wsi_engine.encoders.texture import TextureEncoder
from wsi_engine.encoders.weights import digest_state
from wsi_engine.errors import EncoderError, InputError, ModelError, SettingsError, SlideError
from wsi_engine.evaluation import evaluate_run
from wsi_engine.extraction import extract
from wsi_engine.inputs import SlideSource
from wsi_engine.models import load_head, read_head_card
from wsi_engine.models.prompt_files import load_prompts, read_prompts_card, save_prompts
from wsi_engine.models.prompt_gradients import encode_bag
from wsi_engine.predictions import PredictionTable
from wsi_engine.runs import RunFolder
from wsi_engine.slide import open_slide
from wsi_engine.tissue import TissueSettings
from wsi_engine.training import fold as fold_module
from wsi_engine.training.hardware import Hardware
from wsi_engine.training.optimisation import learning_rate
from wsi_engine.training.plan import HeadPlan
from wsi_engine.training.prompt_fold import PromptTask, build_tuned, fit_prompts
from wsi_engine.training.prompt_memory import MemoryWatch
from wsi_engine.training.prompt_run import train_prompt
from wsi_engine.training.prompt_settings import PromptSettings, Tuning
from wsi_engine.training.prompt_tiles import SlideTiles, read_ahead, turn_tiles
from wsi_engine.training.report import TrainReport
from wsi_engine.training.sampling import Stream, torch_seed

QUICK = PromptSettings(epochs=3, learning_rate=1e-2, bags_per_step=2, chunk=4, device="cpu", precision="fp32")
SPLITS = SplitSettings(folds=2, validation=0.25)
BARE = ExplainSettings(attention=True, heatmaps=False, geojson=False, sheets=False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slides(tmp_path_factory.mktemp("cohort"))


def train(cohort: Path, out: Path, **changes: Any) -> TrainReport:
    arguments: dict[str, Any] = {
        "head": "mean", "tissue": None, "splits": SPLITS, "settings": QUICK, "encoder": make_encoder(), "prompts": 2,
    }  # fmt: skip
    return train_prompt(cohort / "cohort.csv", "grade", out, **(arguments | changes))


@pytest.fixture(scope="module")
def whole(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompted run that nothing disturbed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(cohort, out)
    return out


def kept_bytes(run: Path) -> dict[str, bytes]:
    """Every file that has no times in it."""
    paths = [*run.glob("fold-*/*"), *(run / name for name in ("predictions.csv", "validation.csv", "splits.csv"))]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


# Settings and pieces


def test_defaults_are_those_of_the_paper() -> None:
    settings = PromptSettings()
    assert (settings.optimiser, settings.learning_rate, settings.weight_decay) == ("adamw", 1e-4, 1e-2)
    assert (settings.epochs, settings.bags_per_step, settings.schedule) == (40, 8, "cosine")
    assert learning_rate(settings, 0, settings.least_rate) == pytest.approx(1e-4)
    assert learning_rate(settings, 40, settings.least_rate) == pytest.approx(5e-6)
    assert learning_rate(settings, 20, settings.least_rate) == pytest.approx((1e-4 + 5e-6) / 2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PromptSettings(chunk=0), "chunk must be a whole number of at least 1"),
        (lambda: PromptSettings(least_rate=1.0), "least_rate must be within 0 and 0.0001"),
        (lambda: PromptSettings(keep_share=float("nan")), "keep_share must be a number"),
        (lambda: PromptSettings(epochs=0), "epochs must be"),
        (lambda: PromptSettings(augment=1), "augment must be True or False"),  # type: ignore[arg-type]
        (lambda: Tuning("tune"), "mode 'tune' is unknown; use one of prompt, conventional, finetune"),  # type: ignore[arg-type]
        (lambda: Tuning(prompts=0), "prompts must be a whole number of at least 1"),
        (lambda: Tuning("finetune", deep=True), "deep is about prompts"),
        (lambda: Tuning("prompt", tune_blocks=1), "tune_blocks is for the mode finetune"),
    ],
)
def test_settings_are_checked(make: Any, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        make()


def test_turned_tiles_are_the_eight_symmetries_and_repeat_with_the_generator() -> None:
    tile = torch.arange(3 * 16, dtype=torch.uint8).view(1, 4, 4, 3)
    torch.manual_seed(0)
    turned = turn_tiles(tile.expand(400, -1, -1, -1))
    torch.manual_seed(0)
    assert torch.equal(turned, turn_tiles(tile.expand(400, -1, -1, -1)))
    plain = tile[0].numpy()
    expected = {np.rot90(one, k).tobytes() for one in (plain, plain[::-1]) for k in range(4)}
    assert {one.numpy().tobytes() for one in turned} == expected
    assert len(expected) == 8


def slide_tiles(cohort: Path, places: int = 4, share: float = 0.1) -> SlideTiles:
    from wsi_engine.grid import lay_grid

    sources = [SlideSource(str(cohort / "slides" / f"s{n:02}.png"), f"s{n:02}", 0.5) for n in range(places)]
    grids = []
    for source in sources:
        with open_slide(source.path, source.mpp) as slide:
            grids.append(lay_grid(slide, 0.5, TILE, tissue=None))
    return SlideTiles(sources, grids, keep_share=share)


def test_tiles_are_the_slides_pixels_and_decoded_once_where_they_fit(
    cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = slide_tiles(cohort)
    with open_slide(str(cohort / "slides" / "s01.png"), 0.5) as slide:
        picture = slide.read_region(0, 0, SIDE, SIDE)
    expected = picture.reshape(3, TILE, 3, TILE, 3).swapaxes(1, 2).reshape(9, TILE, TILE, 3)
    rows = np.array([1, 4, 8])
    assert np.array_equal(tiles.read(1, rows), expected[rows])
    decoded = []
    decode = SlideTiles._decode
    monkeypatch.setattr(
        SlideTiles, "_decode", lambda self, place, which: (decoded.append(place), decode(self, place, which))[1]
    )
    for source in (tiles, slide_tiles(cohort, share=0.0)):
        decoded.clear()
        for place, pixels in read_ahead(source, [(1, None), (0, rows), (1, rows), (1, None)]):
            own = expected if len(pixels) == 9 else expected[rows]
            assert (place == 1) == np.array_equal(pixels, own)
        assert decoded == ([1, 0] if source is tiles else [1, 0, 1, 1])


def make_task(cohort: Path, **changes: Any) -> PromptTask:
    task = PromptTask(
        slide_tiles(cohort, 8), np.arange(8) % 2, [f"s{n}" for n in range(8)], make_encoder(), Tuning(prompts=2),
        HeadPlan("abmil", 192, 2, {"hidden": (16,), "attention": 8, "dropout": 0.0}), QUICK,
        Hardware(torch.device("cpu"), make_encoder()._precision, 1),
    )  # fmt: skip
    return replace(task, **changes)


def test_an_epoch_is_a_plain_loop(cohort: Path) -> None:
    """AdamW on the mean loss of two bags, each whole in one graph; the same prompts and head to rounding."""
    settings = replace(QUICK, epochs=2, balanced=False, augment=False)
    task = make_task(cohort, settings=settings)
    fold = Fold(tuple(range(5)), (), ())
    fitted = fit_prompts(task, fold)
    from wsi_engine.training.sampling import open_stream

    encoder = build_tuned(task.encoder, task.tuning, torch_seed(0, 0, 0, Stream.PROMPTS))
    head = task.plan.build(torch_seed(0, 0, 0, Stream.WEIGHTS))
    both = [*encoder.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(both, 1e-2, weight_decay=1e-2)
    for epoch in range(2):
        optimiser.param_groups[0]["lr"] = learning_rate(settings, epoch, 5e-6)
        order = [int(place) for place in open_stream(0, 0, epoch, Stream.SLIDES).permutation(5)]
        for step in (order[:2], order[2:4], order[4:]):
            optimiser.zero_grad()
            bags = [torch.from_numpy(task.tiles.read(place)) for place in step]
            losses = [
                head.loss(head(encoder(task.encoder.prepare(bag))), place % 2)
                for bag, place in zip(bags, step, strict=True)
            ]
            torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    assert fitted.encoder is not None
    torch.testing.assert_close(fitted.encoder.prompts, encoder.prompts, atol=2e-5, rtol=1e-4)
    for name, weight in head.state_dict().items():
        if not name.endswith("attention_c.bias"):  # its gradient is rounding alone
            torch.testing.assert_close(fitted.head.state_dict()[name], weight, atol=2e-5, rtol=1e-4)
    assert "no validation slides" in fitted.warnings[0]


@pytest.mark.parametrize("mode", ["prompt", "finetune"])
def test_the_given_encoder_is_left_as_it_was(cohort: Path, mode: Any) -> None:
    encoder = make_encoder()
    before = digest_state(encoder.backbone.state_dict())
    task = make_task(cohort, encoder=encoder, tuning=Tuning(mode), settings=replace(QUICK, epochs=1, augment=True))
    fitted = fit_prompts(task, Fold((0, 1, 2, 3), (4, 5), (6, 7)))
    assert digest_state(encoder.backbone.state_dict()) == before
    assert fitted.encoder is not None
    if mode == "finetune":
        assert digest_state(fitted.encoder.state_dict()) != before
    assert fitted.history[0].memory_mb is None or fitted.history[0].memory_mb >= 0
    assert fitted.test.shape == (2, 2)


def test_tuned_blocks_alone_learn() -> None:
    encoder = make_encoder()
    tuned: Any = build_tuned(encoder, Tuning("finetune", tune_blocks=1), 0)
    learning = {name for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert learning
    assert all(name.startswith(("network.blocks.1.", "network.norm.")) for name in learning)
    assert sum(weight.numel() for weight in build_tuned(encoder, Tuning(prompts=1), 0).parameters()) == 192
    deep = build_tuned(encoder, Tuning(prompts=3, deep=True), 0)
    assert sum(weight.numel() for weight in deep.parameters()) == 2 * 3 * 192
    with pytest.raises(SettingsError, match="tune_blocks is 3 and the encoder has 2 blocks"):
        build_tuned(encoder, Tuning("finetune", tune_blocks=3), 0)


def test_memory_is_watched() -> None:
    watch = MemoryWatch(torch.device("cpu"))
    if watch.read() is None:
        pytest.skip("the system does not tell")
    watch.reset()
    with mmap(-1, 24 * 2**20) as block:  # from the system itself: the C library might give freed memory again
        block.write(b"\1" * len(block))
        grown = watch.read()
    assert grown is not None
    assert grown >= 20


# Runs


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


class StopsAt:
    """A progress that raises after some epochs."""

    def __init__(self, epochs: int) -> None:
        self.left, self.epochs = epochs, 0

    def run_started(self, folds: int, epochs: int) -> None: ...

    def fold_started(self, fold: int, slides: int) -> None: ...

    def fold_finished(self, summary: Any, resumed: bool) -> None: ...

    def epoch_finished(self, fold: int, epoch: int, train_loss: float, validation_loss: float | None) -> None:
        self.epochs += 1
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


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


def test_a_slide_that_breaks_while_training_is_named(cohort: Path, tmp_path: Path) -> None:
    tiles = slide_tiles(cohort, 2)
    gone = SlideSource(str(tmp_path / "gone.png"), "gone", 0.5)
    broken = SlideTiles([gone, gone], tiles._grids)
    with pytest.raises(SlideError, match=r"gone\.png"):
        fit_prompts(make_task(cohort, tiles=broken, labels=np.array([0, 1])), Fold((0, 1), (), ()))


# Use


def save_tiny_prompts(path: Path, **card: Any) -> Path:
    """Prompts for timm's smallest transformer with random weights."""
    encoder = create_encoder("timm:test_vit", "random:0", "cpu", "fp32")
    module: Any = build_tuned(encoder, Tuning(prompts=2), 5)  # type: ignore[arg-type]
    name = describe_prompted(encoder.card, module, path.name).name
    save_prompts(module, path, encoder.card.weights_digest, {"encoder": "timm:test_vit", "features": name, **card})
    return path


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
