"""``wsi train nuclei``: what it prints and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from wsi_engine.cli import console
from wsi_engine.cli.train_nuclei import train_nuclei
from wsi_engine.models import scale_attention
from wsi_engine.models.backbones import build_backbone
from wsi_engine.models.scale_files import load_scale_attention
from wsi_engine.synthetic import SlideSpec, SyntheticSlide

SHORT = ("--epochs", 1, "--batches", 2, "--batch-size", 3, "--crop-px", 32, "--weights", "random", "--device", "cpu")


@pytest.fixture(autouse=True)
def light_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ResNet of 10 layers for the classifier of scales."""
    monkeypatch.setattr(scale_attention, "build_backbone", lambda name: build_backbone(name.replace("34", "10t")))


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command("nuclei")(console.reporting(train_nuclei))
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "tissue.png"
    slide = SyntheticSlide(SlideSpec(width=1200, height=1000, mpp=0.25, coverage=1, seed=4))
    Image.fromarray(slide.paint(500, 400, 200, 200)).save(path)
    return path


def test_a_training_from_the_command_line(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(picture, "-o", out, *SHORT)
    assert first.exit_code == 0, first.output
    assert "trained on 1 images" in first.stdout
    assert "epoch 1: loss" in first.stderr
    assert (out / "attention.safetensors").exists()
    again = run(picture, "-o", out, *SHORT, "--json")
    report = json.loads(again.stdout)
    assert report["already_complete"]
    assert report["model"] == str(out / "attention.safetensors")
    assert "complete already" in run(picture, "-o", out, *SHORT).stdout
    other = run(picture, "-o", out, *SHORT, "--seed", 3)
    assert other.exit_code == 1
    assert "belongs to another training" in other.stderr


def test_stain_epochs_are_named_where_they_were(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(picture, "-o", out, *SHORT, "--epochs", 2, "--stain-epochs", 1, "--share", 0.2)
    assert result.exit_code == 0, result.output
    first, second = (line for line in result.stderr.splitlines() if line.startswith("epoch "))
    assert ", stain " in first
    assert "stain" not in second
    network, _ = load_scale_attention(out / "attention.safetensors")
    assert network.settings.share == 0.2


def test_bad_input_is_answered_in_one_sentence(picture: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    Image.fromarray(np.full((50, 60, 3), 200, np.uint8)).save(small)
    for arguments, code, words in (
        ((small, "-o", tmp_path / "a", *SHORT), 2, "needs 128 × 128: give larger images or a smaller --crop-px"),
        ((tmp_path / "none.png", "-o", tmp_path / "a", *SHORT), 1, "none.png"),
        ((picture, "-o", tmp_path / "a", *SHORT, "--crop-px", 33), 2, "even"),
        ((picture, "-o", tmp_path / "a", *SHORT, "--stain-epochs", 1), 2, "stain_epochs must be below epochs"),
        ((picture, "-o", tmp_path / "a", *SHORT, "--share", 1), 2, "share must be above 0 and below 1"),
        ((picture, "-o", tmp_path / "a", *SHORT, "--weights", picture), 1, ".safetensors"),
        ((picture, "-o", tmp_path / "a", *SHORT, "--report-on", tmp_path), 2, "no pair"),
    ):
        result = run(*arguments)
        assert result.exit_code == code, result.output
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "a" / "attention.safetensors").exists()


def test_help_names_the_options() -> None:
    text = run("--help").stdout
    for option in ("--image-mpp", "--stain-epochs", "--weights", "--report-on", "--normalisation"):
        assert option in text
