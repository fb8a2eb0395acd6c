"""Evaluation of runs and of tables: figures against plain sums and scikit-learn, and what is said of bad input."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as oracle
from support_evaluation import (
    TEMPERATURES,
    THREE,
    THRESHOLDS,
    draw_table,
    soften,
    write_cohort,
    write_ensemble,
    write_run,
    write_runs,
)

import wsi_engine as we
from wsi_engine.errors import InputError, ModelError, SettingsError
from wsi_engine.evaluation import (
    Evaluation,
    evaluate_run,
    evaluation_folder,
    write_evaluation,
)
from wsi_engine.evaluation import comparison as comparison_module
from wsi_engine.evaluation.cases import gather_cases
from wsi_engine.evaluation.figures import evaluate_cases, warn_of_patients
from wsi_engine.evaluation.plots import draw_confusion, draw_reliability, draw_roc
from wsi_engine.evaluation.report import to_json
from wsi_engine.evaluation.tables import write_markdown
from wsi_engine.metrics import BootstrapSettings
from wsi_engine.predictions import PredictionTable


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def two(runs: Path) -> Evaluation:
    return evaluate_run(runs / "two")


@pytest.fixture(scope="module")
def three(runs: Path) -> Evaluation:
    return evaluate_run(runs / "three", seed=4)


def test_figures_of_two_classes_are_those_of_the_calibrated_probabilities(two: Evaluation) -> None:
    table = draw_table()
    shares, true = soften(table), table.labels
    predicted = shares.argmax(axis=1)
    values = {name: one.value for name, one in two.figures.items()}
    expected = {
        "auroc": oracle.roc_auc_score(true, shares[:, 1]),
        "auprc": oracle.average_precision_score(true, shares[:, 1]),
        "accuracy": oracle.accuracy_score(true, predicted),
        "balanced_accuracy": oracle.balanced_accuracy_score(true, predicted),
        "f1_macro": oracle.f1_score(true, predicted, average="macro"),
        "kappa": oracle.cohen_kappa_score(true, predicted),
        "brier": oracle.brier_score_loss(true, shares[:, 1]),
        "brier_before": oracle.brier_score_loss(true, table.probabilities[:, 1]),
        "nll": oracle.log_loss(true, shares),
        "nll_before": oracle.log_loss(true, table.probabilities),
        "ece": we.metrics.expected_calibration_error(true, shares),
        "ece_before": we.metrics.expected_calibration_error(true, table.probabilities),
        "entropy_auroc": oracle.roc_auc_score(predicted != true, -(shares * np.log(shares)).sum(axis=1)),
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-9), name
    assert set(values) == {*expected, "sensitivity", "specificity"}
    assert np.array_equal(two.confusion, oracle.confusion_matrix(true, predicted))
    assert values["nll"] < values["nll_before"]


def test_each_fold_decides_by_its_own_threshold(two: Evaluation) -> None:
    table = draw_table()
    shares = soften(table)
    found = np.zeros((2, 2), int)
    for row, label in enumerate(table.labels):
        found[label, int(shares[row, 1] >= THRESHOLDS[table.folds[row]])] += 1
    assert two.confusion_at_threshold is not None
    assert two.confusion_at_threshold.tolist() == found.tolist()
    assert two.confusion_at_threshold.tolist() != two.confusion.tolist()
    assert two.figures["sensitivity"].value == found[1, 1] / found[1].sum()
    assert two.figures["specificity"].value == found[0, 0] / found[0].sum()


def test_folds_are_measured_one_by_one(two: Evaluation) -> None:
    table = draw_table()
    areas = []
    for fold in two.folds:
        own = table.folds == fold.fold
        areas.append(oracle.roc_auc_score(table.labels[own], soften(table)[own, 1]))
        assert fold.auroc == pytest.approx(areas[-1])
        assert (fold.slides, fold.patients) == (own.sum(), len(set(np.array(table.patients)[own])))
        assert (fold.temperature, fold.threshold) == (TEMPERATURES[fold.fold], THRESHOLDS[fold.fold])
    assert two.fold_auroc == (pytest.approx(np.mean(areas)), pytest.approx(np.std(areas, ddof=1)))


def test_intervals_are_those_of_the_bootstrap_over_patients(two: Evaluation) -> None:
    table = draw_table()
    measures = we.metrics.classification_measures()
    found = we.metrics.patient_bootstrap(measures, table.labels, soften(table), table.patients)
    for name in ("auroc", "kappa", "brier"):
        assert two.figures[name].low == pytest.approx(found[name].low)
        assert two.figures[name].high == pytest.approx(found[name].high)
    assert two.patients == len(set(table.patients)) < len(table)


def test_figures_of_three_classes(three: Evaluation) -> None:
    table = draw_table(THREE)
    shares = soften(table)
    predicted = shares.argmax(axis=1)
    area = oracle.roc_auc_score(table.labels, shares, multi_class="ovr")
    assert three.figures["auroc"].value == pytest.approx(area)
    assert three.confusion_at_threshold is None
    assert "sensitivity" not in three.figures
    assert list(three.by_class) == list(THREE)
    for number, name in enumerate(THREE):
        found, own = three.by_class[name], table.labels == number
        assert found["auroc"].value == pytest.approx(oracle.roc_auc_score(own, shares[:, number]))
        assert found["sensitivity"].value == pytest.approx(oracle.recall_score(own, predicted == number))
        assert found["precision"].value == pytest.approx(oracle.precision_score(own, predicted == number))
        for one in found.values():
            assert one.low < one.value < one.high
    assert np.array_equal(three.confusion, oracle.confusion_matrix(table.labels, predicted))
    assert three.reliability.counts.sum() == len(table)


def test_calibration_is_the_one_of_the_ensemble(runs: Path) -> None:
    """A run must be judged on the very probabilities that classification would give."""
    from wsi_engine.classification.prediction import calibrate

    cases, table = gather_cases(runs / "three"), draw_table(THREE)
    for row in range(len(table)):
        expected = calibrate(table.probabilities[row], TEMPERATURES[table.folds[row]])
        assert cases.probabilities[row].tolist() == expected.tolist()
    assert cases.raw.tobytes() == table.probabilities.tobytes()


def test_the_predictions_of_a_run_are_the_run(runs: Path) -> None:
    one, other = gather_cases(runs / "two"), gather_cases(runs / "two" / "predictions.csv")
    assert other.calibrations == one.calibrations
    assert other.probabilities.tobytes() == one.probabilities.tobytes()


def test_a_table_without_heads_is_taken_as_it_stands(tmp_path: Path) -> None:
    draw_table().write(tmp_path / "validation.csv")
    cases = gather_cases(tmp_path / "validation.csv")
    assert cases.probabilities.tobytes() == cases.raw.tobytes()
    assert not cases.thresholds_known
    assert any("too good" in note for note in cases.notes)
    assert evaluation_folder(tmp_path / "validation.csv") == tmp_path / "evaluation-validation"
    assert evaluation_folder(tmp_path / "predictions.csv") == tmp_path / "evaluation"
    assert evaluation_folder(tmp_path) == tmp_path / "evaluation"


def test_an_ensembles_table_takes_its_classes_from_a_cohort(tmp_path: Path) -> None:
    table = draw_table(slides=60)
    rng = np.random.default_rng(5)
    entropy, disagreement = rng.random(60), rng.random(60)
    path = write_ensemble(tmp_path / "p.csv", table, entropy, disagreement)
    known = table.select(range(5, 60))
    known = replace(known, labels=np.where(np.arange(55) < 3, -1, known.labels), slide_ids=(*known.slide_ids[:-1], "x"))
    truth = write_cohort(tmp_path / "cohort.csv", known)
    found = evaluate_run(path, truth=truth, label="grade")
    rows = np.arange(8, 59)
    assert found.cases.slide_ids == tuple(table.slide_ids[row] for row in rows)
    assert found.cases.patients == tuple(table.patients[row] for row in rows)
    assert found.figures["auroc"].value == oracle.roc_auc_score(table.labels[rows], table.probabilities[rows, 1])
    wrong = table.predicted[rows] != table.labels[rows]
    for name, values in (("entropy_auroc", entropy), ("disagreement_auroc", disagreement)):
        assert found.figures[name].value == pytest.approx(oracle.roc_auc_score(wrong, values[rows]))
    assert found.folds == ()
    assert "ece_before" not in found.figures
    text = "; ".join(found.warnings)
    assert "6 predicted slides not in" in text
    assert "1 slide of" in text
    assert "9 of 60 predictions left out: their class is not known" in text
    assert "that no fold was trained on" in text


def test_a_cohort_replaces_the_classes_of_a_run(runs: Path, tmp_path: Path) -> None:
    table = draw_table()
    truth = write_cohort(tmp_path / "c.csv", replace(table, labels=1 - table.labels), "subtype")
    cases = gather_cases(runs / "two", truth)  # the run knows its column
    assert cases.labels.tolist() == (1 - table.labels).tolist()
    other = write_cohort(tmp_path / "d.csv", table, "checked")
    assert gather_cases(runs / "two", other, "checked").label == "checked"


def test_a_class_that_the_model_does_not_know_is_named_with_its_slides(runs: Path, tmp_path: Path) -> None:
    lines = ["slide_id,subtype", *(f"s{row},{'cyst' if row in {3, 7} else 'normal'}" for row in range(20)), "far,odd"]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r'does not know the class "cyst" of s3, s7 \(it knows normal, tumour\)'):
        gather_cases(runs / "two", tmp_path / "c.csv")


def test_truth_that_cannot_be_used(runs: Path, tmp_path: Path) -> None:
    table = draw_table(slides=10)
    path = write_ensemble(tmp_path / "p.csv", table, np.zeros(10), np.zeros(10))
    cohort = write_cohort(tmp_path / "c.csv", table)
    with pytest.raises(InputError, match="--truth"):
        gather_cases(path)
    with pytest.raises(InputError, match="--label"):
        gather_cases(path, cohort)
    with pytest.raises(InputError, match="name the cohort with --truth"):
        gather_cases(runs / "two", None, "grade")
    with pytest.raises(InputError, match='no column "stage"'):
        gather_cases(path, cohort, "stage")
    strangers = write_cohort(tmp_path / "s.csv", replace(table, slide_ids=tuple("abcdefghij")))
    with pytest.raises(InputError, match="none of the 10 predicted slides"):
        gather_cases(path, strangers, "grade")
    empty = write_cohort(tmp_path / "e.csv", replace(table, labels=np.full(10, -1)))
    with pytest.raises(InputError, match="nothing to evaluate"):
        gather_cases(path, empty, "grade")
    (tmp_path / "t.csv").write_text("slide_id,grade\ns0,normal\ns0,tumour\n")
    with pytest.raises(InputError, match=r"line 3: s0 stands twice"):
        gather_cases(path, tmp_path / "t.csv", "grade")


def test_runs_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="not a training run"):
        gather_cases(tmp_path / "empty")
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        gather_cases(tmp_path / "nowhere")
    table = draw_table(slides=20)
    run = write_run(tmp_path / "run", table)
    (run / "fold-1" / "head.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"fold-1.*cannot be read"):
        gather_cases(run)
    (run / "fold-1" / "head.safetensors").unlink()
    with pytest.raises(ModelError, match="no file of a head"):
        gather_cases(run)
    write_run(run, table, temperatures=(1.0, -2.0, 1.0))
    with pytest.raises(ModelError, match="does not fit the run"):
        gather_cases(run)
    draw_table(("a", "b"), slides=20).write(run / "predictions.csv")
    with pytest.raises(ModelError, match="not of the run beside it"):
        gather_cases(run)
    (run / "predictions.csv").unlink()
    with pytest.raises(ModelError, match="no held-out predictions yet"):
        gather_cases(run)
    with pytest.raises(SettingsError, match="1000 resamples"):
        evaluate_run(run, resamples=10)


def test_what_a_reader_must_know_is_said(tmp_path: Path) -> None:
    table = draw_table(slides=30).select(range(12))
    run = write_run(tmp_path / "run", table, thresholds=(None, 0.5, 0.5), complete=False)
    cases = gather_cases(run)
    text = "; ".join(cases.notes)
    assert "not finished" in text
    assert "folds without a threshold (0)" in text
    own = cases.folds == 0
    assert cases.decided[own].tolist() == cases.probabilities[own].argmax(axis=1).tolist()
    warnings = "; ".join(warn_of_patients(cases))
    assert f"only {len(set(table.patients))} patients" in warnings
    assert "patients of class tumour" in warnings


def test_one_class_alone_leaves_figures_undefined_and_says_so(tmp_path: Path) -> None:
    table = draw_table(slides=24)
    table = table.select(np.flatnonzero(table.labels == 0))
    found = evaluate_run(write_run(tmp_path / "run", table))
    assert math.isnan(found.figures["auroc"].value)
    assert math.isnan(found.figures["sensitivity"].value)
    assert found.figures["specificity"].value >= 0
    assert any("undefined on these slides: AUROC" in one for one in found.warnings)
    assert any("no slide is of class tumour" in one for one in found.warnings)
    report = write_evaluation(found, tmp_path / "out")
    assert "| AUROC | n/a | n/a |" in report.read_text()
    value = json.loads((tmp_path / "out" / "report.json").read_text())
    assert value["figures"]["auroc"]["value"] is None
    assert value["fold_auroc"]["mean"] is None


def test_slides_held_out_several_times_count_each_time(tmp_path: Path) -> None:
    table = draw_table(slides=30)
    again = replace(table, folds=(table.folds + 1) % 3)
    both = PredictionTable(
        table.classes, table.slide_ids * 2, table.patients * 2, np.tile(table.labels, 2),
        np.concatenate([table.folds, again.folds]), np.concatenate([table.probabilities, again.probabilities[::-1]]),
    )  # fmt: skip
    cases = gather_cases(write_run(tmp_path / "run", both))
    assert len(cases) == 60
    found = evaluate_cases(cases, Unchecked(resamples=1))
    assert found.size == f"60 predictions of 30 slides of {len(set(table.patients))} patients"
    assert "30 slides held out 60 times in all; each time counts" in cases.notes
    notes: list[str] = []
    merged = comparison_module._merge_repeats(cases, notes)
    assert len(merged) == 30
    for row, slide in enumerate(merged.slide_ids):
        at = [place for place, name in enumerate(cases.slide_ids) if name == slide]
        assert merged.probabilities[row] == pytest.approx(cases.probabilities[at].mean(axis=0))
        assert merged.patients[row] == cases.patients[at[0]]
        assert merged.labels[row] == cases.labels[at[0]]
        votes = cases.decided[at].tolist()
        assert merged.decided[row] in votes
    assert len(notes) == 1


def test_a_temperature_that_does_harm_is_told(two: Evaluation, tmp_path: Path) -> None:
    """Hotter than 20 times: nearly even shares, worse than being too sure on slides that are mostly right."""
    harm = "temperatures made the log-likelihood worse"
    assert not any(harm in one for one in two.warnings)
    run = write_run(tmp_path / "run", draw_table(gain=5.0), temperatures=(50.0, 50.0, 50.0))
    found = evaluate_cases(gather_cases(run), Unchecked(resamples=1))
    assert found.figures["nll"].value > found.figures["nll_before"].value
    assert any(harm in one for one in found.warnings)


def test_the_report_holds_all_numbers(two: Evaluation, three: Evaluation, runs: Path, tmp_path: Path) -> None:
    report = write_evaluation(three, tmp_path / "new" / "folder")
    names = {path.name for path in report.parent.iterdir()}
    assert names == {"report.md", "report.json", "roc.png", "reliability.png", "confusion.png"}
    value = json.loads((report.parent / "report.json").read_text(), parse_constant=pytest.fail)
    assert value == to_json(three)
    assert value["figures"]["auroc"]["value"] == three.figures["auroc"].value
    assert value["figures"]["auroc"]["high"] == three.figures["auroc"].high
    assert value["bootstrap"] == {"resamples": 1000, "seed": 4, "level": 0.95}
    assert value["confusion"] == three.confusion.tolist()
    assert [one["class"] for one in value["by_class"]] == list(THREE)
    assert value["against"] is None
    text = report.read_text()
    area = three.figures["auroc"]
    assert f"| AUROC | {area.value:.3f} | {area.low:.3f}–{area.high:.3f} | 1000 | {area.skipped} |" in text
    assert "fitted on its validation slides only" in text
    for name in names - {"report.md", "report.json"}:
        assert f"]({name})" in text
    assert two.figures["sensitivity"].value == to_json(two)["figures"]["sensitivity"]["value"]


def test_tables_keep_their_columns_whatever_a_class_is_called(three: Evaluation) -> None:
    lines = write_markdown(three, [], None).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert any(r"a \| b\_c" in line for line in tables)
    for above, line in pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert line.replace(r"\|", "").count("|") == above.replace(r"\|", "").count("|")


@pytest.mark.parametrize("draw", [draw_roc, draw_reliability, draw_confusion])
def test_pictures_are_drawn_whole(draw, three: Evaluation) -> None:
    content = draw(three)
    assert content == draw(three)  # the same bytes again
    picture = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    assert min(picture.shape) > 850
    assert max(picture.shape) < 1400
    rim = [picture[:4], picture[-4:], picture[:, :4], picture[:, -4:]]
    assert all((side == 255).all() for side in rim)  # nothing is cut off
    assert (picture < 100).mean() > 0.001


def test_each_curve_of_many_classes_is_drawn(tmp_path: Path) -> None:
    classes = tuple(f"class number {number} of many" for number in range(12))
    cases = gather_cases(write_run(tmp_path / "run", draw_table(classes, slides=140)))
    found = evaluate_cases(cases, Unchecked(resamples=1))
    for draw in (draw_roc, draw_confusion):
        picture = Image.open(io.BytesIO(draw(found)))
        assert 850 < min(picture.size) <= max(picture.size) < 2200


class Unchecked(BootstrapSettings):
    """Settings that allow one resample, where pictures alone are looked at."""

    def __post_init__(self) -> None:
        pass


def test_a_folder_that_cannot_be_written_is_named(two: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write_evaluation(two, tmp_path / "file" / "out")


def test_figures_need_neither_torch_nor_matplotlib_and_plots_leave_no_global_state(tmp_path: Path) -> None:
    draw_table(slides=20).write(tmp_path / "t.csv")
    code = (
        "import sys; from wsi_engine.evaluation.cases import gather_cases; import wsi_engine.evaluation as e\n"
        "from wsi_engine.evaluation.figures import evaluate_cases; from wsi_engine.metrics import BootstrapSettings\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
        "found = evaluate_cases(gather_cases(sys.argv[1]), BootstrapSettings())\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
        "e.write_evaluation(found, sys.argv[2]); assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "t.csv", tmp_path / "out"], check=True)
