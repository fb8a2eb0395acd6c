"""Rows of a cohort, from a CSV, from mappings, from a data frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_engine.cohorts.roster import Roster
from wsi_engine.errors import InputError

CSV = """slide_id,slide,patient,label,site
a,slides/one.svs,ann,tumour,x
b,/far/two.svs,ann, normal ,
,https://host/three.svs?v=1,,tumour,y
d,,bob,,y
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "cohort.csv"
    path.write_text(CSV)
    return path


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cohort.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(path: Path) -> None:
    roster = Roster.read(path)
    assert roster.source == str(path)
    assert roster.columns == ("slide_id", "slide", "patient", "label", "site")
    assert len(roster) == 4
    assert [row.slide_id for row in roster] == ["a", "b", "three", "d"]
    assert [row.slide for row in roster] == [
        str(path.parent / "slides/one.svs"), "/far/two.svs", "https://host/three.svs?v=1", None,
    ]  # fmt: skip
    assert [row.patient for row in roster] == ["ann", "ann", "three", "bob"]
    assert roster.column("label") == ("tumour", "normal", "tumour", None)
    assert roster.rows[1].value("site") is None
    assert roster.rows[1].values["site"] == ""
    assert roster.rows[2].where == f"{path}, line 4"


def test_a_roster_stays_as_it_is(path: Path) -> None:
    roster = Roster.read(str(path))
    assert Roster.read(roster) is roster


def test_select(path: Path) -> None:
    some = Roster.read(path).select([3, 0])
    assert [row.slide_id for row in some] == ["d", "a"]
    assert some.columns == Roster.read(path).columns
    assert some.source == str(path)


def test_a_missing_column_is_named(path: Path) -> None:
    with pytest.raises(InputError, match=r'has no column "grade" \(its columns: slide_id, slide, patient, label, site'):
        Roster.read(path).column("grade")


def test_what_spreadsheets_leave(tmp_path: Path) -> None:
    path = tmp_path / "cohort.csv"
    path.write_bytes('\ufeffslide_id, label ,,\r\nä,"x, y",,\r\n\r\n,,,\r\nb,"two\nlines"\r\nc,z,,\r\n'.encode())
    roster = Roster.read(path)
    assert roster.columns == ("slide_id", "label")
    assert [row.slide_id for row in roster] == ["ä", "b", "c"]
    assert roster.column("label") == ("x, y", "two\nlines", "z")
    assert [row.where.rpartition(" ")[2] for row in roster] == ["2", "6", "7"]  # the last line of each
    assert dict(roster.rows[2].values) == {"slide_id": "c", "label": "z"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no slide"),
        ("slide_id,label\n", "lists no slide"),
        ("slide_id,label\n,\n", "lists no slide"),
        ("name,label\na,1\n", r'has no column "slide" or "slide_id" \(its columns: name, label\)'),
        ("slide_id,label\na,1\n,2\n", r'cohort.csv, line 3: names no slide; fill in "slide" or "slide_id"'),
        ("slide_id,label\n../a,1\n", r"'../a' \(.*cohort.csv, line 2\) cannot name a store"),
        ("slide_id,label,label\na,1,2\n", "has more than one column label"),
        ("slide_id,label\na,1\nb,Smith, J.\n", "line 3: has 3 cells and the header 2; put texts with commas in quotes"),
    ],
)
def test_a_csv_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Roster.read(write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none.csv: No such file"):
        Roster.read(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        Roster.read(tmp_path)
    (tmp_path / "latin.csv").write_bytes("slide_id,label\na,größer\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.csv is not a CSV file in UTF-8"):
        Roster.read(tmp_path / "latin.csv")
    (tmp_path / "huge.csv").write_text("slide_id\n" + "x" * 200_000)
    with pytest.raises(InputError, match=r"huge.csv is not a CSV file in UTF-8: field larger"):
        Roster.read(tmp_path / "huge.csv")


def test_mappings() -> None:
    rows = ({"slide_id": f"s{at}", "grade": at} | ({"site": "x"} if at else {}) for at in range(2))
    roster = Roster.read(rows)
    assert roster.columns == ("slide_id", "grade", "site")
    assert roster.column("grade") == ("0", "1")
    assert roster.column("site") == (None, "x")
    assert roster.rows[1].where == "the cohort, row 2"
    assert Roster.read([{"slide": "x/y.svs"}]).rows[0].slide == "x/y.svs"
    with pytest.raises(InputError, match="the cohort lists no slide"):
        Roster.read([])
    with pytest.raises(InputError, match="row 1 of the cohort is a str, not columns and their values"):
        Roster.read(["a.svs"])  # type: ignore[list-item]


class NotAvailable:
    """As pandas.NA: comparing gives no answer."""

    def __ne__(self, other: object) -> NotAvailable:  # type: ignore[override]
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None), (float("nan"), None), (np.float32("nan"), None), (NotAvailable(), None), ("  ", None),
        (1.0, "1"), (np.float64(2), "2"), (np.float32(3), "3"), (1.5, "1.5"), (np.int64(4), "4"), (True, "True"),
        (" a ", "a"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_values_become_text(value: object, text: str | None) -> None:
    assert Roster.read([{"slide_id": "s", "label": value}]).column("label") == (text,)


def test_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"slide_id": ["a", "b"], "grade": [1, None], "seen": pandas.array([True, None])})
    roster = Roster.read(frame)
    assert roster.column("grade") == ("1", None)
    assert roster.column("seen") == ("True", None)


class Frame:
    """What a roster asks of a data frame."""

    def to_dict(self, kind: str) -> list[dict[str, object]]:
        assert kind == "records"
        return [{"slide_id": "a", "grade": 1.0}, {"slide_id": "b", "grade": float("nan")}]


def test_what_looks_like_a_data_frame() -> None:
    assert Roster.read(Frame()).column("grade") == ("1", None)  # type: ignore[arg-type]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=9), min_size=1))
def test_any_text_comes_back(labels: list[str]) -> None:
    import csv
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.csv"
        with open(path, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(
                [("slide_id", "label"), *((f"s{at}", label) for at, label in enumerate(labels))]
            )
        assert Roster.read(path).column("label") == tuple(label.strip() or None for label in labels)
