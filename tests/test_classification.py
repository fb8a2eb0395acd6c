"""Classifying slides: from stores and from slides, what is written, what is kept, and how failures end."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from support_runs import make_origin, make_run

from wsi_engine import FeatureStore, extract
from wsi_engine.classification import slides as slides_module
from wsi_engine.classification import targets as targets_module
from wsi_engine.classification.ensemble import Ensemble, load_ensemble
from wsi_engine.classification.explanation import ExplainSettings
from wsi_engine.classification.outcomes import ClassifyReport, SlideClass
from wsi_engine.classification.slides import classify
from wsi_engine.classification.targets import ExtractOptions, FeatureSource, Target, extract_missing, find_targets
from wsi_engine.errors import InputError, ModelError, SettingsError, StoreError
from wsi_engine.inputs import SlideSource
from wsi_engine.runs import FeatureOrigin
from wsi_engine.slide_record import SlideRecord

BARE = ExplainSettings(attention=False, heatmaps=False, geojson=False, sheets=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tissue_image: np.ndarray) -> Path:
    """Three slides (one without tissue), features of them all, and a run that takes those features."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "slides").mkdir()
    for name, picture in (
        ("a", tissue_image),
        ("b", tissue_image[:, ::-1]),
        ("glass", np.full_like(tissue_image, 245)),
    ):
        Image.fromarray(picture).save(folder / "slides" / f"{name}.png")
    extract(folder / "slides", folder / "features", "texture", slide_mpp=0.5, tile_px=128)
    origin = FeatureOrigin.of(FeatureStore.open(folder / "features" / "a.zarr"))
    make_run(folder / "run", origin, "clam_mb")
    return folder


@pytest.fixture
def place(world: Path, tmp_path: Path) -> Path:
    """A copy of the world that a test may change."""
    return Path(shutil.copytree(world, tmp_path / "world"))


def run(place: Path, *names: str, out: str = "out", **options: object) -> ClassifyReport:
    paths = [place / name for name in names]
    options.setdefault("settings", ExplainSettings(top=2, long_side=400))
    return classify(paths, place / "run", place / out, device="cpu", precision="fp32", **options)  # type: ignore[arg-type]


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as stream:
        return {row["slide_id"]: row for row in csv.DictReader(stream)}


def test_slides_with_features(place: Path) -> None:
    report = run(place, "slides/a.png", "slides/b.png", features=place / "features", slide_mpp=0.5)
    model = load_ensemble(place / "run", "cpu", "fp32")
    assert [result.status for result in report.results] == ["done", "done"]
    assert (report.run, report.folds, report.classes) == ("run", 3, ("benign", "tumour"))
    rows = read_rows(place / "out" / "predictions.csv")
    for result in report.results:
        store = FeatureStore.open(place / "features" / f"{result.slide_id}.zarr")
        expected = model.predict(store.features())
        row = rows[result.slide_id]
        assert [float(row[f"prob_{name}"]) for name in report.classes] == expected.probabilities.tolist()
        assert (row["prediction"], float(row["entropy"])) == (expected.label, expected.entropy)
        assert float(row["disagreement"]) == expected.disagreement == result.disagreement
        assert (int(row["tiles"]), row["model"]) == (len(store.origins()), model.digest)
        assert np.array_equal(store.attention(), expected.attention)
        record = store.attention_record("run")
        assert record["columns"] == ["benign", "tumour"]
        assert (record["model_digest"], record["grid_digest"]) == (model.digest, store.grid().digest)
        heat = np.asarray(Image.open(place / "out" / "heatmaps" / f"{result.slide_id}.png"))
        assert heat.shape == (362, 520, 3)
        tiles = json.loads((place / "out" / "heatmaps" / f"{result.slide_id}.geojson").read_text())["features"]
        weights = [tile["properties"]["measurements"]["attention"] for tile in tiles]
        assert weights == expected.attention[:, expected.predicted].astype(float).tolist()
        assert (place / "out" / "tiles" / f"{result.slide_id}.png").exists()
        assert set(result.files) == {"heatmap", "geojson", "tiles"}
    assert not list((place / "features").glob(".*"))  # leases are given back


