"""``wsi check``: what is whole is said to be, and whatever is spoilt is named with what to do about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support_cohort import write_cohort
from support_nuclei import make_nuclei
from support_runs import make_origin, make_run
from typer.testing import CliRunner, Result

from wsi_engine import FeatureStore, TissueMask, check_stores
from wsi_engine.cli.app import app
from wsi_engine.errors import InputError, StoreError
from wsi_engine.lease import hold_lease
from wsi_engine.nuclei.keeping import read_nuclei, write_nuclei
from wsi_engine.predictions import PredictionTable
from wsi_engine.runs import DIGESTS, RunFolder
from wsi_engine.tissue import FilterCount

STORE = "slide-00.zarr"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stores, the first with tissue, a second grid, attention and nuclei; and a finished run."""
    root = write_cohort(tmp_path_factory.mktemp("pristine"), 3, 8)
    store = FeatureStore.create(root / "features" / STORE, FeatureStore.open(root / "features" / STORE).slide)
    mask = np.zeros((1500, 40), bool)
    mask[10:30, 5:9] = True  # the second chunk holds no tissue
    store.write_grid("h", store.grid("g"), {"mpp": 0.5}, TissueMask(mask, 8.0, 0.1, (FilterCount("a", 9, 8, 2, 1),)))
    rows = len(store.origins("g"))
    made = store.provenance("net")
    store.write_attention("run", np.zeros((rows, 1), np.float32), {"grid": "g", "grid_digest": made["grid_digest"]})
    write_nuclei(store, make_nuclei(50))
    run = RunFolder(make_run(root / "run", make_origin(8)))
    table = PredictionTable(
        ("benign", "tumour"), ("a", "b"), ("p", "q"), np.array([0, 1]), np.array([0, 1]), np.full((2, 2), 0.5)
    )
    for path in (run.predictions_file, run.validation_file):
        table.write(path)
    run.splits_file.write_text("slide_id,patient,label\n")
    run.write_record(replace(run.read_record(), summary={DIGESTS: run.digests()}))
    return root


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "place")
    return tmp_path / "place"


