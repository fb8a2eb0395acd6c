"""Two runs compared on the slides that both hold out, patient by patient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as oracle
from support_evaluation import (
    THREE,
    draw_table,
    soften,
    write_run,
    write_runs,
)

from wsi_engine.errors import InputError
from wsi_engine.evaluation import (
    compare_runs,
    evaluate_run,
)
from wsi_engine.evaluation import comparison as comparison_module
from wsi_engine.evaluation import figures as figures_module
from wsi_engine.predictions import PredictionTable


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def only_auroc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer measures where a test is not about them: the bootstrap is most of the time."""
    for module in (comparison_module, figures_module):
        full = module.list_measures
        monkeypatch.setattr(module, "list_measures", lambda cases, full=full: {"auroc": full(cases)["auroc"]})


def test_the_better_run_is_found(runs: Path) -> None:
    found = compare_runs(runs / "two", runs / "better")
    one = found.differences["auroc"]
    assert one.first == evaluate_run(runs / "two").figures["auroc"].value
    assert one.value == one.second - one.first > 0
    assert 0 < one.low < one.value < one.high
    assert one.p_value < 0.05
    assert (found.slides, found.only_first, found.only_second) == (90, 0, 0)
    assert {"sensitivity", "specificity", "entropy_auroc", "ece"} < set(found.differences)


@pytest.mark.usefixtures("only_auroc")
def test_a_run_does_not_differ_from_itself_nor_by_the_order_of_its_rows(runs: Path, tmp_path: Path) -> None:
    table = draw_table()
    turned = write_run(tmp_path / "turned", table.select(np.arange(len(table))[::-1]))
    one = compare_runs(runs / "two", turned).differences["auroc"]
    assert (one.value, one.low, one.high, one.p_value) == (0, 0, 0, 1)


@pytest.mark.usefixtures("only_auroc")
def test_classes_may_come_in_another_order(runs: Path, tmp_path: Path) -> None:
    table = draw_table(THREE, seed=8)
    order = [2, 0, 1]
    turned = PredictionTable(
        tuple(THREE[old] for old in order), table.slide_ids, table.patients,
        np.array([order.index(label) for label in table.labels]), table.folds, table.probabilities[:, order],
    )  # fmt: skip
    plain, other = write_run(tmp_path / "plain", table), write_run(tmp_path / "turned", turned)
    found = [compare_runs(runs / "three", path).differences["auroc"] for path in (plain, other)]
    assert found[0].value != 0
    assert found[1].value == pytest.approx(found[0].value)
    assert found[1].low == pytest.approx(found[0].low)


@pytest.mark.usefixtures("only_auroc")
def test_only_shared_slides_are_compared(runs: Path, tmp_path: Path) -> None:
    table = draw_table(seed=2)
    fewer = table.select(range(30, 90))
    fewer = replace(fewer, slide_ids=(*fewer.slide_ids[:-2], "x", "y"))
    found = compare_runs(runs / "two", write_run(tmp_path / "b", fewer))
    assert (found.slides, found.only_first, found.only_second) == (58, 32, 2)
    assert found.patients == len(set(table.patients[30:88]))
    rows = np.arange(30, 88)
    expected = oracle.roc_auc_score(table.labels[rows], soften(table)[rows, 1])
    assert found.differences["auroc"].second == pytest.approx(expected)
    assert any("32 slides that only" in one for one in found.warnings)


@pytest.mark.usefixtures("only_auroc")
def test_patients_of_the_first_are_resampled(runs: Path, tmp_path: Path) -> None:
    table = replace(draw_table(seed=2), patients=tuple(f"q{row}" for row in range(90)))
    same = write_run(tmp_path / "same", draw_table(seed=2))
    found = compare_runs(runs / "two", write_run(tmp_path / "b", table))
    assert found.differences == compare_runs(runs / "two", same).differences
    assert any("name patients differently" in one for one in found.warnings)


def test_runs_that_cannot_be_compared(runs: Path, tmp_path: Path) -> None:
    table = draw_table()
    with pytest.raises(InputError, match="only runs of the same classes"):
        compare_runs(runs / "two", runs / "three")
    labels = table.labels.copy()
    labels[[4, 6]] = 1 - labels[[4, 6]]
    with pytest.raises(InputError, match="differ in the class of s4, s6: "):
        compare_runs(runs / "two", write_run(tmp_path / "a", replace(table, labels=labels)))
    lonely = table.select([row for row, name in enumerate(table.patients) if name == table.patients[0]])
    with pytest.raises(InputError, match="of 1 patient: a comparison needs two"):
        compare_runs(runs / "two", write_run(tmp_path / "b", lonely))
    strangers = replace(table, slide_ids=tuple(f"t{row}" for row in range(90)))
    with pytest.raises(InputError, match="share 0 slides of 0 patients"):
        compare_runs(runs / "two", write_run(tmp_path / "c", strangers))