def test_stores_alone(place: Path) -> None:
    opened = FeatureStore.open(place / "features" / "b.zarr")
    report = classify([place / "features" / "a.zarr", opened], place / "run", place / "out", device="cpu")
    assert report.wall_seconds > 0
    assert [(result.slide_id, result.status) for result in report.results] == [("a", "done"), ("b", "done")]
    assert all("slide's file is not at hand" in result.message for result in report.results)
    assert not list((place / "out" / "tiles").iterdir())
    heat = np.asarray(Image.open(report.results[0].files["heatmap"]))
    assert heat.shape == (1262, 1600, 3)
    assert (heat[5, 5] == 255).all()  # glass, drawn white


def test_missing_features_are_extracted_as_the_model_takes_them(place: Path) -> None:
    shutil.rmtree(place / "features" / "b.zarr")
    before = (place / "features" / "a.zarr" / "features" / "texture" / "values" / "zarr.json").stat().st_mtime_ns
    report = run(place, "slides", features=place / "features", slide_mpp=0.5)
    assert [result.status for result in report.results] == ["done", "done", "failed"]
    made = FeatureStore.open(place / "features" / "b.zarr")
    assert FeatureOrigin.of(made).tile_px == 128
    after = (place / "features" / "a.zarr" / "features" / "texture" / "values" / "zarr.json").stat().st_mtime_ns
    assert before == after
    fresh = run(place, "slides/b.png", out="fresh", slide_mpp=0.5)
    assert fresh.results[0].store == str(place / "fresh" / "features" / "b.zarr")
    assert fresh.results[0].probabilities == report.results[1].probabilities


def test_other_weights_are_refused_before_encoding(place: Path) -> None:
    origin = make_origin(1024, encoder="resnet50", tile_px=128, stride_px=128)
    make_run(place / "run", origin)
    with pytest.raises(ModelError, match=r"weights of resnet50 \(random:0, digest .*not those .*--weights"):
        run(place, "slides/a.png", slide_mpp=0.5, weights="random:0")
    assert not (place / "out" / "features").exists()
    assert not (place / "out" / "predictions.csv").exists()


def test_one_bad_slide_does_not_stop_the_others(place: Path) -> None:
    features = place / "features"
    (place / "slides" / "broken.svs").write_bytes(b"no slide")
    for name in ("rotten", "nan", "other"):
        shutil.copytree(features / "a.zarr", features / f"{name}.zarr")
    chunk = next(
        path
        for path in (features / "rotten.zarr" / "features" / "texture" / "values" / "c").rglob("*")
        if path.is_file()
    )
    chunk.write_bytes(chunk.read_bytes()[:-100])
    values = zarr.open_group(features / "nan.zarr", mode="r+")["features/texture/values"]
    values[3, 5] = np.nan
    attrs = dict(zarr.open_group(features / "other.zarr", mode="r+")["features/texture/values"].attrs)
    attrs["encoder"]["weights_digest"] = "f" * 64
    zarr.open_group(features / "other.zarr", mode="r+")["features/texture/values"].update_attributes(attrs)
    names = ["slides", *(f"features/{name}.zarr" for name in ("rotten", "nan", "other", "nowhere"))]
    report = run(place, *names, features=features, slide_mpp=0.5)
    assert {result.slide_id: result.status for result in report.results} == {
        "a": "done", "b": "done", "broken": "failed", "glass": "failed", "rotten": "failed", "nan": "failed",
        "other": "failed", "nowhere": "failed",
    }  # fmt: skip
    messages = {result.slide_id: result.message for result in report.failed}
    assert "broken.svs" in messages["broken"]
    assert "glass has no tile" in messages["glass"]
    assert "damaged" in messages["rotten"]
    assert "nan" in messages["nan"]
    assert "finite" in messages["nan"]
    assert "other weights" in messages["other"]
    assert "no store" in messages["nowhere"]
    assert set(read_rows(place / "out" / "predictions.csv")) == {"a", "b"}
    assert json.dumps(report.to_json())


def test_features_of_another_slide_of_that_name_are_refused(place: Path) -> None:
    shutil.copy(place / "slides" / "b.png", place / "slides" / "a.png")
    report = run(place, "slides/a.png", features=place / "features", slide_mpp=0.5)
    assert "another slide" in report.failed[0].message
    assert not read_rows(place / "out" / "predictions.csv")


