"""Training of scale attention: its crops, colours and batches, a kill and its resumption, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support_scale import TINY, paint_tissue, write_pictures

from wsi_engine.encoders.precision import Precision
from wsi_engine.errors import InputError, ModelError, SettingsError, WeightsError
from wsi_engine.kernels import nuclei_from_attention
from wsi_engine.metrics.nuclei import aji, dice
from wsi_engine.models import scale_attention
from wsi_engine.models.backbones import build_backbone
from wsi_engine.models.scale_attention import SCALES_MPP, ScaleClassifier, normalise_pixels
from wsi_engine.models.scale_files import load_scale_attention
from wsi_engine.nuclei import scale_classifier, scale_steps
from wsi_engine.nuclei.samples import (
    open_sampler,
)
from wsi_engine.nuclei.scale_batches import CropFeed
from wsi_engine.nuclei.scale_classifier import create_classifier
from wsi_engine.nuclei.scale_scores import attend_picture, score_labelled
from wsi_engine.nuclei.scale_settings import ScaleTrainingSettings
from wsi_engine.nuclei.scale_steps import ScaleTrainer
from wsi_engine.nuclei.scale_training import train_scale_attention
from wsi_engine.synthetic import SlideSpec, SyntheticSlide
from wsi_engine.training.hardware import Hardware

STAINED = dataclasses.replace(TINY, stain_epochs=1)


@pytest.fixture(autouse=True, scope="module")
def light_classifier() -> Iterator[None]:
    """A ResNet of 10 layers for the classifier of scales: a quarter of the size, of the same 512 numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_attention, "build_backbone", lambda name: build_backbone(name.replace("34", "10t")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("tissue"))


class Interrupting:
    """A display that breaks the run off after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches
        self.done: int | None = None

    def training_started(self, epochs: int, batches: int, done: int) -> None:
        self.done = done

    def batch_done(self, terms: dict[str, float]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def epoch_done(self, entry: dict[str, Any]) -> None:
        pass


def read_log(out: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    train_scale_attention([folder], out, TINY)
    return out


def test_a_training_leaves_a_network_a_log_and_sheets(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {"run.json", "log.jsonl", "attention.safetensors", "sheet-0001.png", "sheet-0002.png"}
    log = read_log(undisturbed)
    assert [entry["epoch"] for entry in log] == [1, 2]
    for entry in log:
        terms = sum(entry[name] for name in ("scale", "smoothness", "rigid", "scaled"))
        assert entry["loss"] == pytest.approx(terms, abs=1e-5)
        assert 0 <= entry["accuracy"] <= 1
    network, card = load_scale_attention(undisturbed / "attention.safetensors")
    assert network.settings == TINY.network
    assert float(network.tau) == pytest.approx(log[1]["running_tau"])
    assert card["epoch"] == 2
    assert card["training"]["settings"]["seed"] == 0
    assert (undisturbed / "attention.safetensors").stat().st_size < 100_000


@pytest.fixture(scope="module")
def stained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training whose first epoch learns the stain."""
    out = tmp_path_factory.mktemp("stained") / "out"
    train_scale_attention([folder], out, STAINED)
    return out


def test_the_stain_comes_first_where_it_is_asked_for(stained: Path, undisturbed: Path) -> None:
    first, second = read_log(stained)
    assert set(first) == {"epoch", "stain", "scale", "loss", "accuracy", "tau", "running_tau"}
    assert first["loss"] == pytest.approx(first["stain"] + first["scale"], abs=1e-5)
    assert set(second) == set(read_log(undisturbed)[1])
    assert {path.name for path in stained.iterdir()} == {path.name for path in undisturbed.iterdir()}
    _, card = load_scale_attention(stained / "attention.safetensors")
    assert card["training"]["settings"]["stain_epochs"] == 1


