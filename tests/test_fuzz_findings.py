"""What fuzzing found, one input each: pipes and devices in stores, sizes that nothing holds, names that climb."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from support_formats import make_full_store
from support_runs import make_origin, make_run

from wsi_engine import FeatureStore, open_slide
from wsi_engine.bags import StoredBags
from wsi_engine.classification.ensemble import load_ensemble
from wsi_engine.cohorts.inventory import survey_store
from wsi_engine.errors import ModelError, SlideError, StoreError, WsiError
from wsi_engine.extents import check_extent, read_json, walk_plain_files
from wsi_engine.formats.trident import export_trident
from wsi_engine.models import create_head, load_head
from wsi_engine.models.heads.errors import CheckpointError
from wsi_engine.models.nuclei_net import NucleiNet, NucleiNetError, NucleiNetSettings, load_nuclei_net, save_nuclei_net
from wsi_engine.nuclei.keeping import read_nuclei
from wsi_engine.runs import RunFolder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "s1.zarr"
    make_full_store(path)
    return path


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "s1.zarr"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((path / "zarr.json").read_text())
    change(value)
    (path / "zarr.json").write_text(json.dumps(value))


READS: dict[str, Callable[[Path], object]] = {
    "features/uni/values": lambda path: FeatureStore.open(path).features("uni"),
    "tiles/256px_0.5mpp_stride192/origins": lambda path: FeatureStore.open(path).origins(),
    "attention/one/values": lambda path: FeatureStore.open(path).attention("one"),
    "nuclei/squares/points": lambda path: read_nuclei(FeatureStore.open(path)),
}


@pytest.mark.parametrize("node", READS)
@pytest.mark.parametrize("name", ["zarr.json", "c/0/0"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link out", "link in a circle"])
def test_files_that_are_none(store: Path, node: str, name: str, kind: str) -> None:
    path = store / node / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "link out": "/etc/hostname", "link in a circle": path.name}[kind])
    with pytest.raises(StoreError):
        READS[node](store)


def test_a_pipe_at_the_top_of_a_store(store: Path) -> None:
    (store / "zarr.json").unlink()
    os.mkfifo(store / "zarr.json")
    with pytest.raises(StoreError, match="no plain file"):
        FeatureStore.open(store)
    assert "no plain file" in survey_store(store).fault


@pytest.mark.parametrize("node", READS)
@pytest.mark.parametrize("shape", [[1 << 45, 2], [1 << 30, 1 << 30], [-1, 2], ["x", 2], [10**30, 6]])
def test_sizes_that_nothing_holds(store: Path, node: str, shape: list[Any]) -> None:
    edit(store / node, lambda value: value.update(shape=shape))
    with pytest.raises(StoreError):
        READS[node](store)


def test_bags_of_a_size_that_nothing_holds(store: Path) -> None:
    edit(store / "features/uni/values", lambda value: value.update(shape=[1 << 45, 6]))
    with pytest.raises(WsiError):
        StoredBags([store], "uni").load(0)


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "", ".", "..", "x\x00y"])
def test_names_that_climb(store: Path, tmp_path: Path, name: str) -> None:
    edit(store, lambda value: value["attributes"]["slide"].update(name=name))
    with pytest.raises(WsiError, match="cannot name a store"):
        export_trident(FeatureStore.open(store), tmp_path / "in/out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["s1.zarr"]


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "[]", "{}", '{"zarr_format": 3, "attributes": 7}'])
def test_json_that_is_no_store(store: Path, text: str) -> None:
    (store / "zarr.json").write_text(text)
    with pytest.raises(StoreError):
        FeatureStore.open(store)
    assert survey_store(store).fault


def test_contours_outside_of_the_points(store: Path) -> None:
    group = FeatureStore.create(store, FeatureStore.open(store).slide).group("nuclei/squares")
    group["offsets"][3] = 10**9
    with pytest.raises(StoreError, match="outside of the points"):
        read_nuclei(FeatureStore.open(store))


@pytest.mark.parametrize(
    "changes", [{"folds": []}, {"folds": 10**12}, {"folds": -1}, {"classes": "ab"}, {"classes": [1, 2]}]
)
def test_records_of_runs_that_cannot_be(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", make_origin(8), "mean", temperatures=(1.0,))
    record = run / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))
    with pytest.raises(ModelError, match=r"run\.json"):
        RunFolder(run).read_record()


def test_a_record_nested_beyond_sense(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_origin(8), "mean", temperatures=(1.0,))
    (run / "run.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="nested"):
        load_ensemble(run, device="cpu")


def test_tensors_that_declare_more_than_they_hold(tmp_path: Path) -> None:
    state = create_head("clam_sb", 8, 2).state_dict()
    state["attention_net.0.weight"] = torch.zeros(1).expand(512, 1 << 40)
    torch.save(state, tmp_path / "head.pt")
    assert (tmp_path / "head.pt").stat().st_size < 4_000_000
    with pytest.raises(CheckpointError, match="holds fewer"):
        load_head(tmp_path / "head.pt")


def test_a_network_larger_than_its_file(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_nuclei_net(NucleiNet(NucleiNetSettings((4, 8))), path, 0.5)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    (key,) = header["__metadata__"]
    header["__metadata__"][key] = json.dumps(json.loads(header["__metadata__"][key]) | {"widths": [1 << 30, 8]})
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(NucleiNetError, match="widths"):
        load_nuclei_net(path)


@pytest.mark.parametrize("reader", ["auto", "turbo", "openslide", "tiffslide", "image"])
@pytest.mark.parametrize("tag", ["ImageWidth", "ImageLength"])
def test_levels_without_pixels(tmp_path: Path, reader: str, tag: str) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", rowsperstrip=16)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages.first.tags[tag].overwrite(0)
    with pytest.raises(SlideError):
        open_slide(path, reader=reader)


def test_what_a_folder_can_hold(tmp_path: Path) -> None:
    folder = tmp_path / "array"
    (folder / "c").mkdir(parents=True)
    (folder / "c/0").write_bytes(b"x")
    check_extent(folder, (1 << 20, 4), 4, (1 << 20, 4))
    check_extent(folder, (0, 6), 2, (1024, 6))
    check_extent(folder, (), 8, ())
    for shape, chunk in (((1 << 40, 4), (1 << 20, 4)), ((10, 4), (1 << 40, 4)), ((10, 4), (0, 4)), ((-1,), (1,))):
        with pytest.raises(ValueError, match="array"):
            check_extent(folder, shape, 4, chunk)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")
    (folder / "inside").symlink_to("c/0")
    assert sorted(path.name for path in walk_plain_files(folder)) == ["0", "inside"]
    (folder / "folder").symlink_to("c")
    with pytest.raises(ValueError, match="link to a folder"):
        list(walk_plain_files(folder))
