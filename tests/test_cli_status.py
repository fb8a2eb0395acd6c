"""``wsi status``: done, running, failed and pending, as files and processes have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from wsi_engine.cli import console
from wsi_engine.cli.status import status
from wsi_engine.cohorts.roster import Roster
from wsi_engine.cohorts.states import read_status
from wsi_engine.errors import InputError
from wsi_engine.failures import record_outcome
from wsi_engine.lease import STALE_SECONDS, hold_lease


def wsi(*arguments: object) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(console.reporting(status))
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def node(path: Path, **attributes: object) -> None:
    """A group or array, as far as a status looks at it."""
    path.mkdir(parents=True)
    (path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}))


def store(folder: Path, slide_id: str, features: bool | None = None, nuclei: bool | None = None) -> Path:
    """A store whose features and nuclei are complete (True), begun (False) or not there (None)."""
    path = folder / f"{slide_id}.zarr"
    node(path, schema_version=1)
    if features is not None:
        node(path / "features" / "net")
        node(path / "features" / "net" / ("values" if features else "partial"), complete=features)
    if nuclei is not None:
        node(path / "nuclei" / "stain", **({"complete": True} if nuclei else {}))
    return path


def state(folder: Path, slide_id: str, job: str) -> tuple[str, str]:
    (found,) = [one for one in read_status(folder).states if (one.slide_id, one.job) == (slide_id, job)]
    return found.state, found.detail


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Slides in every state; the features of ``r`` are being made by this process."""
    store(tmp_path, "a", features=True, nuclei=True)
    store(tmp_path, "b", features=False)
    store(tmp_path, "r", features=False, nuclei=True)
    record_outcome(tmp_path, "f", "features/net", "failed", "f.svs ends early: fetch it again")
    node(tmp_path / "a.zarr" / "attention" / "run" / "values", complete=True)
    with hold_lease(tmp_path / ".r.lease", "features/net"):
        yield tmp_path


def test_all_states(folder: Path) -> None:
    found = read_status(folder)
    assert found.slides == ("a", "b", "f", "r")
    assert found.jobs == ("features/net", "attention/run", "nuclei/stain")
    assert found.counts() == {
        "features/net": {"done": 1, "running": 1, "failed": 1, "pending": 1},
        "attention/run": {"done": 1, "running": 0, "failed": 0, "pending": 3},
        "nuclei/stain": {"done": 2, "running": 0, "failed": 0, "pending": 2},
    }
    assert state(folder, "f", "features/net") == ("failed", "f.svs ends early: fetch it again")
    kind, who = state(folder, "r", "features/net")
    assert (kind, who.startswith(f"by process {os.getpid()} on ")) == ("running", True)
    assert state(folder, "b", "features/net") == ("pending", "begun")


