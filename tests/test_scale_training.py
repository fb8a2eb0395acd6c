"""Training of scale attention: its crops, colours and batches, a kill and its resumption, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.color import rgb2lab

from wsi_engine.errors import InputError, ModelError, ScaleError, SettingsError, WeightsError
from wsi_engine.kernels import estimate_stains, nuclei_from_attention
from wsi_engine.kernels.stains import HE_RESIDUAL, complete_stains
from wsi_engine.metrics.nuclei import aji, dice
from wsi_engine.models import scale_attention
from wsi_engine.models.backbones import build_backbone
from wsi_engine.models.scale_attention import SCALES_MPP, ScaleAttentionSettings, ScaleClassifier
from wsi_engine.models.scale_files import load_scale_attention
from wsi_engine.nuclei import scale_classifier
from wsi_engine.nuclei.samples import CropSource, is_annotation, list_pictures, open_picture, open_sampler
from wsi_engine.nuclei.scale_batches import CropBatch, CropFeed
from wsi_engine.nuclei.scale_classifier import create_classifier
from wsi_engine.nuclei.scale_scores import attend_picture, score_labelled
from wsi_engine.nuclei.scale_settings import ScaleTrainingSettings
from wsi_engine.nuclei.scale_stains import jitter_stains, match_look, mean_look, measure_look, remix_stains
from wsi_engine.nuclei.scale_training import train_scale_attention
from wsi_engine.slide import open_slide
from wsi_engine.synthetic import MACENKO, RUIFROK_JOHNSTON, SlideSpec, Stains, SyntheticSlide

TINY = ScaleTrainingSettings(
    epochs=2, batches=2, batch_size=4, crop_px=32, classifier_weights="random", sheet_crops=1, checkpoint_batches=1,
    network=ScaleAttentionSettings(width=4, dilations=(1, 2)), device="cpu", precision="fp32", workers=2,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def light_classifier() -> Iterator[None]:
    """A ResNet of 10 layers for the classifier of scales: a quarter of the size, of the same 512 numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_attention, "build_backbone", lambda name: build_backbone(name.replace("34", "10t")))
        yield