def test_features_of_another_encoder_are_named(place: Path) -> None:
    make_run(place / "run", make_origin(1024, encoder="uni"))
    report = run(place, "features/a.zarr")
    assert "texture" in report.failed[0].message
    assert "uni (1024)" in report.failed[0].message


def test_predictions_of_other_slides_stay_and_those_of_other_models_are_refused(place: Path) -> None:
    run(place, "features/a.zarr", settings=BARE)
    first = read_rows(place / "out" / "predictions.csv")["a"]
    run(place, "features/b.zarr", settings=BARE)
    run(place, "features/b.zarr", settings=BARE)
    rows = read_rows(place / "out" / "predictions.csv")
    assert list(rows) == ["a", "b"]
    assert rows["a"] == first
    origin = FeatureOrigin.of(FeatureStore.open(place / "features" / "a.zarr"))
    make_run(place / "run", origin, "abmil")
    before = (place / "out" / "predictions.csv").read_bytes()
    with pytest.raises(InputError, match="another model"):
        run(place, "features/a.zarr")
    assert (place / "out" / "predictions.csv").read_bytes() == before
    (place / "out" / "predictions.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read"):
        run(place, "features/a.zarr")


def test_a_run_trained_again_replaces_its_attention(place: Path) -> None:
    run(place, "features/a.zarr")
    store = FeatureStore.open(place / "features" / "a.zarr")
    first = store.attention("run")
    make_run(place / "run", FeatureOrigin.of(store), "abmil")
    run(place, "features/a.zarr", out="again")
    assert store.attention("run").shape == (len(first), 1)
    assert store.attention_record("run")["columns"] == ["attention"]
    make_run(place / "other run", FeatureOrigin.of(store))
    classify(
        place / "features" / "a.zarr", place / "other run", place / "third", settings=ExplainSettings(geojson=False)
    )
    assert FeatureStore.open(store.path).runs() == ("other_run", "run")
    with pytest.raises(StoreError, match="holds 2 runs"):
        FeatureStore.open(store.path).attention()
    assert not list((place / "third" / "heatmaps").glob("*.geojson"))


def test_attention_that_is_not_complete_is_not_handed_out(tmp_path: Path) -> None:
    record = SlideRecord("s", "f", (100, 100), (0.5, 0.5), "x", "v", "r")
    store = FeatureStore.create(tmp_path / "s.zarr", record)
    values = np.random.default_rng(0).random((70_000, 2)).astype(np.float32)
    store.write_attention("a/b", values, {"model_digest": "d"})
    assert FeatureStore.open(store.path).runs() == ("a_b",)
    assert np.array_equal(FeatureStore.open(store.path).attention("a/b"), values)
    path = tmp_path / "s.zarr" / "attention" / "a_b" / "values" / "zarr.json"
    text = path.read_text()
    path.write_text(text.replace('"complete": true', '"complete": false'))
    assert FeatureStore.open(store.path).runs() == ()
    with pytest.raises(StoreError, match=r"run a.b of .* is not there"):
        FeatureStore.open(store.path).attention("a/b")


def test_nothing_but_the_table(place: Path) -> None:
    report = run(place, "features/a.zarr", settings=BARE)
    assert report.results[0].status == "done"
    assert [path.name for path in (place / "out").iterdir()] == ["predictions.csv"]
    assert FeatureStore.open(place / "features" / "a.zarr").runs() == ()


def test_what_is_a_target(place: Path) -> None:
    features = place / "features"
    assert [target.slide_id for target in find_targets(features, features)] == ["a", "b", "glass"]
    slides = find_targets([place / "slides"], features)
    assert [(target.slide_id, target.store.name, target.slide is not None) for target in slides] == [
        ("a", "a.zarr", True), ("b", "b.zarr", True), ("glass", "glass.zarr", True),
    ]  # fmt: skip
    (place / "ids.csv").write_text("slide_id,patient\na,p\nb,p\n")
    assert [target.slide for target in find_targets(place / "ids.csv", features)] == [None, None]
    (place / "slides.csv").write_text("slide,slide_id,mpp\nslides/a.png,x,0.5\n")
    (target,) = find_targets(place / "slides.csv", features)
    assert (target.slide_id, target.store) == ("x", features / "x.zarr")
    assert target.slide is not None
    assert target.slide.mpp == 0.5
    for wrong, sentence in (
        ([], "no slide was named"),
        ([features / "a.zarr", place / "slides" / "a.png"], 'both called "a"'),
        ([place / "run"], "holds no slide"),
    ):
        with pytest.raises(InputError, match=sentence):
            find_targets(wrong, features)


