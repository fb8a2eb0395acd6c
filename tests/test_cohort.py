"""The cohort as the unit of work: read and checked, selected from, extracted, and told in a table."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support_runs import make_run

import wsi_engine as we
from wsi_engine.cohorts.examination import examine_roster
from wsi_engine.cohorts.frames import to_frame
from wsi_engine.cohorts.roster import Roster
from wsi_engine.errors import InputError, SettingsError
from wsi_engine.failures import read_failures, record_outcome
from wsi_engine.lease import hold_lease
from wsi_engine.nuclei.keeping import read_nuclei
from wsi_engine.nuclei.slides import NucleiOutputs
from wsi_engine.runs import FeatureOrigin
from wsi_engine.studies import options
from wsi_engine.studies.cohort import Cohort
from wsi_engine.synthetic import SlideSpec, SyntheticSlide

pandas = pytest.importorskip("pandas")

STORE_ONLY = NucleiOutputs(geojson=False, table=None, overlay=False, labels=False)
NO_PICTURES = we.ExplainSettings(heatmaps=False, geojson=False, sheets=False)

CSV = """slide,slide_id,patient,site,mpp,split,grade,age
slides/a.png,a,p1,x,0.25,train,low,50
slides/b.png,b,p1,x,0.25,train,low,50
slides/c.png,c,p2,y,0.25,test,high,
slides/d.png,d,p3,y,0.25,val,high,71
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small pictures of tissue, of different content."""
    folder = tmp_path_factory.mktemp("drawn")
    for seed, name in enumerate("abcd"):
        picture = SyntheticSlide(SlideSpec(300, 260, coverage=1, seed=seed)).paint(0, 0, 300, 260)
        Image.fromarray(picture).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def study(drawn: Path, tmp_path: Path) -> Path:
    """``cohort.csv`` beside the pictures."""
    shutil.copytree(drawn, tmp_path / "slides")
    (tmp_path / "cohort.csv").write_text(CSV)
    return tmp_path / "cohort.csv"


def problems(report: Any) -> list[str]:
    return [problem.what for problem in report.problems]


def test_a_cohort_from_a_csv(study: Path) -> None:
    cohort = we.Cohort.read(study)
    assert cohort.slide_ids == ("a", "b", "c", "d")
    assert cohort.out == study.parent / "wsi"
    assert cohort.column("grade") == ("low", "low", "high", "high")
    assert repr(cohort) == f"<Cohort {study}: 4 slides of 3 patients, results in {cohort.out}>"
    assert Cohort.from_csv(study, out="elsewhere").out == Path("elsewhere")
    report = cohort.check()
    assert report.ok
    assert report.opened == 4
    assert str(report) == f"{study}: 4 slides of 3 patients, nothing wrong was found"
    assert not cohort.out.exists()  # looking leaves nothing


def test_the_same_cohort_from_parquet_rows_and_a_frame(study: Path) -> None:
    pytest.importorskip("pyarrow")
    frame = pandas.read_csv(study)
    frame.to_parquet(study.with_suffix(".parquet"))
    wanted = Cohort.read(study)
    for found in (
        Cohort.read(study.with_suffix(".parquet")),
        Cohort.read(frame, root=study.parent),
        Cohort.read(frame.to_dict("records"), root=study.parent),
    ):
        assert [(row.slide_id, row.slide, row.values) for row in found] == [
            (row.slide_id, row.slide, row.values) for row in wanted
        ]
        assert found.out == wanted.out
    assert Cohort.read(study.with_suffix(".parquet")).roster.rows[1].where.endswith("cohort.parquet, row 2")


def test_files_that_are_no_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"bad.parquet is not a Parquet file"):
        Cohort.read(tmp_path / "bad.parquet")
    with pytest.raises(InputError, match=r"cannot read .*none.parquet: No such file"):
        Cohort.read(tmp_path / "none.parquet")


def test_without_pandas_one_sentence_says_what_to_install(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    cohort = Cohort.read(study)  # a CSV needs none
    assert cohort.check().ok
    assert cohort.select({"site": "x"}).slide_ids == ("a", "b")
    for needing in (cohort.table, cohort.frame, lambda: cohort.select("age > 60"), lambda: Cohort.read("x.parquet")):
        with pytest.raises(SettingsError, match=r'pandas, which is not installed: pip install "wsi-engine\[cohort\]"'):
            needing()


def test_everything_wrong_is_told_at_once(study: Path) -> None:
    folder = study.parent / "slides"
    shutil.copy(folder / "a.png", folder / "copy.png")
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:3000])
    rows = [
        "slides/none.png,gone,p4,x,0.25,train,low,1",  # missing
        "slides/bad.png,bad,p5,x,0.25,train,low,1",  # unreadable
        "slides/b.png,A,p1,x,0.25,train,low,50",  # named twice
        "slides/b.png,b2,p6,x,0.25,train,low,1",  # a file named twice
        "slides/copy.png,copy,p7,x,0.25,train,low,1",  # a copy
        "slides/c.png,../c2,p2,y,0.25,test,high,1",  # leaves the folder
        ",,p2,y,0.25,test,high,1",  # names nothing
        "slides/d.png,d2,p3,z,0.25,train,high,1",  # a patient in two parts and at two sites
        "slides/d.png,d3,p3,z,wide,dev,high,1",
        ",bare,p8,z,,,high,1",
    ]
    study.write_text(CSV + "\n".join(rows) + "\n")
    cohort = Cohort.read(study)
    report = cohort.check()
    assert problems(report) == [
        "2 rows cannot be used",
        "1 slide named more than once",
        "2 files named as several slides",
        "1 slide with an impossible scale",
        'column "split" has unknown values',
        '1 patient in several parts of column "split"',
        "1 file not there",
        "1 slide cannot be read",
        "1 slide there more than once, as slides of several patients",
    ]
    assert [warning.what for warning in report.warnings] == [
        "1 slide of which only the id is known", "1 patient at several sites",
    ]  # fmt: skip
    text = str(report)
    for part in (
        "cohort.csv, line 12: names no slide", "'../c2'", "gone: ", "none.png", "p3: train, val", "p3: y, z", "a, copy",
        "line 8", "b2", 'line 14: mpp must be micrometres per pixel within 0.05–50.0, not "wide"', "bad: ", "dev",
    ):  # fmt: skip
        assert part in text, part
    assert text.startswith(f"{study}: 12 slides of 8 patients, 9 problems and 2 warnings found:")
    assert json.loads(json.dumps(report.to_json()))["ok"] is False
    # what starts a long job says the same, but for what needs opening
    with pytest.raises(InputError) as caught:
        cohort.extract("texture")
    assert str(caught.value) == str(cohort.check(open_slides=False))
    assert "1 file not there" in str(caught.value)
    assert "cannot be read" not in str(caught.value)
    assert not cohort.out.exists()


def test_slides_of_one_patient_may_be_there_twice_and_rows_without_a_patient_are_told(study: Path) -> None:
    shutil.copy(study.parent / "slides" / "a.png", study.parent / "slides" / "again.png")
    study.write_text(CSV + "slides/again.png,again,p1,x,0.25,train,low,50\nslides/d.png,e,,y,0.25,,,\n")
    report = Cohort.read(study).select(lambda row: row.slide_id != "d").check()
    assert report.ok
    assert [str(warning) for warning in report.warnings] == [
        "1 slide without a patient, each taken for one (e)",
        "1 slide there more than once, as slides of one patient (a, again): keep one of each",
    ]


def test_a_slide_without_a_scale_cannot_be_used(study: Path) -> None:
    study.write_text(CSV.replace("0.25", "", 1))
    report = Cohort.read(study).check()
    assert problems(report) == ["1 slide cannot be read"]
    assert "does not say how many micrometres" in str(report)


def test_selecting(study: Path) -> None:
    cohort = Cohort.read(study)
    assert cohort.select("site == 'y' and age > 60").slide_ids == ("d",)
    assert cohort.select("patient in ['p1', 'p2']").slide_ids == ("a", "b", "c")
    assert cohort.select({"site": "y", "split": ["test", "train"]}).slide_ids == ("c",)
    assert cohort.select({"age": [50, None]}).slide_ids == ("a", "b", "c")
    assert cohort.select(lambda row: row.value("age") is None).slide_ids == ("c",)
    assert cohort.select({"slide_id": {"b"}}).select("grade == 'low'").out == cohort.out
    for bad in ("colour == 'red'", "age +", "age", "__import__('os').system('true')"):
        with pytest.raises(InputError, match=r"cannot select by .* write an expression of columns"):
            cohort.select(bad)
    with pytest.raises(InputError, match='has no column "colour"'):
        cohort.select({"colour": "red"})
    with pytest.raises(InputError, match=r"no slide of .* is selected by"):
        cohort.select({"site": "nowhere"})


def test_columns_of_numbers_become_numbers(study: Path) -> None:
    rows = [
        {"slide_id": "1", "age": "50", "code": "007", "cells": "1e3", "site": "2"},
        {"slide_id": "2", "age": "", "code": "8", "cells": "2", "site": "3"},
    ]
    frame = to_frame(Roster.read(rows))
    assert list(frame.columns) == ["slide_id", "patient", "age", "code", "cells", "site"]
    assert frame["age"].tolist()[0] == 50.0
    assert np.isnan(frame["age"].tolist()[1])
    assert frame["code"].tolist() == ["007", "8"]
    assert frame["cells"].tolist() == [1000.0, 2.0]
    assert frame["site"].tolist() == ["2", "3"]
    assert Cohort.read(study).frame()["slide_id"].tolist() == list("abcd")


@pytest.fixture(scope="module")
def done(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """A cohort with features and nuclei of all slides but the last, which is not there."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(drawn, folder / "slides")
    (folder / "slides" / "d.png").unlink()
    (folder / "cohort.csv").write_text(CSV)
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
    shutil.copytree(drawn, tmp_path / "slides")
    (tmp_path / "cohort.csv").write_text(CSV)
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
    slide_id, job = "s" * 200, "features/" + "e" * 400
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


def test_the_report_of_a_roster_alone() -> None:
    report = examine_roster(Roster.read([{"slide_id": "a"}, {"slide_id": "b"}]), open_slides=False)
    assert report.ok
    assert [str(warning) for warning in report.warnings][1] == "2 slides without a patient, each taken for one"
