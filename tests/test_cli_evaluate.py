"""``wsi evaluate``: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from support_evaluation import draw_table, write_cohort, write_ensemble, write_run
from typer.testing import CliRunner, Result

from wsi_engine.cli import console
from wsi_engine.cli.evaluate import evaluate
from wsi_engine.evaluation import evaluate_run


def run_evaluate(*arguments: object) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(console.reporting(evaluate))
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("cli") / "run", draw_table(slides=60))


def test_figures_are_printed_and_the_report_is_beside_the_run(run: Path) -> None:
    result = run_evaluate(run)
    assert result.exit_code == 0, result.output
    area = evaluate_run(run).figures["auroc"]
    line = next(line for line in result.stdout.splitlines() if line.startswith("AUROC "))
    assert line.split() == ["AUROC", f"{area.value:.3f}", f"{area.low:.3f}–{area.high:.3f}"]
    assert "AUROC over 3 folds" in result.stdout
    assert f"report: {run / 'evaluation' / 'report.md'}" in result.stdout
    assert (run / "evaluation" / "confusion.png").is_file()


def test_two_runs_as_one_json_document(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", draw_table(slides=60, seed=5, gain=3.0))
    result = run_evaluate(run, "--against", other, "-o", tmp_path / "out", "--seed", 3, "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["report"] == str(tmp_path / "out" / "report.md")
    assert value["bootstrap"]["seed"] == 3
    assert value["against"]["slides"] == 60
    assert value["against"]["differences"]["auroc"]["value"] > 0
    assert "## Against" in (tmp_path / "out" / "report.md").read_text()


def test_a_table_of_an_ensemble_with_its_cohort(tmp_path: Path) -> None:
    table = draw_table(slides=40)
    path = write_ensemble(tmp_path / "predictions.csv", table, np.linspace(0, 1, 40), np.zeros(40))
    cohort = write_cohort(tmp_path / "cohort.csv", table)
    other = write_ensemble(tmp_path / "other.csv", draw_table(slides=40, seed=4), np.linspace(0, 1, 40), np.zeros(40))
    result = run_evaluate(path, "--truth", cohort, "--label", "grade", "--against", other)
    assert result.exit_code == 0, result.output
    assert "entropy tells errors" in result.stdout
    assert "on 40 slides of" in result.stdout
    assert "no fold was trained on" in result.stderr
    assert (tmp_path / "evaluation" / "report.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (("{run}", "--resamples", "10"), 2, "1000 resamples"),
        (("{run}", "--seed", "-1"), 2, "seed"),
        (("{run}", "--label", "grade"), 2, "--truth"),
        (("{empty}",), 1, "not a training run"),
        (("{empty}/none.csv",), 2, "cannot read"),
        (("{table}",), 2, "--truth"),
        ((), 2, "Missing argument"),
    ],
)
def test_wrong_usage_is_one_sentence(
    run: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, match: str
) -> None:
    (tmp_path / "empty").mkdir()
    table = write_ensemble(tmp_path / "t.csv", draw_table(slides=5), np.zeros(5), np.zeros(5))
    filled = [one.format(run=run, empty=tmp_path / "empty", table=table) for one in arguments]
    result = run_evaluate(*filled)
    assert result.exit_code == code, result.output
    assert match in result.stderr
    assert "Traceback" not in result.output
    if code == 1:
        assert result.stderr.count("\n") == 1