@pytest.mark.parametrize(
    ("batches", "stain_epochs"), [(1, 0), (3, 0), (1, 1), (3, 1)], ids=["1", "3", "in stain", "after stain"]
)
def test_a_killed_training_ends_in_the_same_bytes(
    folder: Path, undisturbed: Path, stained: Path, tmp_path: Path, batches: int, stain_epochs: int
) -> None:
    out = tmp_path / "out"
    settings = dataclasses.replace(TINY, stain_epochs=stain_epochs)
    undisturbed = stained if stain_epochs else undisturbed
    with pytest.raises(KeyboardInterrupt):
        train_scale_attention([folder], out, settings, Interrupting(batches + 1))
    assert (out / "state.pt").exists()
    again = Interrupting(100)
    threads = dataclasses.replace(settings, workers=1, checkpoint_batches=7)
    train_scale_attention([folder], out, threads, again)
    assert again.done == batches  # what the kill cost is the batch in flight
    assert (out / "attention.safetensors").read_bytes() == (undisturbed / "attention.safetensors").read_bytes()
    for name in ("sheet-0001.png", "sheet-0002.png", "run.json"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    assert read_log(out) == read_log(undisturbed)


def test_a_complete_training_is_left_as_it_is(folder: Path, undisturbed: Path) -> None:
    before = (undisturbed / "attention.safetensors").stat().st_mtime_ns
    report = train_scale_attention([folder], undisturbed, TINY)
    assert report.already_complete
    assert (undisturbed / "attention.safetensors").stat().st_mtime_ns == before
    assert len(report.to_json()["history"]) == 2


def test_what_is_only_reported_makes_no_other_training(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(TINY, views=2, sheet_crops=2)
    assert train_scale_attention([folder], undisturbed, other).already_complete
    train_scale_attention([folder], tmp_path / "out", other)
    weights = [path / "attention.safetensors" for path in (undisturbed, tmp_path / "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


class Blocking(Interrupting):
    """A display that puts a folder where the network is to be written."""

    def __init__(self, place: Path) -> None:
        super().__init__(100)
        self.place = place

    def batch_done(self, terms: dict[str, float]) -> None:
        (self.place / "in the way").mkdir(parents=True, exist_ok=True)


def test_a_network_that_cannot_be_written_is_said_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ModelError, match=r"cannot write to .*out: ") as caught:
        train_scale_attention([folder], out, TINY, Blocking(out / "attention.safetensors"))
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_training_is_refused(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="seed was 0 and is 1"):
        train_scale_attention([folder], undisturbed, dataclasses.replace(TINY, seed=1))
    with pytest.raises(ModelError, match="stain_epochs was 0 and is 1"):
        train_scale_attention([folder], undisturbed, STAINED)
    with pytest.raises(ModelError, match="other pictures"):
        train_scale_attention([folder / "a.png"], undisturbed, TINY)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="no training wrote"):
        train_scale_attention([folder], tmp_path, TINY)
    (tmp_path / "thesis.txt").unlink()
    with pytest.raises(KeyboardInterrupt):
        train_scale_attention([folder], tmp_path, TINY, Interrupting(2))
    (tmp_path / "state.pt").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"state.pt cannot be read"):
        train_scale_attention([folder], tmp_path, TINY)


def test_a_labelled_folder_is_reported_on_and_changes_nothing(undisturbed: Path, folder: Path, tmp_path: Path) -> None:
    slide = SyntheticSlide(SlideSpec(width=1600, height=1200, mpp=0.25, coverage=1, seed=9))
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    Image.fromarray(slide.paint(500, 500, 90, 70)).save(labelled / "x.png")
    truth = slide.truth.labels(500, 500, 90, 70)
    Image.fromarray(truth.astype(np.uint16)).save(labelled / "x_label.png")
    train_scale_attention([folder], tmp_path / "out", TINY, report_on=labelled)
    assert (tmp_path / "out" / "attention.safetensors").read_bytes() == (
        undisturbed / "attention.safetensors"
    ).read_bytes()
    network, _ = load_scale_attention(tmp_path / "out" / "attention.safetensors")
    attention = attend_picture(network, slide.paint(500, 500, 90, 70), views=1)
    found = nuclei_from_attention(attention)
    entry = read_log(tmp_path / "out")[1]
    assert entry["report_images"] == 1
    assert entry["report_aji"] == pytest.approx(aji(truth.astype(np.int64), found))
    assert entry["report_dice"] == pytest.approx(dice(truth.astype(np.int64), found))
    tiled = attend_picture(network, slide.paint(500, 500, 90, 70), views=1, window=32)
    assert np.abs(tiled - attention).max() < 1e-4
    Image.fromarray(truth.astype(np.uint16)[:50]).save(labelled / "x_label.png")
    with pytest.raises(InputError, match="labels of its size"):
        score_labelled(network, [(labelled / "x.png", labelled / "x_label.png")])
    with pytest.raises(InputError, match="no pair"):
        train_scale_attention([folder], tmp_path / "other", TINY, report_on=tmp_path)


def test_steps_on_one_batch_tell_its_scales_apart() -> None:
    settings = dataclasses.replace(TINY, batch_size=6, learning_rate=1e-3)
    sampler = open_sampler([(paint_tissue(), 0.25)], SCALES_MPP, 32)
    with CropFeed(sampler, settings) as feed:
        batch = next(feed.batches(0, 1))
    hardware = Hardware(torch.device("cpu"), Precision("fp32"))
    with hardware.repeatable():
        trainer = ScaleTrainer.create(ScaleClassifier(seed=0), settings, hardware)
        losses = [trainer.step(batch)["scale"] for _ in range(8)]
        assert losses[-1] < 0.5 * losses[0]
        with torch.no_grad():
            next(trainer.classifier.parameters()).fill_(float("nan"))
        with pytest.raises(ModelError, match="diverged"):
            trainer.step(batch)


def test_steps_on_the_stain_s_answer_teach_each_network_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_steps, "_STAIN_RATE", 1e-2)
    settings = dataclasses.replace(STAINED, batch_size=6)
    sampler = open_sampler([(paint_tissue(), 0.25)], SCALES_MPP, 32)
    with CropFeed(sampler, settings) as feed:
        batch = next(feed.batches(0, 1))
    assert batch.target is not None
    hardware = Hardware(torch.device("cpu"), Precision("fp32"))
    with hardware.repeatable():
        trainer = ScaleTrainer.create(ScaleClassifier(seed=0), settings, hardware)
        steps = [trainer.step(batch) for _ in range(40)]
        alone = ScaleTrainer.create(ScaleClassifier(seed=1), settings, hardware)
        for _ in range(40):
            alone.step(batch)
        with torch.no_grad():
            logits = trainer.network(normalise_pixels(torch.from_numpy(batch.pixels))).logits[:, 0].numpy()
    assert set(steps[0]) == {"stain", "scale", "loss", "accuracy", "tau"}
    assert steps[-1]["stain"] < 0.25 * steps[0]["stain"]
    assert steps[-1]["stain"] == pytest.approx(float(np.square(logits - batch.target).mean()), rel=0.2)
    assert logits[batch.target > 0.9].mean() > 0.8
    assert abs(logits[batch.target < 0.1].mean()) < 0.2
    assert steps[-1]["scale"] < 0.5 * steps[0]["scale"]
    pairs = zip(alone.network.parameters(), trainer.network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)  # the classifier has no say
    nowhere = dataclasses.replace(batch, target=np.full_like(batch.target, np.nan))
    with pytest.raises(ModelError, match="diverged"):
        trainer.step(nowhere)


