"""The cohort as the unit of work: extracted, classified, and told in a table."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_runs import make_run

import wsi_engine as we
from wsi_engine.errors import InputError, SettingsError
from wsi_engine.failures import read_failures, record_outcome
from wsi_engine.lease import hold_lease
from wsi_engine.nuclei.keeping import read_nuclei
from wsi_engine.nuclei.slides import NucleiOutputs
from wsi_engine.runs import FeatureOrigin
from wsi_engine.studies import options
from wsi_engine.studies.cohort import Cohort

pandas = pytest.importorskip("pandas")

STORE_ONLY = NucleiOutputs(geojson=False, table=None, overlay=False, labels=False)
NO_PICTURES = we.ExplainSettings(heatmaps=False, geojson=False, sheets=False)


@pytest.fixture(scope="module")
def done(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """A cohort with features and nuclei of all slides but the last, which is not there."""
    folder = Path(shutil.copytree(drawn, tmp_path_factory.mktemp("done"), dirs_exist_ok=True))
    (folder / "slides" / "d.png").unlink()
    cohort = Cohort.read(folder / "cohort.csv")
    report = cohort.extract("texture", strict=False, tile_px=64, tissue=None, workers=1)
    assert [result.status for result in report.results] == ["done", "done", "done", "failed"]
    found = cohort.nuclei("stain", strict=False, outputs=STORE_ONLY)
    assert [result.status for result in found.results] == ["done", "done", "done", "failed"]
    return cohort


@pytest.fixture(scope="module")
def classified(done: Cohort) -> Cohort:
    """Classified by a run whose splits say that it was trained on slide b, and that held out slide a."""
    origin = FeatureOrigin.of(we.FeatureStore.open(done.out / "a.zarr"))
    run = make_run(done.out / "runs" / "made", origin, "abmil", ("high", "low"), (2.0, 0.5))
    (run / "splits.csv").write_text("slide_id,patient,label,fold-0\na,p1,low,test\nb,p1,low,train\n")
    (run / "predictions.csv").write_text(
        "fold,slide_id,patient,label,prediction,prob_high,prob_low\n0,a,p1,low,low,0.2,0.8\n1,a,p1,low,low,0.4,0.6\n"
    )
    report = done.classify("made", strict=False, settings=NO_PICTURES)
    assert [result.status for result in report.results] == ["done", "done", "done", "failed"]
    return done


def test_the_status_of_a_cohort(classified: Cohort) -> None:
    status = classified.status()
    assert status.jobs == ("features/texture", "attention/made", "nuclei/stain")
    assert status.counts()["nuclei/stain"] == {"done": 3, "running": 0, "failed": 1, "pending": 0}
    assert {one.slide_id for one in status.having("failed")} == {"d"}
    assert len(status.having("failed")) == 3
    assert "d.png" in status.having("failed")[0].detail
    assert not status.complete
    assert str(status).splitlines()[1] == "- features/texture: 3 done, 1 failed"
    assert Cohort.read(classified.roster, out=classified.out).select("split == 'train'").status().complete
    asked = classified.status(["nuclei/student"]).counts()["nuclei/student"]
    assert asked["pending"] == 4


def test_nothing_was_begun(study: Path) -> None:
    cohort = Cohort.read(study)
    pandas.testing.assert_frame_equal(cohort.table(), cohort.frame())
    assert cohort.table("patient")["slides"].tolist() == [2, 1, 1]
    assert str(cohort.status()) == f"{cohort.out}: 4 slides\n- nothing was begun yet"
    assert cohort.status(["features/uni"]).counts() == {
        "features/uni": {"done": 0, "running": 0, "failed": 0, "pending": 4}
    }


def test_the_table_of_slides(classified: Cohort) -> None:
    table = classified.table()
    assert table["slide_id"].tolist() == list("abcd")
    assert table["grade"].tolist() == ["low", "low", "high", "high"]
    assert table["tiles"].tolist()[:3] == [
        len(we.FeatureStore.open(classified.out / f"{name}.zarr").origins()) for name in "abc"
    ]
    for place, name in enumerate("abc"):
        nuclei = read_nuclei(we.FeatureStore.open(classified.out / f"{name}.zarr"))
        row = table.iloc[place]
        area = 300 * 260 * 0.25**2 / 1e6
        assert row["nuclei_count"] == len(nuclei) > 5
        assert row["nuclei_per_mm2"] == pytest.approx(len(nuclei) / area)
        assert row["nuclei_tissue_mm2"] == pytest.approx(area)
        assert row["nuclei_area_um2_mean"] == pytest.approx(np.mean(nuclei.area.astype(np.float64)))
        assert row["nuclei_area_um2_p95"] == pytest.approx(np.percentile(nuclei.area.astype(np.float64), 95))
        for measure in ("eccentricity", "solidity", "haematoxylin_mean"):
            values = nuclei.measurements[measure].astype(np.float64)
            assert row[f"nuclei_{measure}_sd"] == pytest.approx(values.std())
    assert table.iloc[3].drop(labels=list(classified.frame().columns)).isna().all()  # the slide that is not there


def test_the_most_honest_prediction_is_taken(classified: Cohort) -> None:
    table = classified.table().set_index("slide_id")
    assert table["prediction_from"].tolist()[:3] == ["held out", "seen in training", "unseen"]
    # of slide a: the mean of both folds after their temperatures, 2 and 0.5
    first = np.sqrt([0.2, 0.8]) / np.sqrt([0.2, 0.8]).sum()
    second = np.square([0.4, 0.6]) / np.square([0.4, 0.6]).sum()
    wanted = (first + second) / 2
    assert table.loc["a", ["prob_high", "prob_low"]].astype(float).tolist() == pytest.approx(wanted.tolist(), abs=1e-6)
    entropy = -(wanted * np.log2(wanted)).sum()
    assert table.loc["a", "entropy"] == pytest.approx(entropy)
    assert table.loc["a", "prediction"] == "low"
    written = pandas.read_csv(classified.out / "predictions" / "made" / "predictions.csv").set_index("slide_id")
    for name in ("b", "c"):
        assert table.loc[name, "prob_low"] == pytest.approx(written.loc[name, "prob_low"])
        assert table.loc[name, "entropy"] == pytest.approx(written.loc[name, "entropy"])
        assert table.loc[name, "disagreement"] == pytest.approx(written.loc[name, "disagreement"])


def test_the_table_of_patients(classified: Cohort) -> None:
    slides, patients = classified.table(), classified.table("patient")
    assert patients["patient"].tolist() == ["p1", "p2", "p3"]
    assert patients["slides"].tolist() == [2, 1, 1]
    assert patients["grade"].tolist() == ["low", "high", "high"]
    assert patients.loc[0, "nuclei_count"] == slides["nuclei_count"][:2].sum()
    assert patients.loc[0, "tiles"] == slides["tiles"][:2].sum()
    assert patients.loc[0, "nuclei_area_um2_p95"] == pytest.approx(slides["nuclei_area_um2_p95"][:2].mean())
    density = slides["nuclei_count"][:2].sum() / slides["nuclei_tissue_mm2"][:2].sum()
    assert patients.loc[0, "nuclei_per_mm2"] == pytest.approx(density)
    shares = slides[["prob_high", "prob_low"]][:2].mean()
    assert patients.loc[0, "prob_low"] == pytest.approx(shares["prob_low"])
    assert patients.loc[0, "prediction"] == shares.idxmax().removeprefix("prob_")
    assert patients.loc[0, "prediction_from"] is None  # one held out, one seen: no single answer
    assert patients.loc[2, "prediction"] is None
    assert np.isnan(patients.loc[2, "nuclei_count"])
    with pytest.raises(SettingsError, match='by "slide" or by "patient", not by \'site\''):
        classified.table("site")  # type: ignore[arg-type]


def test_what_a_table_cannot_tell_apart_must_be_named(classified: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "wsi"
    shutil.copytree(classified.out, out)
    shutil.copytree(out / "runs" / "made", out / "runs" / "other")
    cohort = Cohort.read(classified.roster, out=out)
    with pytest.raises(InputError, match=r"holds several runs \(made, other\): name one"):
        cohort.table()
    with pytest.raises(InputError, match="several runs"):
        cohort.classify(strict=False)
    assert cohort.table(run="made")["prediction_from"].tolist()[0] == "held out"
    other = cohort.table(run=out / "runs" / "other")["prediction_from"]  # it held slide a out, and classified none
    assert other[0] == "held out"
    assert other[1:].isna().all()
    with pytest.raises(InputError, match=r"results of the method student \(there: stain\)"):
        cohort.table(run="made", nuclei="student")
    shutil.copytree(out / "a.zarr" / "nuclei" / "stain", out / "a.zarr" / "nuclei" / "other")
    with pytest.raises(InputError, match=r"several methods of nuclei \(other, stain\): name one"):
        cohort.table(run="made")
    assert cohort.table(run="made", nuclei="stain")["nuclei_count"].notna().sum() == 3


def test_a_column_named_like_a_result_is_refused(classified: Cohort) -> None:
    rows = [dict(row.values) | {"tiles": "9"} for row in classified.roster]
    with pytest.raises(InputError, match=r"columns that are named like results \(tiles\): rename them there"):
        Cohort.read(rows, out=classified.out).table()


def test_a_column_that_counts_slides_is_refused_by_patient(classified: Cohort) -> None:
    rows = [dict(row.values) | {"slides": "9"} for row in classified.roster]
    cohort = Cohort.read(rows, out=classified.out)
    assert cohort.table()["slides"].tolist() == [9, 9, 9, 9]
    with pytest.raises(InputError, match=r"columns that are named like results \(slides\): rename them there"):
        cohort.table("patient")


@pytest.mark.parametrize("change", ["a head", "a line", "not complete"])
def test_predictions_of_another_model_are_not_taken_for_the_runs(
    classified: Cohort, tmp_path: Path, change: str
) -> None:
    shutil.copytree(classified.out, tmp_path / "wsi")
    cohort = Cohort.read(classified.roster, out=tmp_path / "wsi")
    run, table = tmp_path / "wsi/runs/made", tmp_path / "wsi/predictions/made/predictions.csv"
    if change == "a head":  # the run was made again
        shutil.copy(run / "fold-0/head.safetensors", run / "fold-1/head.safetensors")
    elif change == "a line":
        lines = table.read_text().splitlines()
        table.write_text("\n".join([*lines[:-1], lines[-1][:-64] + "0" * 64]) + "\n")
    else:
        record = run / "run.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"complete": False}))
    with pytest.raises(InputError, match=r"predictions\.csv is of another model than the run .*: delete it and class"):
        cohort.table()
    table.unlink()
    assert cohort.table()["prediction_from"].tolist()[0] == "held out"
    if change == "a head":
        cohort.classify(strict=False, settings=NO_PICTURES)
        assert cohort.table()["prediction_from"].tolist()[:3] == ["held out", "seen in training", "unseen"]


def test_an_old_store_of_nuclei_is_summarised_from_its_nuclei(classified: Cohort, tmp_path: Path) -> None:
    wanted = classified.table()
    shutil.copytree(classified.out, tmp_path / "wsi")
    for node in (tmp_path / "wsi").glob("*.zarr/nuclei/stain/zarr.json"):
        value = json.loads(node.read_text())
        del value["attributes"]["summary"]
        node.write_text(json.dumps(value))
    found = Cohort.read(classified.roster, out=tmp_path / "wsi").table()
    pandas.testing.assert_frame_equal(found, wanted)


def test_a_cohort_of_ids_alone_is_classified_from_its_stores(classified: Cohort, tmp_path: Path) -> None:
    shutil.copytree(classified.out, tmp_path / "wsi")
    cohort = Cohort.read([{"slide_id": "c"}, {"slide_id": "a"}], out=tmp_path / "wsi")
    with pytest.raises(InputError, match=r"does not say where 2 slides are \(c, a\): fill in the column"):
        cohort.extract("texture")
    report = cohort.classify(predictions=tmp_path / "again", settings=NO_PICTURES)
    assert [result.slide_id for result in report.results] == ["c", "a"]
    assert not report.failed
    with pytest.raises(InputError, match="holds no training run: train first"):
        cohort.classify(out=tmp_path)


def test_training_puts_the_run_beside_the_stores(classified: Cohort, tmp_path: Path) -> None:
    shutil.copytree(classified.out, tmp_path / "wsi")
    cohort = Cohort.read(classified.roster, out=tmp_path / "wsi").select("slide_id != 'd'")
    rows = [dict(row.values) | {"split": part} for row, part in zip(cohort, ("train", "train", "val"), strict=True)]
    rows[1] |= {"grade": "high", "patient": "p9"}
    cohort = Cohort.read(rows, root=tmp_path, out=tmp_path / "wsi")
    settings = we.TrainSettings(epochs=1, least_epochs=0, patience=1)
    report = cohort.train("grade", "mean", splits=we.SplitSettings("column"), settings=settings)
    assert report.path == tmp_path / "wsi" / "runs" / "grade-mean"
    assert (report.path / "run.json").is_file()
    assert cohort.train("grade", "mean", run="b", splits=we.SplitSettings("column"), settings=settings).path == (
        tmp_path / "wsi" / "runs" / "b"
    )


def test_a_failure_is_written_down_until_the_slide_is_done(done: Cohort, drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(done.out, tmp_path / "wsi")
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    for attention in (tmp_path / "wsi").glob("*.zarr/attention"):  # of another test
        shutil.rmtree(attention)
    record_outcome(tmp_path / "wsi", "d", "attention/made", "done", "")
    assert [(one.slide_id, one.job) for one in read_failures(tmp_path / "wsi")] == [
        ("d", "features/texture"), ("d", "nuclei/stain"),
    ]  # fmt: skip
    cohort = Cohort.read(tmp_path / "cohort.csv")
    with hold_lease(cohort.out / ".d.lease", "nuclei/stain"):
        states = {one.job: one for one in cohort.status().states if one.slide_id == "d"}
        assert states["nuclei/stain"].state == "running"
        assert states["features/texture"].state == "failed"
        # a busy slide is left alone, and what is known of it stays
        report = cohort.extract("texture", tile_px=64, tissue=None, workers=1)
        assert report.results[3].status == "busy"
        assert len(read_failures(cohort.out)) == 2
    cohort.extract("texture", tile_px=64, tissue=None, workers=1)
    cohort.nuclei("stain", outputs=STORE_ONLY)
    assert not read_failures(cohort.out)
    assert cohort.status().complete
    assert not [path for path in cohort.out.iterdir() if path.name.startswith(".")]


def test_a_name_of_a_failure_is_never_too_long_and_damage_is_passed_over(tmp_path: Path) -> None:
    slide_id, job = "s" * 150, "features/" + "e" * 400
    record_outcome(tmp_path, slide_id, job, "failed", "because")
    record_outcome(tmp_path, slide_id, "nuclei/x", "failed", "of this")
    (tmp_path / ".x.failed.json").write_text("{")
    (tmp_path / ".y.failed.json").write_text('{"slide_id": 3, "job": "", "why": "", "when": "", "host": ""}')
    assert [(one.job, one.why) for one in read_failures(tmp_path)] == [(job, "because"), ("nuclei/x", "of this")]
    record_outcome(tmp_path, slide_id, job, "already complete", "")
    record_outcome(tmp_path, slide_id, "nuclei/x", "busy", "")
    assert [one.job for one in read_failures(tmp_path)] == ["nuclei/x"]
    record_outcome(tmp_path / "none", slide_id, job, "failed", "nowhere to write it")  # and no error
    assert read_failures(tmp_path / "none") == []


FUNCTIONS: list[tuple[Any, Callable[..., Any], Callable[..., Any]]] = [
    (options.ExtractOptions, we.extract, Cohort.extract),
    (options.TrainOptions, we.train_head, Cohort.train),
    (options.ClassifyOptions, we.classify, Cohort.classify),
    (options.NucleiOptions, we.segment_slides, Cohort.nuclei),
]


@pytest.mark.parametrize(("typed", "function", "method"), FUNCTIONS)
def test_what_is_handed_on_is_what_the_function_takes(
    typed: Any, function: Callable[..., Any], method: Callable[..., Any]
) -> None:
    ours = {"self", "slides", "cohort", "out", "features", *inspect.signature(method).parameters} - {"options"}
    takes = inspect.signature(function).parameters
    assert set(typed.__annotations__) == set(takes) - ours | ({"options"} if "options" in takes else set())
    for name, annotation in typed.__annotations__.items():
        assert takes[name].annotation == annotation.__forward_arg__, name