def paint_tissue(side: int = 320, seed: int = 4, stains: Stains = RUIFROK_JOHNSTON) -> NDArray[np.uint8]:
    spec = SlideSpec(width=1600, height=1200, mpp=0.25, coverage=1, seed=seed, stains=stains)
    return SyntheticSlide(spec).paint(600, 400, side, side)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of tissue, one with an annotation that cannot be read."""
    path = tmp_path_factory.mktemp("tissue")
    for name, seed in (("a", 4), ("b", 5)):
        Image.fromarray(paint_tissue(seed=seed)).save(path / f"{name}.png")
    (path / "a_label.png").write_bytes(b"never read")
    return path


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


@pytest.mark.parametrize("batches", [1, 3])
def test_a_killed_training_ends_in_the_same_bytes(
    folder: Path, undisturbed: Path, tmp_path: Path, batches: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train_scale_attention([folder], out, TINY, Interrupting(batches + 1))
    assert (out / "state.pt").exists()
    again = Interrupting(100)
    threads = dataclasses.replace(TINY, workers=1, checkpoint_batches=7)
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


def test_a_folder_of_another_training_is_refused(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="seed was 0 and is 1"):
        train_scale_attention([folder], undisturbed, dataclasses.replace(TINY, seed=1))
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
    from wsi_engine.encoders.precision import Precision
    from wsi_engine.nuclei.scale_steps import ScaleTrainer
    from wsi_engine.training.hardware import Hardware

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


def test_batches_hold_as_many_crops_at_each_scale() -> None:
    sampler = open_sampler([(paint_tissue(), 0.25)], SCALES_MPP, 32)
    with CropFeed(sampler, dataclasses.replace(TINY, batch_size=7)) as feed:
        batches = list(feed.batches(0, 3))
    counts = np.array([np.bincount(batch.scales, minlength=3) for batch in batches])
    assert counts.max() - counts.min() == 1
    assert counts.sum(axis=0).tolist() == [7, 7, 7]
    assert all(batch.pixels.shape == (7, 32, 32, 3) and batch.pixels.dtype == np.uint8 for batch in batches)
    assert all(1 <= one <= 7 for batch in batches for one in batch.symmetries)  # never the identity
    assert not np.array_equal(batches[0].pixels, batches[1].pixels)


@pytest.mark.parametrize("normalisation", ["none", "reinhard", "macenko"])
def test_a_batch_is_a_function_of_seed_and_number(normalisation: Any) -> None:
    def make(workers: int, start: int, seed: int = 0) -> CropBatch:
        sampler = open_sampler([(paint_tissue(), 0.25), (paint_tissue(seed=5), 0.25)], SCALES_MPP, 32)
        settings = dataclasses.replace(TINY, workers=workers, normalisation=normalisation, seed=seed)
        with CropFeed(sampler, settings) as feed:
            return list(feed.batches(start, 5))[-1]

    one, other = make(1, 0), make(3, 4)
    assert np.array_equal(one.pixels, other.pixels)
    assert np.array_equal(one.scales, other.scales)
    assert one.symmetries == other.symmetries
    assert not np.array_equal(make(1, 4, seed=1).pixels, one.pixels)


def test_crops_are_what_the_slide_holds_at_that_scale() -> None:
    """A picture of exactly one crop at the coarsest scale leaves no choice of place."""
    pixels = paint_tissue(128)
    with open_slide(pixels, mpp=0.25) as slide:
        crops = CropSource(slide, SCALES_MPP, 32, 0.5)
        coarse = crops.read(1.0, np.random.default_rng(0))
        assert np.abs(coarse - pixels.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))).max() <= 0.5
        fine = crops.read(0.25, np.random.default_rng(0))
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (32, 32, 3))[:, :, 0]
        assert (windows == fine).all(axis=(2, 3, 4)).any()


def test_crops_lie_on_tissue(tissue_image: NDArray[np.uint8]) -> None:
    """The picture is a disk of radius 450 px at 0.5 mpp; 90 % of every crop must lie within."""
    y, x = np.mgrid[:1200, :1600]
    position = np.stack([x // 8, y // 8, np.full_like(x, 200)], axis=-1).astype(np.uint8)  # tells where a crop is from
    inside = (x - 700) ** 2 + (y - 600) ** 2 < 450**2
    with open_slide(tissue_image, mpp=0.5) as slide, open_slide(position, mpp=0.5) as places:
        crops = CropSource(slide, (0.5, 1.0), 64, 0.9)
        crops.slide = places
        for mpp, side in ((0.5, 64), (1.0, 128)):
            corners = []
            for seed in range(60):
                crop = crops.read(mpp, np.random.default_rng(seed))
                left, top = (8 * int(v) for v in crop[0, 0, :2])
                corners.append((left, top))
                assert inside[top : top + side, left : left + side].mean() > 0.8  # the place is told to 8 px
            assert np.ptp(np.array(corners), axis=0).min() > 400  # all over the disk


def test_annotations_are_left_out(tmp_path: Path, folder: Path) -> None:
    assert [Path(str(one)).name for one, _ in list_pictures([folder])] == ["a.png", "b.png"]
    assert is_annotation(str(folder / "a_label.png"))
    (tmp_path / "lone_label.png").write_bytes(b"")
    assert not is_annotation(str(tmp_path / "lone_label.png"))  # nothing that it could be the annotation of
    with pytest.raises(InputError, match="no image or slide"):
        list_pictures([])


def test_pictures_that_cannot_serve_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    glass = (244 + rng.integers(-2, 3, (200, 200, 1)) + np.zeros((1, 1, 3), int)).astype(np.uint8)
    tissue = paint_tissue()
    for pixels, mpp, words in (
        (tissue[:100], 0.25, r"has 320 × 100 px .* needs 128 × 128: give larger images"),
        (glass, 0.25, "holds no tissue"),
        (tissue, 0.5, "0.5 µm per pixel and crops at 0.25 are needed"),
    ):
        with pytest.raises(InputError, match=words):
            open_sampler([(pixels, mpp)], SCALES_MPP, 32)
    half = np.concatenate([tissue[:, :100], np.full((320, 220, 3), 245, np.uint8)], axis=1)
    with pytest.raises(InputError, match="no place where 90%"):
        open_sampler([(half, 0.25)], SCALES_MPP, 32)
    logging.getLogger("wsi_engine").propagate = True  # a command of another test may have turned it off
    with caplog.at_level(logging.WARNING, "wsi_engine"):
        sampler = open_sampler([(glass, 0.25), (tissue, 0.25)], SCALES_MPP, 32)
    assert len(sampler.sources) == 1
    assert "Left out: <array> holds no tissue" in caplog.text


def test_the_scale_must_be_known(folder: Path, shared_data: Path) -> None:
    assert open_picture(folder / "a.png", None, 0.25).mpp == (0.25, 0.25)
    assert open_picture(folder / "a.png", 0.2, 0.25).mpp == (0.2, 0.2)
    with pytest.raises(ScaleError, match="--image-mpp"):
        open_picture(folder / "a.png", None, None)
    with pytest.raises(ScaleError, match="--slide-mpp"):  # the default is for plain pictures alone
        open_picture(shared_data / "slides" / "TCGA-CR-7395-jpeg2000-no-mpp.svs", None, 0.25)


def test_jitter_by_one_changes_nothing_and_more_stain_is_darker() -> None:
    pixels = paint_tissue(64)
    assert np.abs(jitter_stains(pixels, np.ones(3)).astype(int) - pixels).max() <= 1
    more = jitter_stains(pixels, np.array([1.2, 1, 1]))
    plain = 255 * 10 ** -(
        (-np.log10(np.maximum(pixels, 1) / 255) @ np.linalg.inv(HE_RESIDUAL) * [1.2, 1, 1]) @ HE_RESIDUAL
    )
    assert np.abs(more - plain.clip(0, 255)).max() < 0.6


def test_reinhard_gives_the_reference_s_mean_and_spread() -> None:
    one, other = paint_tissue(), paint_tissue(seed=5, stains=MACENKO)
    look, wanted = measure_look(one, "reinhard"), measure_look(other, "reinhard")
    lab = rgb2lab(other).reshape(-1, 3)
    assert np.allclose(wanted.rows, [lab.mean(axis=0), lab.std(axis=0)], atol=1e-2)
    got = rgb2lab(match_look(one, look, wanted)).reshape(-1, 3)
    assert np.abs(got.mean(axis=0) - wanted.rows[0]).max() < 1.5
    assert np.abs(rgb2lab(one).reshape(-1, 3).mean(axis=0) - wanted.rows[0]).max() > 3
    assert np.abs(match_look(one, look, look).astype(int) - one).max() <= 2


def test_macenko_turns_one_stain_into_the_other() -> None:
    one, other = paint_tissue(), paint_tissue(seed=5, stains=MACENKO)
    look, wanted = measure_look(one, "macenko"), measure_look(other, "macenko")
    assert np.allclose(estimate_stains(other)[:2], wanted.rows[:2])
    again = measure_look(match_look(one, look, wanted), "macenko")
    for row, goal, before in zip(again.rows[:2], wanted.rows[:2], look.rows[:2], strict=True):
        assert np.dot(row, goal) > 0.999 > np.dot(before, goal)
    assert np.allclose(again.rows[2], wanted.rows[2], rtol=0.05)
    with pytest.raises(InputError, match="stains of white"):
        measure_look(np.full((20, 20, 3), 255, np.uint8), "macenko", "white.png")


def test_the_mean_look_is_that_of_its_parts() -> None:
    looks = [measure_look(paint_tissue(seed=seed), kind) for kind in ("macenko",) for seed in (4, 5)]
    mean = mean_look(looks)
    for k in range(3):
        assert np.allclose(mean.rows[k], np.mean([look.rows[k] for look in looks], axis=0))
    amounts = np.array([[[0.5, 0.2, 0.0]]], np.float32)
    vectors = complete_stains((0.65, 0.7, 0.29), (0.07, 0.99, 0.11))
    assert np.abs(remix_stains(amounts, vectors) - 255 * 10 ** -(amounts @ vectors)).max() <= 0.5


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
    assert (s.network.sharpness, s.network.share, s.classifier_weights) == (20, 0.07, "hub")
    assert json.loads(json.dumps(s.recipe())) == s.recipe()