def wsi(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def test_what_is_whole_is_said_to_be(place: Path) -> None:
    report = check_stores(place)
    assert report.findings == ()
    assert (report.stores, report.runs) == (3, 1)
    assert report.files > 25
    result = wsi(place)
    assert result.exit_code == 0
    assert "3 stores and 1 run, " in result.stdout
    assert "0 damaged" in result.stdout


def flip(path: Path) -> None:
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DATA = [
    ("tissue/mask/c/0/0", "wsi extract"),
    ("tissue/mask/c/1/0", "wsi extract"),
    ("tiles/g/origins/c/0/0", "wsi extract"),
    ("features/net/values/c/0/0", "wsi extract"),
    ("attention/run/values/c/0/0", "wsi classify"),
    ("nuclei/squares/offsets/c/0", "wsi nuclei"),
    ("nuclei/squares/points/c/0/0", "wsi nuclei"),
    ("nuclei/squares/score/c/0", "wsi nuclei"),
]


@pytest.mark.parametrize("spoil", [flip, cut, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize(("name", "command"), DATA)
def test_a_spoilt_chunk_is_named(place: Path, name: str, command: str, spoil: Callable[[Path], None]) -> None:
    path = place / "features" / STORE / name
    spoil(path)
    report = check_stores(place / "features")
    assert str(path) in [finding.path for finding in report.damaged]
    assert all(command in finding.cure for finding in report.damaged if finding.path == str(path))
    result = wsi(place / "features", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["findings"][0]["kind"] == "damaged"


@pytest.mark.parametrize(
    "name",
    ["", "tissue/mask/", "tiles/g/origins/", "features/net/values/", "attention/run/values/", "nuclei/squares/score/"],
)
def test_spoilt_metadata_are_named(place: Path, name: str) -> None:
    path = place / "features" / STORE / name / "zarr.json"
    path.write_text(path.read_text()[:-20])
    damaged = {finding.path: finding.cure for finding in check_stores(place / "features" / STORE).damaged}
    assert "delete" in damaged[str(path.parent)]


def test_missing_files_are_never_zeros(place: Path) -> None:
    """What Zarr would fill in for them is not handed out as features."""
    (place / "features" / STORE / "features/net/values/c/0/0").unlink()
    with pytest.raises(StoreError, match="tile 0 is missing"):
        FeatureStore.open(place / "features" / STORE).features("net")


def test_columns_of_other_nuclei_are_noticed(place: Path) -> None:
    store = place / "features" / STORE
    shutil.copytree(place / "features" / "slide-01.zarr", place / "other.zarr")
    other = FeatureStore.create(place / "other.zarr", FeatureStore.open(place / "other.zarr").slide)
    write_nuclei(other, make_nuclei(50, across=7))
    shutil.rmtree(store / "nuclei/squares/points")
    shutil.copytree(place / "other.zarr/nuclei/squares/points", store / "nuclei/squares/points")
    assert check_stores(store).findings == ()  # as many points: nothing tells
    write_nuclei(other, make_nuclei(49))
    shutil.rmtree(store / "nuclei/squares/points")
    shutil.copytree(place / "other.zarr/nuclei/squares/points", store / "nuclei/squares/points")
    assert "do not fit" in check_stores(store).damaged[0].what


def test_features_of_another_grid_are_noticed(place: Path) -> None:
    values = place / "features" / STORE / "features/net/values/zarr.json"
    said = json.loads(values.read_text())
    said["attributes"]["grid_digest"] = "0" * 64
    values.write_text(json.dumps(said))
    assert "other tiles" in check_stores(place).damaged[0].what


def test_deleting_what_is_named_is_the_cure(place: Path) -> None:
    store = place / "features" / STORE
    flip(store / "nuclei/squares/score/c/0")
    (finding,) = check_stores(store).damaged
    with pytest.raises(StoreError):
        read_nuclei(FeatureStore.open(store))
    assert finding.cure == f"delete {store / 'nuclei/squares'} and run wsi nuclei again"
    shutil.rmtree(store / "nuclei/squares")
    assert check_stores(store).findings == ()
    write_nuclei(FeatureStore.create(store, FeatureStore.open(store).slide), make_nuclei(50))
    assert len(read_nuclei(FeatureStore.open(store))) == 50


def test_what_is_not_finished_is_no_damage(place: Path) -> None:
    store = place / "features" / STORE
    for name in ("features/net/values", "attention/run/values", "nuclei/squares"):
        meta = store / name / "zarr.json"
        said = json.loads(meta.read_text())
        del said["attributes"]["complete"]
        meta.write_text(json.dumps(said))
    report = check_stores(store)
    assert [finding.kind for finding in report.findings] == ["unfinished"] * 3
    assert all("again" in finding.cure for finding in report.findings)
    assert wsi(store).exit_code == 0
    (place / "features" / "new.zarr").mkdir()
    (place / "features" / "new.zarr" / "zarr.0123456789abcdef0123456789abcdef.partial").touch()
    assert [one.kind for one in check_stores(place / "features" / "new.zarr").findings] == ["unfinished"]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("run.json", cut),
        ("fold-1/head.safetensors", cut),
        ("fold-1/head.safetensors", flip),
        ("fold-2/head.safetensors", Path.unlink),
        ("predictions.csv", Path.unlink),
        ("validation.csv", cut),
        ("splits.csv", cut),
    ],
)
def test_spoilt_runs_are_named(place: Path, name: str, spoil: Callable[[Path], None]) -> None:
    spoil(place / "run" / name)
    report = check_stores(place)
    assert [finding.path for finding in report.damaged] == [str(place / "run" / name)]
    assert wsi(place / "run").exit_code == 1


def test_runs_that_are_not_finished(place: Path) -> None:
    run = RunFolder(place / "run")
    run.write_record(replace(run.read_record(), complete=False))
    run.head_file(2).unlink()
    run.state_file(1).write_bytes(b"torn")
    report = check_stores(run.path)
    assert ("2 of 3 folds" in report.of("unfinished")[0].what, len(report.of("unfinished"))) == (True, 1)
    assert [finding.path for finding in report.damaged] == [str(run.state_file(1))]
    assert "begins anew" in report.damaged[0].cure


def test_leftovers_of_killed_processes(place: Path) -> None:
    folder = place / "features"
    code = (
        "import os, pathlib, sys; from wsi_engine.lease import hold_lease\n"
        "with hold_lease(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / ".slide-01.lease")], check=False)
    (folder / ".foreign.lease").write_text(
        json.dumps({"host": "far", "place": "x", "pid": 1, "started": "1", "token": "t"})
    )
    for name in (".cohort.csv.123", ".write-test-9", f".a.lease.{'0' * 32}.end", f".run-{'0' * 32}"):
        (folder / name).touch()
    (folder / STORE / "features/net/values/c/0/0.0123456789abcdef0123456789abcdef.partial").touch()
    (folder / "slide-01.zarr" / "features/net/partial").mkdir()
    (folder / ".slide-02.abcdef01.failed.json").write_text("{}")  # why it failed: no leftover
    report = check_stores(place)
    assert report.damaged == ()
    assert len(report.of("leftover")) == len(report.findings) == 8
    said = {Path(finding.path).name: finding.what for finding in report.findings}
    assert "which ended" in said[".slide-01.lease"]
    assert "process 1 on far" in said[".foreign.lease"]
    assert wsi(place).exit_code == 0


def test_a_store_that_is_being_written_is_left_alone(place: Path) -> None:
    flip(place / "features" / STORE / "features/net/values/c/0/0")
    with hold_lease(place / "features" / ".slide-00.lease"):
        report = check_stores(place)
    assert [(one.kind, one.path) for one in report.findings] == [("running", str(place / "features" / STORE))]
    assert f"process {os.getpid()}" in report.findings[0].what
    assert len(check_stores(place).damaged) == 1


def test_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither stores nor training runs"):
        check_stores(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        check_stores([tmp_path / "nowhere"])
    assert wsi(tmp_path).exit_code == 2
