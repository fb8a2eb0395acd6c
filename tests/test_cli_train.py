"""``wsi train``: its commands, what they print, and how they end."""

from __future__ import annotations

import inspect
import io
import json
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console
from support_cohort import write_cohort
from typer.testing import CliRunner, Result

from wsi_engine.cli import console
from wsi_engine.cli.train import CLAM, SHARED, train_app
from wsi_engine.cohorts.splits import SplitSettings
from wsi_engine.models import list_heads, read_head_card
from wsi_engine.models.heads.clam import ClamSettings
from wsi_engine.runs import RunFolder
from wsi_engine.training import TrainSettings

HEADS = ("clam", "abmil", "dsmil", "transmil", "mean")
QUICK = ("--epochs", 2, "--folds", 2, "--validation", 0.25, "--learning-rate", 0.005, "--device", "cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), slides=24, dim=8)


def train(head: str, cohort: Path, out: Path, *extra: object, quick: bool = True) -> Result:
    console.start(debug=False)
    arguments = [head, cohort / "cohort.csv", "--features", cohort / "features", "--label", "subtype", "-o", out]
    arguments += [*(QUICK if quick else ()), *extra]
    result = CliRunner().invoke(train_app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_every_command_explains_itself() -> None:
    listed = CliRunner().invoke(train_app, ["--help"]).stdout
    for head in HEADS:
        assert head in listed
        text = CliRunner().invoke(train_app, [head, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
        for option in ("--features", "--label", "--out", "--folds", "--by-site", "--seed", "--tile-dropout", "--json"):
            assert option in text, (head, option)


def test_defaults_are_those_of_the_engine() -> None:
    """The options say nothing else than the settings that they stand for."""
    known = {field.name: field.default for field in fields(TrainSettings)}
    shared = {one.name: one.default for one in SHARED}
    assert set(known) <= set(shared)
    for name, default in known.items():
        assert shared[name] == default, name
    splits = SplitSettings()
    assert (shared["split"], shared["folds"], shared["validation"]) == (splits.kind, splits.folds, splits.validation)
    assert (shared["test"], shared["by_site"], shared["split_column"]) == (splits.test, splits.by_site, splits.column)
    head = ClamSettings()
    own = {one.name: one.default for one in CLAM}
    assert (own["size"], own["k"], own["bag_weight"], own["dropout"], own["ungated"]) == (
        head.size, head.k, head.bag_weight, head.dropout, not head.gated,
    )  # fmt: skip
    names = [one.name for one in inspect.signature(train_app.registered_commands[0].callback).parameters.values()]  # type: ignore[arg-type]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("head", "extra", "name", "options"),
    [
        ("clam", ("--branches", "multi", "--ungated", "--subtyping", "--k", 3), "clam_mb",
         {"gated": False, "subtyping": True, "k": 3, "size": "small"}),
        ("abmil", ("--hidden", 16, "--hidden", 8, "--attention", 4, "--standardise"), "abmil",
         {"hidden": [16, 8], "attention": 4, "gated": True, "standardise": True}),
        ("dsmil", ("--linear-queries", "--query", 8), "dsmil", {"nonlinear": False, "query": 8}),
        ("transmil", ("--dim", 16, "--heads", 2), "transmil", {"dim": 16, "heads": 2}),
        ("mean", ("--dropout", 0.5), "mean", {"hidden": [], "dropout": 0.5}),
    ],
)  # fmt: skip
def test_options_reach_the_head(
    cohort: Path, tmp_path: Path, head: str, extra: tuple[object, ...], name: str, options: dict[str, object]
) -> None:
    result = train(head, cohort, tmp_path / "run", *extra)
    assert result.exit_code == 0, result.output
    record = RunFolder(tmp_path / "run").read_record()
    assert (record.head, record.complete) == (name, True)
    assert name in list_heads()
    assert options.items() <= record.options.items()
    assert options.items() <= read_head_card(tmp_path / "run" / "fold-1" / "head.safetensors")["options"].items()


def test_what_is_printed(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train("mean", cohort, out)
    assert result.exit_code == 0, result.output
    for text in ("held-out AUROC", "validation loss", f"wsi evaluate {out}", f"--model {out}", "basal, luminal"):
        assert text in result.stdout
    assert "[fold 2/2] done after 2 epochs" in result.stderr
    again = train("mean", cohort, out, "--json")
    assert again.exit_code == 0
    assert "already complete" in again.stderr
    report = json.loads(again.stdout)
    assert [fold["epochs"] for fold in report["folds"]] == [2, 2]
    assert report["classes"] == ["basal", "luminal"]


@pytest.mark.parametrize(
    ("extra", "code", "match"),
    [
        (("--label", "grade"), 2, "grade"),
        (("--encoder", "uni"), 2, "uni"),
        (("--epochs", 0), 2, "epochs must be"),
        (("--folds", 1), 2, "at least 2 folds"),
        (("--folds", 30), 2, "take fewer folds"),
        (("--precision", "fp16"), 2, "precision"),
        (("--split", "thirds"), 2, "thirds"),
        (("--k", 0), 1, "k must be"),
        (("--device", "cuda:99"), 1, "cuda:99"),
        (("--tile-dropout", 1.0), 2, "below 1"),
    ],
)
def test_wrong_usage_is_told_and_writes_nothing(
    cohort: Path, tmp_path: Path, extra: tuple[object, ...], code: int, match: str
) -> None:
    result = train("clam", cohort, tmp_path / "run", *extra)
    assert result.exit_code == code, result.output
    assert match in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_terminal_shows_a_bar(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=120))
    assert train("mean", cohort, tmp_path / "run").exit_code == 0
    text = screen.getvalue()
    assert "epochs" in text
    assert "2/2" in text
    assert "held-out AUROC" in text


def test_another_run_in_the_folder_is_refused(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train("mean", cohort, out).exit_code == 0
    result = train("mean", cohort, out, "--seed", 5)
    assert result.exit_code == 1
    assert "seed (0, now 5)" in " ".join(result.stderr.split())