def test_the_classifier_begins_with_the_weights_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ScaleClassifier(seed=8)
    state = source.backbone.network.state_dict() | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "resnet34.pth")
    filled = create_classifier(str(tmp_path / "resnet34.pth"), seed=0)
    first = {name: value for name, value in source.backbone.state_dict().items() if "num_batches" not in name}
    assert all(torch.equal(filled.backbone.state_dict()[name], value) for name, value in first.items())
    assert torch.equal(filled.classifier.weight, ScaleClassifier(seed=0).classifier.weight)
    assert torch.equal(create_classifier("random:8", 0).classifier.weight, source.classifier.weight)
    assert torch.equal(create_classifier("random", 8).classifier.weight, source.classifier.weight)
    torch.save({"layers.0.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"other.pt"):
        create_classifier(str(tmp_path / "other.pt"), 0)

    def unreachable(card: object) -> Path:
        raise WeightsError("away")

    monkeypatch.setattr(scale_classifier, "fetch_weights", unreachable)
    with pytest.raises(WeightsError, match="--weights random"):
        create_classifier("hub", 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs"),
        ({"stain_epochs": -1}, "stain_epochs"),
        ({"epochs": 5, "stain_epochs": 5}, "stain_epochs must be below epochs, .* not 5 of 5"),
        ({"batch_size": 2}, "batch_size"),
        ({"crop_px": 161}, "even"),
        ({"views": 9}, "from 1 to 8"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"min_tissue": 1.0}, "below 1"),
        ({"stain_jitter": float("nan")}, "stain_jitter"),
        ({"normalisation": "vahadane"}, "none, reinhard, macenko"),
        ({"image_mpp": -1.0}, "image_mpp"),
        ({"classifier_weights": ""}, "classifier_weights"),
        ({"seed": True}, "seed"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        ScaleTrainingSettings(**options)


def test_the_defaults_are_the_paper_s() -> None:
    s = ScaleTrainingSettings()
    assert (s.epochs, s.batches, s.batch_size, s.crop_px, s.min_tissue) == (200, 100, 32, 160, 0.9)
    assert (s.learning_rate, s.beta1, s.weight_decay, s.stain_jitter) == (2e-4, 0.9, 1e-4, 0.03)
    assert s.stain_epochs == 0
    assert (s.network.sharpness, s.network.share, s.classifier_weights) == (20, 0.07, "hub")
    assert json.loads(json.dumps(s.recipe())) == s.recipe()
