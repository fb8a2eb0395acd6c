"""``wsi nuclei``: what it writes and prints, what it skips, and how it ends."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from wsi_engine import FeatureStore, errors
from wsi_engine.cli import console
from wsi_engine.cli.demo_nuclei import choose_field, demo_nuclei
from wsi_engine.cli.nuclei import NucleiDisplay, nuclei
from wsi_engine.failures import read_failures
from wsi_engine.lease import hold_lease
from wsi_engine.nuclei import slides as module
from wsi_engine.nuclei.keeping import read_nuclei, stored_nuclei
from wsi_engine.nuclei.segmentation import segment_nuclei
from wsi_engine.nuclei.slides import NucleiOutputs, NucleiResult, segment_slides
from wsi_engine.synthetic import SlideSpec, SyntheticSlide, write_slide
from wsi_engine.tissue import TissueMask

ENDINGS = (".zarr", ".stain.geojson", ".stain.csv", ".stain.json", ".stain.png")


def wsi(*arguments: object) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(console.reporting(nuclei))
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of two levels and a picture of tissue."""
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "a.tif", SlideSpec(width=1400, height=1100, mpp=0.25, seed=4, coverage=0.7))
    picture = SyntheticSlide(SlideSpec(width=400, height=300, coverage=1, seed=5)).paint(0, 0, 400, 300)
    Image.fromarray(picture).save(folder / "b.png")
    return folder


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("out") / "nuclei"
    return out, wsi(folder, "-o", out, "--method", "stain", "--slide-mpp", 0.25, "--tile-px", 512)


def test_a_folder_of_slides_and_pictures(folder: Path, done: tuple[Path, Result]) -> None:
    out, result = done
    assert result.exit_code == 0, result.output
    assert "2 done by stain" in result.stdout
    assert "per mm²" in result.stdout
    assert "[1/2] a: " in result.stderr
    assert "tiles" in result.stderr
    names = {f"{name}{ending}" for name in "ab" for ending in ENDINGS} | {"b.stain.labels.tif"}
    assert {path.name for path in out.iterdir()} == names
    found = read_nuclei(FeatureStore.open(out / "a.zarr"))
    assert len(found) > 100
    features = json.loads((out / "a.stain.geojson").read_text())["features"]
    assert len(features) == len(found) == (out / "a.stain.csv").read_text().count("\n") - 1
    assert json.loads((out / "a.stain.json").read_text()) == json.loads(json.dumps(found.summary()))
    assert np.array_equal(segment_nuclei(folder / "a.tif", "stain").points, found.points)
    labels = tifffile.imread(out / "b.stain.labels.tif")
    assert labels.dtype == np.uint16
    assert np.array_equal(labels, read_nuclei(FeatureStore.open(out / "b.zarr")).labels())
    assert Image.open(out / "a.stain.png").size[0] > 800


def test_finished_slides_are_skipped_and_missing_files_written(
    folder: Path, done: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = done

    def fail(*_: Any) -> None:
        raise AssertionError("nuclei were looked for again")

    monkeypatch.setattr(module.PreparedSlide, "segment", fail)
    kept = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()}
    text = (out / "a.stain.geojson").read_bytes()
    (out / "a.stain.geojson").unlink()
    result = wsi(folder, "-o", out, "--method", "stain", "--slide-mpp", 0.25, "--json")
    report = json.loads(result.stdout)
    assert [slide["status"] for slide in report["slides"]] == ["already complete"] * 2
    assert report["slides"][0]["nuclei"] > 100
    assert (out / "a.stain.geojson").read_bytes() == text
    after = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()}
    assert {path for path in kept if after[path] != kept[path]} == {out / "a.stain.geojson"}


def test_other_settings_are_not_mixed(folder: Path, done: tuple[Path, Result]) -> None:
    out, _ = done
    result = wsi(folder / "a.tif", "-o", out, "--method", "stain", "--tissue", "otsu")
    assert result.exit_code == 1
    assert "found differently (tissue_digest changed)" in result.stdout.replace("\n", " ")