def test_what_is_printed(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    result = wsi(folder)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["4", "slides", "in", str(folder)]
    assert lines[1:5] == [
        ["job", "done", "running", "failed", "pending"],
        ["features/net", "1", "1", "1", "1"],
        ["attention/run", "1", "–", "–", "3"],
        ["nuclei/stain", "2", "–", "–", "2"],
    ]
    assert ["running", "job", "by"] in lines
    assert f"process {os.getpid()}" in result.stdout
    assert "f.svs ends early: fetch it again" in result.stdout
    assert sorted(folder.rglob("*")) == before


def test_one_json_document(folder: Path) -> None:
    value = json.loads(wsi(folder, "--json").stdout)
    assert value["jobs"]["features/net"]["failed"] == 1
    assert not value["complete"]
    assert {"slide_id": "a", "job": "attention/run", "state": "done", "detail": ""} in value["states"]


def test_a_cohort_says_what_is_pending(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    table = tmp_path_factory.mktemp("list") / "cohort.csv"
    table.write_text("slide_id\na\nnew\nf\n")
    result = wsi(folder, "--cohort", table, "--job", "nuclei/student")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][:2] == ["3", "slides"]
    assert "2 other slides there, not in the cohort: b, r" in result.stdout
    assert ["features/net", "1", "–", "1", "1"] in lines
    assert ["nuclei/student", "–", "–", "–", "3"] in lines
    roster = Roster.read(table)
    assert read_status(folder, roster.select([0])).complete
    assert not read_status(folder, roster.select([0]), ["nuclei/student"]).complete


def test_long_lists_are_cut(tmp_path: Path) -> None:
    for number in range(25):
        record_outcome(tmp_path, f"s{number:02}", "nuclei/stain", "failed", "out of luck")
    assert "s19" in wsi(tmp_path).stdout
    assert "s20" not in wsi(tmp_path).stdout
    assert "and 5 more: --all lists them" in wsi(tmp_path).stdout
    assert "s24" in wsi(tmp_path, "--all").stdout


def test_a_process_that_was_killed_does_not_run(tmp_path: Path) -> None:
    store(tmp_path, "a", features=False)
    code = (
        "import os, pathlib, sys; from wsi_engine.lease import hold_lease\n"
        "with hold_lease(pathlib.Path(sys.argv[1]), 'features/net'): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / ".a.lease")], check=False)
    assert (tmp_path / ".a.lease").exists()
    kind, why = state(tmp_path, "a", "features/net")
    assert kind == "pending"
    assert why.startswith("left by process ")
    assert why.endswith(", which is gone")


def test_a_process_elsewhere_runs_while_it_gives_signs_of_life(tmp_path: Path) -> None:
    store(tmp_path, "a", features=False)
    with hold_lease(tmp_path / ".a.lease", "features/net"):
        value = json.loads((tmp_path / ".a.lease").read_text())
    path = tmp_path / ".a.lease"
    path.write_text(json.dumps(value | {"host": "elsewhere", "place": "another machine"}))
    assert state(tmp_path, "a", "features/net") == ("running", f"by process {os.getpid()} on elsewhere")
    long_ago = path.stat().st_mtime - 2 * STALE_SECONDS
    os.utime(path, (long_ago, long_ago))
    assert state(tmp_path, "a", "features/net")[0] == "pending"


def test_a_lease_that_names_no_job_is_on_what_is_not_done(tmp_path: Path) -> None:
    store(tmp_path, "a", features=True, nuclei=False)
    with hold_lease(tmp_path / ".a.lease"):
        assert state(tmp_path, "a", "nuclei/stain")[0] == "running"
        assert state(tmp_path, "a", "features/net")[0] == "done"


def test_leases_of_parts_are_no_slides(tmp_path: Path) -> None:
    store(tmp_path, "a", features=False)
    store(tmp_path, "b.0-4", features=False)
    with (
        hold_lease(tmp_path / ".a.lease", "features/net"),
        hold_lease(tmp_path / ".a.0-512.lease", "features/net"),
        hold_lease(tmp_path / ".b.0-4.lease", "features/net"),
    ):
        assert [(one.slide_id, one.state) for one in read_status(tmp_path).states] == [
            ("a", "running"), ("b.0-4", "running"),
        ]  # fmt: skip


def test_the_last_attempt_counts(tmp_path: Path) -> None:
    store(tmp_path, "a", features=True)
    record_outcome(tmp_path, "a", "features/net", "failed", "other weights")
    assert state(tmp_path, "a", "features/net") == ("failed", "other weights")
    record_outcome(tmp_path, "a", "features/net", "already complete", "")
    assert state(tmp_path, "a", "features/net") == ("done", "")


def test_damaged_stores_are_named(tmp_path: Path) -> None:
    store(tmp_path, "a", features=True)
    (store(tmp_path, "b", features=True) / "zarr.json").unlink()
    (store(tmp_path, "c", features=True) / "features" / "net" / "values" / "zarr.json").write_text("{")
    assert state(tmp_path, "b", "features/net") == ("failed", "its store lacks its zarr.json: delete it and run again")
    kind, why = state(tmp_path, "c", "features/net")
    assert kind == "failed"
    assert why.startswith("its store is damaged (JSONDecodeError")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the folder .*none: No such file"):
        read_status(tmp_path / "none")
    result = wsi(tmp_path / "none")
    assert result.exit_code == console.EXIT_USAGE
    assert "error: cannot read the folder" in result.stderr
    assert wsi(tmp_path).stdout.split() == ["0", "slides", "in", str(tmp_path), "nothing", "was", "begun", "yet"]