def test_progress_is_told_in_order(place: Path) -> None:
    class Told:
        def __init__(self) -> None:
            self.said: list[str] = []

        def run_started(self, slides: int) -> None:
            self.said.append(str(slides))

        def slide_finished(self, result: SlideClass) -> None:
            self.said.append(result.slide_id)

    told = Told()
    run(place, "features", settings=BARE, progress=told)
    assert told.said == ["3", "a", "b", "glass"]


def test_many_slides_keep_their_order_and_their_own_attention(place: Path) -> None:
    names = [f"s{number:02}" for number in range(12)]
    for number, name in enumerate(names):
        shutil.copytree(place / "features" / ("ab"[number % 2] + ".zarr"), place / "many" / f"{name}.zarr")
    report = classify(
        place / "many", place / "run", place / "out", settings=replace(BARE, attention=True), device="cpu"
    )
    assert [result.slide_id for result in report.results] == names
    assert len({result.entropy for result in report.results}) == 2
    for number, result in enumerate(report.results):
        assert result.entropy == report.results[number % 2].entropy
        kept = FeatureStore.open(result.store).attention()
        assert np.array_equal(kept, FeatureStore.open(report.results[number % 2].store).attention())


def test_an_output_folder_that_cannot_be_made(place: Path) -> None:
    (place / "file").touch()
    with pytest.raises(InputError, match="cannot write to the output folder"):
        run(place, "features/a.zarr", out="file")
    with pytest.raises(SettingsError, match="--top"):
        ExplainSettings(top=0)
    with pytest.raises(SettingsError, match="long side"):
        ExplainSettings(long_side=3)


def test_a_slide_that_does_not_fit_in_memory_fails_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = Ensemble._predict

    def full(self: Ensemble, features: Any, digest: str, where: str) -> Any:
        if where == "a":
            raise torch.OutOfMemoryError("the device is full")
        return predict(self, features, digest, where)

    monkeypatch.setattr(Ensemble, "_predict", full)
    monkeypatch.setattr(slides_module, "explain_prediction", lambda *_: (_ for _ in ()).throw(MemoryError()))
    report = run(place, "features/a.zarr", "features/b.zarr", settings=BARE)
    messages = {result.slide_id: result.message for result in report.failed}
    tiles = len(FeatureStore.open(place / "features" / "a.zarr").origins())
    assert messages == {
        "a": f"a ({tiles} tiles) does not fit in the memory of cpu: end what else runs there, or use another device",
        "b": "b does not fit in memory: end what else runs there",
    }


def test_slides_that_are_left_out_of_later_rounds_end_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is announced is what ends, where a model takes features of several encoders and a slide fails."""
    ended: list[str] = []
    announced: list[int] = []

    class Told:
        run_started = announced.append
        slide_started = tiles_done = staticmethod(lambda *_: None)
        slide_finished = staticmethod(lambda result: ended.append(result.slide_id))

    def extract_some(slides: Any, features: Any, source: Any, options: Any, progress: Any, session: Any) -> Any:
        progress.run_started(len(slides))
        for slide in slides:
            progress.slide_finished(SlideClass(slide.slide_id, "failed" if slide.slide_id == "b" else "done"))
        return {slide.slide_id: "broken" for slide in slides if slide.slide_id == "b"}

    monkeypatch.setattr(targets_module, "_extract", extract_some)
    targets = [Target(name, tmp_path / f"{name}.zarr", SlideSource(f"{name}.png", name)) for name in "abc"]
    sources = [FeatureSource(make_origin(4, encoder=f"e{number}")) for number in range(3)]
    failures = extract_missing(targets, tmp_path, sources, ExtractOptions(), Told())
    assert failures == {"b": "broken"}
    assert announced == [9]
    assert sorted(ended) == sorted("abc" * 3)
