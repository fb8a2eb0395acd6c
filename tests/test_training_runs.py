"""Training runs: what they leave, that a kill changes nothing, and that a folder takes one run only."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from support_cohort import write_cohort
from support_training import DIM, QUICK, RUN, SMALL, StopsAt, kept_bytes, train

from wsi_engine.cohorts.splits import SplitSettings
from wsi_engine.errors import BusyError, InputError, ModelError, WsiError
from wsi_engine.lease import hold_lease
from wsi_engine.metrics import apply_temperature, youden_threshold
from wsi_engine.models import load_head, read_head_card
from wsi_engine.predictions import PredictionTable
from wsi_engine.runs import DIGESTS, RunFolder
from wsi_engine.training import fold as fold_module
from wsi_engine.training import train_head

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cohort: cohort.csv and features/."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), slides=32, dim=DIM)


@pytest.fixture(scope="module")
def whole(cohort: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(cohort, out)
    return out


def test_a_run_is_all_there(cohort: Path, whole: Path) -> None:
    run = RunFolder(whole)
    record = run.read_record()
    assert record.complete
    assert record.classes == ("basal", "luminal")
    assert record.settings["learning_rate"] == 1e-2
    assert (record.folds, record.head, record.options["k"]) == (2, "clam_sb", 8)
    lines = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    assert [(line["fold"], line["epoch"]) for line in lines] == [(f, e) for f in range(2) for e in range(4)]
    table = PredictionTable.read(run.predictions_file)
    assert sorted(table.slide_ids) == sorted(f"slide-{n:02}" for n in range(32))  # k-fold: each slide once
    assert roc_auc_score(table.labels, table.probabilities[:, 1]) > 0.8
    assert not list(whole.glob("fold-*/state.pt"))
    with open(run.splits_file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert set(rows[0]) == {"slide_id", "patient", "label", "fold-0", "fold-1"}
    for fold in range(2):
        said = {
            name: {row["patient"] for row in rows if row[f"fold-{fold}"] == name} for name in ("train", "val", "test")
        }
        assert not said["train"] & said["test"]
        assert not said["train"] & said["val"]
        tested = {row["slide_id"] for row in rows if row[f"fold-{fold}"] == "test"}
        assert tested == {name for name, own in zip(table.slide_ids, table.folds, strict=True) if own == fold}


def test_a_head_says_what_it_is(whole: Path) -> None:
    run = RunFolder(whole)
    table = PredictionTable.read(run.validation_file)
    for fold in range(2):
        card = read_head_card(run.head_file(fold))
        assert card["features"]["encoder"] == "net"
        assert (card["fold"], card["label"], card["training"]["epochs"]) == (fold, "subtype", 4)
        own = table.folds == fold
        calibrated = apply_temperature(np.log(table.probabilities[own]), card["calibration"]["temperature"])
        assert card["calibration"]["threshold"] == youden_threshold(table.labels[own], calibrated[:, 1])
        assert load_head(run.head_file(fold)).in_dim == DIM


@pytest.mark.parametrize(("epochs", "seconds"), [(1, 0.0), (3, 0.0), (4, 0.0), (6, 0.0), (6, 1e9)])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    cohort: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, seconds: float
) -> None:
    monkeypatch.setattr(fold_module, "SAVE_SECONDS", seconds)  # every epoch is saved, or none
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(cohort, out, progress=StopsAt(epochs))
    assert not RunFolder(out).read_record().complete
    with open(out / "log.jsonl", "a") as stream:
        stream.write('{"fold": 0, "epo')  # torn by the kill
    again = StopsAt(0)
    train(cohort, out, progress=again)
    assert kept_bytes(out) == kept_bytes(whole)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["fold"], line["epoch"]) for line in lines] == [(f, e) for f in range(2) for e in range(4)]
    if seconds == 0.0:
        assert again.epochs == 8 - (epochs - 1)  # the epoch that raised was not saved yet
    if epochs == 6:
        assert ("resumed", 0) in again.told


def test_a_killed_process_is_gone_on_with(cohort: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = f"""
import os, signal, torch
torch.set_num_threads(1)
import wsi_engine.training.fold as fold
from wsi_engine.training import TrainSettings, train_head
from wsi_engine.cohorts.splits import SplitSettings
fold.SAVE_SECONDS = 0.0
class Kills:
    def run_started(self, folds, epochs): pass
    def fold_started(self, fold, slides): pass
    def epoch_finished(self, fold, epoch, train_loss, validation_loss):
        if (fold, epoch) == (1, 2):
            os.kill(os.getpid(), signal.SIGKILL)
    def fold_finished(self, summary, resumed): pass
