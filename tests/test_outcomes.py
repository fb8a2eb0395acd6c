"""The table of predictions: written to the last digit, by several processes at once."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from wsi_engine.classification import outcomes
from wsi_engine.classification.outcomes import PredictionsFile, SlideClass
from wsi_engine.errors import InputError
from wsi_engine.lease import hold_lease


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as stream:
        return {row["slide_id"]: row for row in csv.DictReader(stream)}


def test_the_table_is_written_to_the_last_digit(tmp_path: Path) -> None:
    value = 1 / 3
    table = PredictionsFile(tmp_path / "p.csv", ("x, y", "z"), "d")
    table.add(SlideClass("s", "done", "", "x, y", {"x, y": value, "z": 1 - value}, 0.9182958340544896, 0.0, 7))
    table.add(SlideClass("t", "failed", "why"))
    table.write()
    rows = read_rows(tmp_path / "p.csv")
    assert list(rows) == ["s"]
    assert float(rows["s"]["prob_x, y"]) == value
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]
    PredictionsFile(tmp_path / "p.csv", ("x, y", "z"), "d").write()
    assert read_rows(tmp_path / "p.csv") == rows
    with pytest.raises(InputError, match="another model"):
        PredictionsFile(tmp_path / "p.csv", ("x", "z"), "d")


def add_slide(table: PredictionsFile, name: str, value: float) -> None:
    table.add(SlideClass(name, "done", "", "x", {"x": value, "z": 1 - value}, 0.5, 0.0, 7))


def test_two_at_once_keep_each_others_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    first, second = (PredictionsFile(path, ("x", "z"), "d") for _ in range(2))
    add_slide(first, "a", 0.25)
    add_slide(second, "b", 0.75)
    first.write()
    second.write()
    add_slide(first, "c", 0.5)
    add_slide(second, "a", 0.875)  # classified again by the other
    second.write()
    rows = read_rows(path)
    assert {name: float(row["prob_x"]) for name, row in rows.items()} == {"a": 0.875, "b": 0.75}
    first.write()
    assert set(read_rows(path)) == {"a", "b", "c"}


def test_one_waits_for_the_other_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = PredictionsFile(tmp_path / "p.csv", ("x", "z"), "d")
    add_slide(table, "a", 0.25)
    with ThreadPoolExecutor(1) as pool:
        with hold_lease(tmp_path / ".p.lease"):
            writing = pool.submit(table.write)
            assert not wait([writing], 0.3).done
            assert not (tmp_path / "p.csv").exists()
        writing.result()
    assert set(read_rows(tmp_path / "p.csv")) == {"a"}
    monkeypatch.setattr(outcomes, "WAIT_SECONDS", 0.0)
    with (
        hold_lease(tmp_path / ".p.lease"),
        pytest.raises(InputError, match=r"cannot write .*p\.csv: p is being written"),
    ):
        table.write()
