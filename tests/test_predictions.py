"""Tables of predictions: they come back bit for bit, and whatever is wrong with one is told by its line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_engine.errors import InputError, ModelError, SettingsError
from wsi_engine.predictions import PredictionTable, read_lines

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


def make_table(seed: int = 0, count: int = 7, classes: tuple[str, ...] = ("benign", "grade 1, low", 'the "rest"')):
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(count, len(classes)))
    return PredictionTable(
        classes,
        tuple(f"slide-{row}" for row in range(count)),
        tuple(f"patient {row // 2}" for row in range(count)),
        rng.integers(-1, len(classes), count),
        rng.integers(0, 3, count),
        weights / weights.sum(axis=1, keepdims=True),
    )


def assert_equal(one: PredictionTable, other: PredictionTable) -> None:
    assert (one.classes, one.slide_ids, one.patients) == (other.classes, other.slide_ids, other.patients)
    for name in ("labels", "folds", "probabilities"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes(), name


def test_a_table_comes_back_bit_for_bit(tmp_path: Path) -> None:
    table = make_table(count=50)
    table.write(tmp_path / "new" / "predictions.csv")
    assert_equal(PredictionTable.read(tmp_path / "new" / "predictions.csv"), table)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["predictions.csv"]  # no draft stays


def test_the_layout_is_the_one_promised(tmp_path: Path) -> None:
    table = PredictionTable(
        ("no", "yes"), ("a", "b"), ("p", "q"), np.array([1, -1]), np.array([0, 2]), np.array([[0.1, 0.9], [0.5, 0.5]])
    )
    table.write(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == (
        "fold,slide_id,patient,label,prediction,prob_no,prob_yes\n0,a,p,yes,yes,0.1,0.9\n2,b,q,,no,0.5,0.5\n"
    )


@settings(max_examples=50, deadline=None)
@given(classes=st.lists(NAMES, min_size=2, max_size=4, unique=True), seed=st.integers(0, 99), count=st.integers(0, 5))
def test_any_names_come_back(
    tmp_path_factory: pytest.TempPathFactory, classes: list[str], seed: int, count: int
) -> None:
    path = tmp_path_factory.mktemp("table") / "t.csv"
    table = make_table(seed, count, tuple(classes))
    table = replace(table, patients=tuple(f"{classes[0]},{row}" for row in range(count)))
    table.write(path)
    assert_equal(PredictionTable.read(path), table)


def test_rows_are_selected_in_the_order_asked_for() -> None:
    table = make_table()
    chosen = table.select([4, 0])
    assert chosen.slide_ids == ("slide-4", "slide-0")
    assert np.array_equal(chosen.probabilities, table.probabilities[[4, 0]])
    assert len(table.select(np.flatnonzero(table.folds == 77))) == 0
    assert np.array_equal(table.predicted, [max(range(3), key=row.__getitem__) for row in table.probabilities.tolist()])


HEADER = "fold,slide_id,patient,label,prediction,prob_a,prob_b\n"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", 'no column "fold"'),
        (HEADER.replace("label,", ""), 'no column "label"'),
        (HEADER.replace(",prob_b", ""), "two classes or more"),
        (HEADER.replace("prob_b", "prob_a"), 'two columns "prob_a"'),
        (HEADER + "0,s,p,a,a,0.5,0.5\n0,t,p,a,a,half,0.5\n", 'line 3: prob_a must be a number, not "half"'),
        (HEADER + "0,s,p,a,a,nan,0.5\n", 'line 2: prob_a must be a number, not "nan"'),
        (HEADER + "0,s,p,a,a,,0.5\n", "line 2: prob_a must be a number"),
        (HEADER + "0,s,p,a,a,0.5,0.502\n", "line 2: the probabilities sum to 1.002, not to 1"),
        (HEADER + "0,s,p,a,a,-0.5,1.5\n", "line 2: the probabilities hold -0.5"),
        (HEADER + "0,s,p,c,a,0.5,0.5\n", 'line 2: the label "c" is not among the classes'),
        (HEADER + "x,s,p,a,a,0.5,0.5\n", "line 2: the fold must be a whole number"),
        (HEADER + "-1,s,p,a,a,0.5,0.5\n", "line 2: the fold must be a whole number"),
        (HEADER + "0,,p,a,a,0.5,0.5\n", "line 2: names no slide"),
        (HEADER + "0,s,p,a,a,0.5,0.5\n1,s,p,a,a,0.5,0.5\n0,s,p,a,a,0.5,0.5\n", "line 4: s stands twice in fold 0"),
        (HEADER + "0,s,p,a,a,0.5\n", "line 2: has 6 columns of 7"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InputError) as found:
        PredictionTable.read(path)
    message = str(found.value)
    assert match in message
    assert str(path) in message
    assert "\n" not in message


def test_half_precision_probabilities_pass(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "0,s,,a,a,0.5,0.5009\n")
    table = PredictionTable.read(path)
    assert table.patients == ("s",)  # a slide of nobody is its own patient
    assert table.labels.tolist() == [0]


def test_files_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nothing"):
        PredictionTable.read(tmp_path / "nothing.csv")
    (tmp_path / "b.csv").write_bytes(b"fold,\xff\xfe")
    with pytest.raises(InputError, match="not a CSV file in UTF-8"):
        PredictionTable.read(tmp_path / "b.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match="cannot write"):
        make_table().write(tmp_path / "folder")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"classes": ("a", "a", "b")}, "each of its own name"),
        ({"classes": ("a", "b")}, "do not fit"),
        ({"patients": ("p",)}, "do not fit"),
        ({"labels": np.full(7, 3)}, "not among the 3 classes"),
        ({"labels": np.full(7, -2)}, "not among the 3 classes"),
        ({"probabilities": np.full((7, 3), 0.5)}, "slide-0 sum to 1.5"),
        ({"probabilities": np.full((7, 3), np.nan)}, "slide-0 hold nan"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        replace(make_table(), **change)


def test_lines_give_other_columns_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("slide_id,prob_a,prob_b,entropy\ns,0.25,0.75,0.5\nt,1.0,0.0,0.1\n\n")
    lines = read_lines(path, ("slide_id",))
    assert lines.slide_ids == ("s", "t")
    assert lines.classes == ("a", "b")
    assert lines.numbers("entropy").tolist() == [0.5, 0.1]
    assert lines.probabilities().tolist() == [[0.25, 0.75], [1.0, 0.0]]
