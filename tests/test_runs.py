"""The files of a training run: what is written comes back, what is damaged is refused in a sentence."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_runs import make_origin, make_run

from wsi_engine.classification.ensemble import load_ensemble
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import ModelError, StoreError
from wsi_engine.grid import TileGrid
from wsi_engine.runs import RUN_VERSION, FeatureOrigin, RunFolder, RunRecord
from wsi_engine.slide_record import SlideRecord
from wsi_engine.store import FeatureStore
from wsi_engine.writer import FeatureIdentity, write_features

ORIGIN = FeatureOrigin("net", 4, "d" * 64, "fp32", 0.5, 256, 128)
RECORD = RunRecord(
    "subtype",
    ("a", "b"),
    "clam_sb",
    {"dropout": 0.25, "gated": True},
    5,
    ORIGIN,
    {"seed": 0},
    "1.0",
    True,
    {"auroc": 0.9},
)


def test_a_record_comes_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "deep" / "run")
    run.write_record(RECORD)
    assert run.read_record() == RECORD
    run.write_record(replace(RECORD, complete=False))
    assert run.read_record().complete is False
    assert os.listdir(run.path) == ["run.json"]  # no draft is left


def test_files_have_their_places(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    files = (run.record_file, run.log_file, run.splits_file, run.predictions_file, run.validation_file)
    names = ("run.json", "log.jsonl", "splits.csv", "predictions.csv", "validation.csv")
    assert files == tuple(tmp_path / name for name in names)
    assert run.head_file(3) == tmp_path / "fold-3" / "head.safetensors"
    assert run.state_file(3) == tmp_path / "fold-3" / "state.pt"


def damage(value: dict[str, Any], how: str) -> Any:
    if how == "no version":
        del value["version"]
    elif how == "no features":
        del value["features"]
    elif how == "a field too many":
        value["colour"] = "red"
    elif how == "features damaged":
        value["features"] = {"encoder": "net"}
    elif how.endswith(" as a list"):
        value[how.removesuffix(" as a list")] = []
    elif how == "no options":
        value["options"] = None
    return [value] if how == "a list" else value


@pytest.mark.parametrize(
    "how",
    [
        "no version", "no features", "a field too many", "features damaged", "a list", "settings as a list",
        "summary as a list", "no options",
    ],
)  # fmt: skip
def test_a_damaged_record(tmp_path: Path, how: str) -> None:
    run = RunFolder(tmp_path)
    run.write_record(RECORD)
    run.record_file.write_text(json.dumps(damage(json.loads(run.record_file.read_text()), how)))
    with pytest.raises(ModelError, match=r"run.json cannot be read \(.*\): train again"):
        run.read_record()


def test_a_torn_record(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_record(RECORD)
    whole = run.record_file.read_bytes()
    for size in range(0, len(whole) - 2, 37):
        run.record_file.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="train again"):
            run.read_record()
    run.record_file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="train again"):
        run.read_record()


def test_a_record_of_another_version(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_record(replace(RECORD, version=RUN_VERSION + 1))
    with pytest.raises(ModelError, match=rf"has version {RUN_VERSION + 1} and this engine reads {RUN_VERSION}: use"):
        run.read_record()


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a training run: it has no run.json; give a folder of wsi train"):
        RunFolder(tmp_path).read_record()
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be read"):
        RunFolder(tmp_path / "file").read_record()


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.record_file.mkdir()
    with pytest.raises(ModelError, match=r"cannot write .*run.json: Is a directory"):
        run.write_record(RECORD)
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot write"):
        RunFolder(tmp_path / "file").write_record(RECORD)


@pytest.mark.parametrize("value", [float("nan"), Path("x")])
def test_a_summary_that_is_not_plain(tmp_path: Path, value: object) -> None:
    with pytest.raises(ModelError, match="cannot write"):
        RunFolder(tmp_path).write_record(replace(RECORD, summary={"auroc": value}))


def test_an_origin_is_that_of_the_store(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "s.zarr", SlideRecord("s", "f", (9, 9), (0.25, 0.25), "x", "x", "turbo"))
    grid = TileGrid(np.zeros((3, 2), np.int64), 256, 128, 0.5, (512.0, 512.0), 3)
    store.write_grid("g", grid, {}, None)
    with pytest.raises(StoreError, match="0 encoders"):
        FeatureOrigin.of(store)
    card = EncoderCard("net", "timm", "resnet", 224, 4, "mean", "open", weights_digest="d" * 64)
    write_features(store, FeatureIdentity(card, "g", grid, "fp32", "float16"), np.zeros((3, 4), np.float16), {})
    assert FeatureOrigin.of(store) == FeatureOrigin.of(store, "net") == ORIGIN
    assert FeatureOrigin(**json.loads(json.dumps(asdict(ORIGIN)))) == ORIGIN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"encoder": "other"},
            r"^here holds features of other \(4 numbers per tile\) and the model takes those of net",
        ),
        ({"dim": 8}, r"features of net \(8 numbers per tile\) and the model takes those of net \(4\): extract with"),
        (
            {"weights_digest": "e" * 64},
            r"other weights of net \(digest eeeeeeeeeeee…\) .* trained on \(dddddddddddd…\)",
        ),
        ({"mpp": 0.25}, r"^the tiles of here are 256 px at 0.25 mpp and the model takes 256 px at 0.5 mpp"),
        ({"tile_px": 512}, "are 512 px at 0.5 mpp"),
    ],
)
def test_other_features_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ORIGIN.check(replace(ORIGIN, **change), "here")


@pytest.mark.parametrize("change", [{}, {"precision": "bf16"}, {"stride_px": 256}])
def test_what_may_differ(change: dict[str, Any]) -> None:
    other = replace(ORIGIN, **change)
    assert (other == ORIGIN) is not bool(change)
    said = []
    for one, another in ((ORIGIN, other), (other, ORIGIN), (other, replace(other, dim=8))):
        try:
            one.check(another, "here")
        except ModelError as error:
            said.append(str(error))
    assert len(said) == 1  # of the last pair alone
    assert "8 numbers per tile" in said[0]


def test_the_digest_of_the_heads_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    run = RunFolder(make_run(tmp_path / "run", make_origin(8), "mean", temperatures=(1.0, 2.0)))
    digest = run.model_digest(2)
    assert digest == load_ensemble(run.path, device="cpu").digest
    assert digest != run.model_digest(1) == load_ensemble(run.head_file(0), device="cpu").digest
    run.head_file(1).write_bytes(run.head_file(0).read_bytes())
    assert run.model_digest(2) != digest
    with pytest.raises(ModelError, match=r"cannot read .*fold-2/head\.safetensors: No such file"):
        run.model_digest(3)