def test_a_bad_slide_does_not_stop_the_others(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes((folder / "b.png").read_bytes()[:200])
    dark = tmp_path / "dark.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 30, (200, 200, 3)).astype(np.uint8)).save(dark)
    out = tmp_path / "out"
    arguments = ("-o", out, "--method", "stain", "--slide-mpp", 0.25, "--no-geojson", "--no-overlay", "--table", "none")
    result = wsi(bad, dark, folder / "b.png", *arguments)
    assert result.exit_code == 1
    assert "2 failed, 1 done" in result.stdout
    assert "--allow-dark" in result.stdout
    assert sorted(path.name for path in out.glob("[!.]*")) == ["b.stain.json", "b.stain.labels.tif", "b.zarr"]
    assert [(one.slide_id, one.job) for one in read_failures(out)] == [
        ("bad", "nuclei/stain"),
        ("dark", "nuclei/stain"),
    ]


def test_a_missing_scale_is_said(folder: Path, tmp_path: Path) -> None:
    result = wsi(folder / "b.png", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "--slide-mpp" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "nothing"), "there is no method"),
        (("--tile-px", 3), "--tile-px must be within"),
        (("--method", "stain", "--model", "x.safetensors"), "no weights"),
    ],
)
def test_wrong_usage_ends_with_2(folder: Path, tmp_path: Path, arguments: tuple[object, ...], words: str) -> None:
    result = wsi(folder / "b.png", "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_no_tissue_is_complete_with_a_warning(tmp_path: Path) -> None:
    write_slide(tmp_path / "empty.tif", SlideSpec(width=5000, height=4100, mpp=0.25, coverage=0))
    out = tmp_path / "out"
    for status in ("no tissue", "already complete"):
        result = wsi(tmp_path / "empty.tif", "-o", out, "--method", "stain", "--json")
        assert result.exit_code == 0
        (slide,) = json.loads(result.stdout)["slides"]
        assert (slide["status"], slide["nuclei"], slide["per_mm2"]) == (status, 0, None)
        assert "--tissue none" in slide["message"]
    assert stored_nuclei(FeatureStore.open(out / "empty.zarr")) == ("stain",)


def test_a_slide_that_another_process_writes_is_left_alone(folder: Path, tmp_path: Path) -> None:
    with hold_lease(tmp_path / ".b.lease"):
        report = segment_slides(folder / "b.png", tmp_path, "stain", slide_mpp=0.25)
    assert [result.status for result in report.results] == ["busy"]
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing_that_looks_complete(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    segment_slides(folder / "b.png", out, "stain", slide_mpp=0.25)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    # a kill between two columns: what was complete is gone, and so are the files that belong to it
    with monkeypatch.context() as patch:
        patch.setattr(module, "check_nuclei", lambda *_: False)
        patch.setattr("wsi_engine.nuclei.keeping._columns", lambda: _stop_after(3))
        with pytest.raises(KeyboardInterrupt):
            segment_slides(folder / "b.png", out, "stain", slide_mpp=0.25)
    assert stored_nuclei(FeatureStore.open(out / "b.zarr")) == ()
    assert [path.name for path in out.iterdir()] == ["b.zarr"]
    report = segment_slides(folder / "b.png", out, "stain", slide_mpp=0.25)
    assert report.results[0].status == "done"
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def _stop_after(columns: int) -> Any:
    yield from ("offsets", "points", "centroid", "area_um2")[:columns]
    raise KeyboardInterrupt


def test_settings_are_checked() -> None:
    with pytest.raises(errors.SettingsError, match="--table must be"):
        NucleiOutputs(table="xlsx")  # type: ignore[arg-type]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_shows_slides_and_rates(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_engine.cli.progress.PLAIN_SECONDS", 0.0)
    text = io.StringIO()
    with NucleiDisplay(Console(file=text, force_terminal=terminal, width=120)) as display:
        display.run_started(2)
        display.slide_started("a[1]", 4, 0)
        for _ in range(4):
            display.tiles_done(1)
        display.slide_finished(NucleiResult("a[1]", "a[1].tif", "done", nuclei=12, seconds=2.0))
        display.slide_finished(NucleiResult("b", "b.tif", "failed", "it is [bold] broken"))
    shown = text.getvalue()
    assert "12 nuclei in 2.0 s" in shown
    assert "it is [bold] broken" in shown
    assert "tiles/s" in shown
    assert terminal or "[1/2] a[1]: 4/4 tiles" in shown


def test_the_demo_says_when_another_process_is_at_the_slide(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nuclei").mkdir()
    with hold_lease(tmp_path / "nuclei" / ".b.lease"), pytest.raises(typer.Exit) as caught:
        demo_nuclei(str(folder / "b.png"), tmp_path, 0.25, None)
    assert caught.value.exit_code == console.EXIT_FAILED
    assert "error: " in capsys.readouterr().err


def test_the_demo_looks_where_most_tissue_is() -> None:
    mask = np.zeros((200, 210), bool)
    mask[120:190, 30:90] = True
    mask[5:25, 150:200] = True
    field = choose_field(TissueMask(mask, 8.0))  # 80 pixels of the raster along a side
    assert field[120:190, 30:90].all()
    assert field.sum() == 70 * 60
    assert np.array_equal(choose_field(TissueMask(mask[:30, 140:], 8.0)), mask[:30, 140:])
