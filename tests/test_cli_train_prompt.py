"""``wsi train prompt``, and what other commands make of its runs: what they print, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from support_prompt import TILE, write_slides
from support_training import kept_bytes
from typer.testing import CliRunner, Result

from wsi_engine import FeatureStore
from wsi_engine.cli.app import app
from wsi_engine.cli.train_prompt import PARAMETERS
from wsi_engine.runs import RunFolder
from wsi_engine.training.prompt_settings import PromptSettings, Tuning

BACKBONE = ("--encoder", "timm:test_vit", "--weights", "random:0")
QUICK = (
    "--head", "mean", "--tile-px", TILE, "--tissue", "none", "--epochs", 2, "--folds", 2, "--validation", 0.25,
    "--learning-rate", 0.01, "--bags-per-step", 2, "--device", "cpu",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slides(tmp_path_factory.mktemp("cohort"), slides=12)


@pytest.fixture(scope="module")
def whole(cohort: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run that nothing disturbed, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, wsi(*command(cohort, out))


def wsi(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def command(cohort: Path, out: Path, *extra: object) -> tuple[object, ...]:
    return ("train", "prompt", cohort / "cohort.csv", "--label", "grade", "-o", out, *BACKBONE, *QUICK, *extra)


def test_defaults_are_those_of_the_engine() -> None:
    given = {one.name: one.default for one in PARAMETERS}
    assert len(given) == len(PARAMETERS)
    for settings in (PromptSettings, Tuning):
        for field in fields(settings):
            assert given[field.name] == field.default, field.name


def test_what_is_printed(whole: tuple[Path, Result]) -> None:
    out, result = whole
    assert result.exit_code == 0, result.output
    for text in (
        "held-out AUROC", "prompt: 64 parameters of the encoder and 130 of the head learned", "s an epoch",
        f"next: wsi evaluate {out}", f"--model {out}", "high, low",
    ):  # fmt: skip
        assert text in result.stdout
    assert "[fold 2/2] done after 2 epochs" in result.stderr
    assert sorted(path.name for path in (out / "fold-1").iterdir()) == ["head.safetensors", "prompts.safetensors"]


def test_frozen_features_are_extracted_in_sight(cohort: Path, tmp_path: Path) -> None:
    result = wsi(*command(cohort, tmp_path / "run", "--mode", "conventional", "--epochs", 1))
    assert result.exit_code == 0, result.output
    assert "[12/12] s11: done, 9 tiles" in result.stderr
    assert "[fold 2/2] done after 1 epochs" in result.stderr
    assert "conventional: 0 parameters of the encoder and 130 of the head learned" in result.stdout


def test_a_finished_run_says_so_as_json(cohort: Path, whole: tuple[Path, Result]) -> None:
    out, _ = whole
    before = kept_bytes(out)
    again = wsi(*command(cohort, out, "--json"))
    assert again.exit_code == 0
    assert "already complete" in again.stderr
    report = json.loads(again.stdout)
    assert report["classes"] == ["high", "low"]
    assert (report["tuning"]["mode"], report["tuning"]["encoder_parameters"]) == ("prompt", 64)
    assert kept_bytes(out) == before


def test_the_run_is_evaluated_and_classifies(cohort: Path, whole: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = whole
    assert wsi("evaluate", out, "-o", tmp_path / "evaluation").exit_code == 0
    slide = cohort / "slides" / "s01.png"
    options = ("--model", out, "--weights", "random:0", "--slide-mpp", 0.5, "--device", "cpu", "--no-heatmaps")
    result = wsi("classify", slide, *options, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["folds"] == 2
    # each fold has prompts of its own, and tiles are chosen as in training: all nine
    encoders = FeatureStore.open(tmp_path / "out" / "features" / "s01.zarr").encoders()
    assert len(encoders) == 2
    assert all(name.startswith("timm_test_vit+") for name in encoders)
    assert json.loads(result.stdout)["slides"][0]["tiles"] == 9
    wrong = wsi("classify", slide, *options, "--weights", "random:1", "-o", tmp_path / "other")
    assert wrong.exit_code == 1
    assert "holds prompts for the backbone with weights" in wrong.stderr
    assert wrong.stderr.count("error:") == 1


def test_prompts_extract(cohort: Path, whole: tuple[Path, Result], tmp_path: Path) -> None:
    file = whole[0] / "fold-0" / "prompts.safetensors"
    slide = cohort / "slides" / "s02.png"
    options = ("--slide-mpp", 0.5, "--tile-px", TILE, "--tissue", "none", "--device", "cpu", "-o", tmp_path / "f")
    assert wsi("extract", slide, *options, *BACKBONE).exit_code == 0
    result = wsi("extract", slide, *options, "--weights", "random:0", "--prompts", file)
    assert result.exit_code == 0, result.output
    assert len(FeatureStore.open(tmp_path / "f" / "s02.zarr").encoders()) == 2
    for extra, sentence in (
        (("--weights", "random:7", "--prompts", file), "load the weights that they were trained with"),
        (("--encoder", "vit_tiny_patch16_224", "--prompts", file), "was made for the encoder timm:test_vit, not for"),
        (("--prompts", slide), "s02.png"),
    ):
        wrong = wsi("extract", slide, *options, *extra)
        assert wrong.exit_code == 1
        assert sentence in wrong.stderr
        assert wrong.stderr.count("error:") == 1


@pytest.mark.parametrize(
    ("extra", "code", "sentence"),
    [
        (("--encoder", "timm:test_resnet"), 1, "prompts need a VisionTransformer of timm, and ResNet is none"),
        (("--encoder", "vit_small"), 1, "vit_small_patch16_224"),
        (("--head", "clam"), 1, "no head named 'clam'"),
        (("--prompts", 0), 2, "prompts must be a whole number of at least 1, not 0"),
        (("--tune-blocks", 1), 2, "tune_blocks is for the mode finetune, and the mode is prompt"),
        (("--mode", "finetune", "--tune-blocks", 99), 2, "tune_blocks is 99 and the encoder has"),
        (("--label", "stage"), 2, 'no column "stage"'),
    ],
)
def test_wrong_use_is_one_sentence(
    cohort: Path, tmp_path: Path, extra: tuple[object, ...], code: int, sentence: str
) -> None:
    result = wsi(*command(cohort, tmp_path / "run", *extra))
    assert result.exit_code == code, result.output
    assert sentence in result.stderr
    assert result.stderr.count("error:") == 1
    assert not RunFolder(tmp_path / "run").record_file.exists()


def test_a_cohort_without_slides_is_told(cohort: Path, tmp_path: Path) -> None:
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,patient,grade\na,p1,high\nb,p2,low\n")
    result = wsi("train", "prompt", table, "--label", "grade", "-o", tmp_path / "run", *BACKBONE, *QUICK)
    assert result.exit_code == 2
    assert 'no column "slide"' in result.stderr
    lines = (cohort / "cohort.csv").read_text().splitlines()
    table.write_text("\n".join([lines[0], *(line.replace("slides/", f"{cohort}/slides/") for line in lines[1:])]))
    broken = table.read_text().replace(f"{cohort}/slides/s03.png", f"{tmp_path}/gone.png")
    table.write_text(broken)
    result = wsi("train", "prompt", table, "--label", "grade", "-o", tmp_path / "run", *BACKBONE, *QUICK)
    assert result.exit_code == 2
    assert "s03" in result.stderr
    assert "gone.png" in result.stderr


def test_a_killed_command_is_gone_on_with(cohort: Path, whole: tuple[Path, Result], tmp_path: Path) -> None:
    """SIGKILL in the middle of the second fold; then the same command ends in the bytes of an undisturbed one."""
    out = tmp_path / "run"
    code = f"""
import os, signal, torch
torch.set_num_threads(1)
import wsi_engine.training.fold as fold
from wsi_engine.training.loop import FoldLoop
from wsi_engine.cli.app import app
fold.SAVE_SECONDS = 0.0
epoch = FoldLoop.epoch
def killed(self):
    if (self.number, self.standing.epochs) == (1, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return epoch(self)
FoldLoop.epoch = killed
app({[str(one) for one in command(cohort, out)]!r})
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / "fold-1" / "state.pt").exists()
    assert not RunFolder(out).read_record().complete
    again = wsi(*command(cohort, out))
    assert again.exit_code == 0, again.output
    assert "[fold 1/2] already complete" in again.stderr
    assert kept_bytes(out) == kept_bytes(whole[0])
    lines = [json.loads(line) for line in RunFolder(out).log_file.read_text().splitlines()]
    assert [(line["fold"], line["epoch"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
