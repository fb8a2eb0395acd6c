"""The cohort as the unit of work: read and checked, and selected from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from support_study import STUDY

import wsi_engine as we
from wsi_engine.cohorts.examination import examine_roster
from wsi_engine.cohorts.frames import to_frame
from wsi_engine.cohorts.roster import Roster
from wsi_engine.errors import InputError, SettingsError
from wsi_engine.studies.cohort import Cohort

pandas = pytest.importorskip("pandas")


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


@pytest.mark.parametrize("index", [["patient"], ["slide_id", "site"], ["age"]])
def test_an_index_with_a_name_is_a_column(study: Path, index: list[str]) -> None:
    """What is dropped with the index would be missed: without patients, every slide would be its own."""
    pytest.importorskip("pyarrow")
    frame = pandas.read_csv(study).set_index(index)
    frame.to_parquet(study.with_suffix(".parquet"))
    wanted = Cohort.read(study)
    for found in (Cohort.read(study.with_suffix(".parquet")), Cohort.read(frame, root=study.parent)):
        assert set(found.columns) == set(wanted.columns)
        assert [row.values for row in found] == [row.values for row in wanted]
        assert [row.patient for row in found] == ["p1", "p1", "p2", "p3"]
    both = pandas.read_csv(study).set_index("patient", drop=False)
    assert [row.patient for row in Cohort.read(both)] == ["p1", "p1", "p2", "p3"]


def test_cells_that_hold_lists(study: Path) -> None:
    pytest.importorskip("pyarrow")
    frame = pandas.read_csv(study)
    frame["markers"] = [[1, 2], [3], [], None]
    frame.to_parquet(study.with_suffix(".parquet"))
    cohort = Cohort.read(study.with_suffix(".parquet"))
    assert cohort.column("markers") == ("[1 2]", "[3]", "[]", None)


def test_a_cohort_by_url(study: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/study/cohort.csv", study.read_bytes())
    try:
        cohort = Cohort.read("memory://bucket/study/cohort.csv")
    finally:
        system.store.clear()
    assert [row.slide for row in cohort] == [f"memory://bucket/study/slides/{name}.png" for name in "abcd"]
    assert cohort.out == Path("wsi")
    assert Cohort.read(study.as_uri()).out == Cohort.read(study).out


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
    study.write_text(STUDY + "\n".join(rows) + "\n")
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
    study.write_text(STUDY + "slides/again.png,again,p1,x,0.25,train,low,50\nslides/d.png,e,,y,0.25,,,\n")
    report = Cohort.read(study).select(lambda row: row.slide_id != "d").check()
    assert report.ok
    assert [str(warning) for warning in report.warnings] == [
        "1 slide without a patient, each taken for one (e)",
        "1 slide there more than once, as slides of one patient (a, again): keep one of each",
    ]


def test_a_slide_without_a_scale_cannot_be_used(study: Path) -> None:
    study.write_text(STUDY.replace("0.25", "", 1))
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


def test_the_report_of_a_roster_alone() -> None:
    report = examine_roster(Roster.read([{"slide_id": "a"}, {"slide_id": "b"}]), open_slides=False)
    assert report.ok
    assert [str(warning) for warning in report.warnings][1] == "2 slides without a patient, each taken for one"
