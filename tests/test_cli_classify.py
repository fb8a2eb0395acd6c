"""``wsi classify``: what it prints, where, and how it ends."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import typer
from rich.console import Console
from support_runs import make_run
from typer.testing import CliRunner, Result

from wsi_engine import FeatureStore, extract
from wsi_engine.classification.outcomes import SlideClass
from wsi_engine.cli import console
from wsi_engine.cli.classify import ClassifyDisplay, classify
from wsi_engine.cli.progress import RunDisplay
from wsi_engine.runs import FeatureOrigin


def wsi(*arguments: object) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(console.reporting(classify))
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def run(picture: Path, tmp_path: Path) -> Path:
    """A run that takes texture features of 128 px tiles, and the features of ``picture``."""
    extract(picture, tmp_path / "features", "texture", slide_mpp=0.5, tile_px=128)
    origin = FeatureOrigin.of(FeatureStore.open(tmp_path / "features" / "picture.zarr"))
    return make_run(tmp_path / "run [1]", origin)


def test_a_slide(picture: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = wsi(picture, "--model", run, "-o", out, "--slide-mpp", 0.5, "--device", "cpu", "--top", 3)
    assert result.exit_code == 0, result.output
    assert "disagreement" in result.stdout
    assert "1 classified, 0 failed by 3 folds of run [1]" in result.stdout.replace("\n", " ")
    assert "picture: done" in result.stderr  # extracted
    assert "[1/1] picture: " in result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["features", "heatmaps", "predictions.csv", "tiles"]
    assert FeatureStore.open(out / "features" / "picture.zarr").runs() == ("run__1_",)


def test_a_store_as_json_without_pictures(run: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "features" / "picture.zarr", tmp_path / "out"
    result = wsi(store, "--model", run, "-o", out, "--no-heatmaps", "--no-tiles", "--no-attention", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["slides"][0]["status"] == "done"
    assert sum(report["slides"][0]["probabilities"].values()) == pytest.approx(1)
    assert (report["run"], report["folds"], report["classes"]) == ("run [1]", 3, ["benign", "tumour"])
    assert [path.name for path in out.iterdir()] == ["predictions.csv"]
    assert FeatureStore.open(store).runs() == ()


def test_one_failure_ends_in_1_after_the_others(run: Path, tmp_path: Path) -> None:
    features = tmp_path / "features"
    result = wsi(features / "picture.zarr", features / "none.zarr", "--model", run, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "1 classified, 1 failed" in result.stdout.replace("\n", " ")
    assert "there is no store at" in result.stdout
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (("{slides}", "--model", "{empty}", "-o", "{out}"), 1, "not a training run"),
        (("{empty}", "--model", "{run}", "-o", "{out}"), 2, "holds no slide"),
        (("{slides}", "--model", "{run}", "-o", "{out}", "--top", "0"), 2, "--top"),
        (("{slides}", "--model", "{run}", "-o", "{out}", "--device", "tpu9"), 1, "tpu9"),
        (("{slides}", "--model", "{run}", "-o", "{out}", "--precision", "fp8"), 2, "fp8"),
        (("{slides}", "--model", "{run}", "-o", "{out}", "--weights", "random:0", "--slide-mpp", "0.5"), 1, "weights"),
        (("{slides}", "-o", "{out}"), 2, "--model"),
        (("{slides}", "--model", "{run}"), 2, "--out"),
    ],
)
def test_wrong_usage_is_one_sentence(
    picture: Path, run: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, match: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"slides": picture.parent, "run": run, "empty": tmp_path / "empty", "out": tmp_path / "out"}
    result = wsi(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == code, result.output
    assert match in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not (tmp_path / "out" / "predictions.csv").exists()


def test_a_terminal_gets_a_bar_and_the_failures() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    with RunDisplay(screen) as before, ClassifyDisplay(screen, before) as display:
        display.run_started(2)
        display.slide_finished(SlideClass("good", "done", "", "tumour", {"tumour": 0.9}, 0.1, 0.0, 5))
        display.slide_finished(SlideClass("bad", "failed", "it is [torn]"))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "classifying" in text
    assert "bad" in text
    assert "it is [torn]" in text
    assert "good" not in text