train_head({str(cohort / "cohort.csv")!r}, {str(cohort / "features")!r}, "subtype", {str(out)!r}, head="clam_sb",
    options={SMALL["clam_sb"]!r}, splits=SplitSettings(folds=2, validation=0.25), settings={RUN!r},
    progress=Kills())
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == -9, done.stderr
    assert (out / "fold-1" / "state.pt").exists()
    told = StopsAt(0)
    train(cohort, out, progress=told)
    assert ("resumed", 0) in told.told
    assert (1, 2) in told.told
    assert (1, 1) not in told.told
    assert kept_bytes(out) == kept_bytes(whole)


def test_a_finished_run_is_not_trained_again(cohort: Path, whole: Path) -> None:
    before = kept_bytes(whole)
    told = StopsAt(1)
    report = train(cohort, whole, progress=told)
    assert told.told == [("run", 2, 4), ("resumed", 0), ("resumed", 1)]
    assert kept_bytes(whole) == before
    assert report.folds[1].epochs == 4
    assert report.folds[0].auroc is not None
    json.dumps(report.to_json(), allow_nan=False)


def test_lost_predictions_are_made_again(cohort: Path, whole: Path) -> None:
    before = kept_bytes(whole)
    (whole / "predictions.csv").write_bytes(before["predictions.csv"][:-40])  # a row of the last fold is torn
    train(cohort, whole)
    assert kept_bytes(whole) == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"settings": replace(RUN, epochs=7)}, r"another setting epochs \(4, now 7\)"),
        ({"head": "clam_mb"}, "another head"),
        ({"options": {"size": (24, 12), "k": 4}}, r"another option k \(8, now 4\)"),
        ({"splits": SplitSettings(folds=3, validation=0.25)}, "another folds"),
        ({"splits": SplitSettings(folds=2, validation=0.25, seed=1)}, r"another splits seed \(0, now 1\)"),
    ],
)
def test_a_folder_takes_one_run_only(cohort: Path, whole: Path, changes: dict[str, Any], match: str) -> None:
    before = kept_bytes(whole)
    with pytest.raises(ModelError, match=match):
        train(cohort, whole, **changes)
    assert kept_bytes(whole) == before


def test_heads_of_unknown_origin_are_not_taken_for_done(cohort: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ModelError, match=r"no run\.json"):
        train(cohort, tmp_path / "run")


def test_threads_that_load_may_change(cohort: Path, whole: Path) -> None:
    before = RunFolder(whole).head_file(0).read_bytes()
    train(cohort, whole, settings=replace(RUN, workers=1))
    assert RunFolder(whole).head_file(0).read_bytes() == before
    assert RunFolder(whole).read_record().complete


def test_another_cohort_is_noticed(cohort: Path, whole: Path, tmp_path: Path) -> None:
    lines = (cohort / "cohort.csv").read_text().splitlines()
    (tmp_path / "cohort.csv").write_text("\n".join(lines[:-2]) + "\n")
    with pytest.raises(ModelError, match=r"splits\.csv differs"):
        train_head(
            tmp_path / "cohort.csv", cohort / "features", "subtype", whole, options=SMALL["clam_sb"],
            splits=SplitSettings(folds=2, validation=0.25), settings=RUN,
        )  # fmt: skip


def test_one_process_at_a_time(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with hold_lease(out / ".run.lease"), pytest.raises(BusyError, match="run is being written by process"):
        train(cohort, out)
    assert not (out / "run.json").exists()


def test_a_damaged_state_is_told(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_module, "SAVE_SECONDS", 0.0)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(cohort, out, progress=StopsAt(3))
    state = out / "fold-0" / "state.pt"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"state\.pt cannot be read .* delete it"):
        train(cohort, out)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"encoder": "uni"}, InputError, "uni"),
        ({"head": "clam"}, ModelError, "no head named"),
        ({"options": {"gates": 3}}, ModelError, "no option 'gates'"),
        ({"settings": replace(QUICK, device="cuda:77")}, WsiError, "cuda:77"),
    ],
)
def test_what_cannot_be_trained_writes_nothing(
    cohort: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        train(cohort, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_features_with_nan_in_a_store_are_one_sentence(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path, slides=12, dim=DIM, broken=3)
    with pytest.raises(WsiError, match="slide-03") as caught:
        train(folder, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_fold_that_is_trained_again_reopens_its_run(cohort: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    run, before = RunFolder(out), RunFolder(whole).read_record()
    assert before.complete
    shutil.rmtree(run.fold(1))
    with pytest.raises(KeyboardInterrupt):
        train(cohort, out, progress=StopsAt(1))
    open_again = run.read_record()
    assert (open_again.complete, open_again.summary) == (False, {})
    assert replace(open_again, complete=True, summary=before.summary) == before
    again = StopsAt(0)
    train(cohort, out, progress=again)
    assert ("resumed", 0) in again.told
    assert ("done", 1) in again.told
    after = run.read_record()
    assert after.complete
    assert after.summary[DIGESTS] == run.digests() == before.summary[DIGESTS]
    assert len(after.summary["folds"]) == 2
