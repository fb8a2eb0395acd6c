"""AnnData: the layout as its specification has it, round trips that lose nothing, and folders that mean harm."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support_formats import assert_same_store, make_full_store, make_store

from wsi_engine import FeatureStore
from wsi_engine.errors import FormatError, InputError, StoreError
from wsi_engine.formats.anndata import export_anndata, import_anndata

TABLE = "slide_id,prediction,prob_a/x,prob_b\nother,b,0.5,0.5\ns1,b,0.25,0.75\n"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_full_store(tmp_path_factory.mktemp("full") / "s1.zarr")


@pytest.fixture
def exported(full: FeatureStore, tmp_path: Path) -> Path:
    return export_anndata(full, tmp_path / "anndata").features


def metadata(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((path / "zarr.json").read_text())
    return value


def encoding(path: Path) -> tuple[str, str]:
    attributes = metadata(path)["attributes"]
    return attributes["encoding-type"], attributes["encoding-version"]


def test_layout_is_that_of_the_specification(full: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text(TABLE)
    path = export_anndata(full, tmp_path / "out", predictions=tmp_path / "predictions.csv").features
    assert path == tmp_path / "out/s1.zarr"
    assert encoding(path) == ("anndata", "0.1.0")
    members = {entry.parent.name for entry in path.glob("*/zarr.json")}
    assert members == {"X", "obs", "var", "obsm", "uns", "layers", "obsp", "varm", "varp"}
    for name in ("uns", "obsm", "layers", "obsp", "varm", "varp", "uns/spatialdata_attrs", "uns/wsi_engine"):
        assert encoding(path / name) == ("dict", "0.1.0")
    for name in ("X", "obsm/spatial", "obs/x", "obs/attention_one", "obs/library_id/codes", "obs/prob_b"):
        assert encoding(path / name) == ("array", "0.2.0")
    for name in ("obs/_index", "var/_index", "obs/library_id/categories"):
        assert encoding(path / name) == ("string-array", "0.2.0")
        assert metadata(path / name)["data_type"] == "string"
    assert encoding(path / "uns/wsi_engine/record") == ("string", "0.2.0")
    assert encoding(path / "obs/library_id") == ("categorical", "0.2.0")
    assert encoding(path / "obs") == encoding(path / "var") == ("dataframe", "0.2.0")
    order = metadata(path / "obs")["attributes"]["column-order"]
    assert order == [
        "tile_id", "library_id", "x", "y", "attention_one", "attention_two_normal", "attention_two_tumour_other",
        "prediction", "prob_a_x", "prob_b",
    ]  # fmt: skip
    assert {entry.parent.name for entry in (path / "obs").glob("*/zarr.json")} == {"_index", *order}
    group = zarr.open_group(path, mode="r")
    assert group["X"][:].tobytes() == full.features().tobytes()
    assert np.array_equal(group["obsm/spatial"][:], full.origins() + 256 * 0.5 / 0.2527 / 2)
    assert np.array_equal(group["obs/attention_two_normal"][:], full.attention("two")[:, 0])
    assert group["obs/_index"][:].tolist() == [str(n) for n in range(9)]
    assert group["obs/prob_a_x"][:].tolist() == [0.25] * 9
    assert group["obs/prediction/categories"][:].tolist() == ["b"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("n", [0, 1, 5000])
def test_round_trip_is_bit_equal(tmp_path: Path, dtype: str, n: int) -> None:
    store = make_store(tmp_path / "s1.zarr", dtype, n)
    path = export_anndata(store, tmp_path / "out").features
    (back,) = import_anndata(path, tmp_path / "back")
    assert back == tmp_path / "back/s1.zarr"
    assert_same_store(FeatureStore.open(back), store)
    assert import_anndata(tmp_path / "out", tmp_path / "back") == [back]  # again, and as a folder of folders


def test_round_trip_of_attention(full: FeatureStore, exported: Path, tmp_path: Path) -> None:
    (back,) = import_anndata(exported, tmp_path / "back")
    assert_same_store(FeatureStore.open(back), full)


def test_rows_may_be_left_out_and_moved(full: FeatureStore, exported: Path, tmp_path: Path) -> None:
    rows = np.array([7, 2, 5])
    group = zarr.open_group(exported, mode="r+")
    for name in ("X", "obs/x", "obs/y", "obs/attention_one"):
        array = group[name]
        values, attributes = array[:][rows], dict(array.attrs)
        group.create_array(name, data=values, overwrite=True, attributes=attributes)
    shutil.rmtree(exported / "obs/attention_two_normal")
    text = json.loads(str(group["uns/wsi_engine/record"][...]))
    del text["attention"]["two"]
    group["uns/wsi_engine/record"][...] = np.array(json.dumps(text), dtype=object)
    (path,) = import_anndata(exported, tmp_path / "back")
    back = FeatureStore.open(path)
    assert back.features().tobytes() == full.features()[rows].tobytes()
    assert np.array_equal(back.origins(), full.origins()[rows])
    assert np.array_equal(back.attention("one"), full.attention("one")[rows])
    assert back.attention_record("one")["grid_digest"] == back.grid().digest != full.grid().digest


def test_nothing_is_overwritten_unasked(full: FeatureStore, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="--overwrite"):
        export_anndata(full, tmp_path / "anndata")
    (exported / "obs/x/zarr.json").unlink()
    export_anndata(full, tmp_path / "anndata", overwrite=True)
    assert (exported / "obs/x/zarr.json").exists()
    assert [entry.name for entry in (tmp_path / "anndata").iterdir()] == ["s1.zarr"]


def test_a_store_is_never_replaced_by_its_export(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s1.zarr")
    before = store.features()
    with pytest.raises(FormatError, match="something else"):
        export_anndata(store, tmp_path, overwrite=True)
    assert np.array_equal(FeatureStore.open(tmp_path / "s1.zarr").features(), before)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/s1.zarr").symlink_to(tmp_path / "s1.zarr")
    with pytest.raises(FormatError, match="something else"):
        export_anndata(store, tmp_path / "out", overwrite=True)


def test_what_is_not_there_cannot_be_exported(full: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not there"):
        export_anndata(full, tmp_path / "out", "resnet50")
    (tmp_path / "bad.csv").write_text("slide_id,prediction\ns1,a\n")
    with pytest.raises(InputError, match="prob_"):
        export_anndata(full, tmp_path / "out", predictions=tmp_path / "bad.csv")
    assert not (tmp_path / "out").exists()


def test_slides_without_a_prediction_get_no_columns(full: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(TABLE.replace("s1", "s2"))
    path = export_anndata(full, tmp_path / "out", predictions=tmp_path / "p.csv").features
    assert not (path / "obs/prediction").exists()


def test_classes_that_differ_in_signs_alone_are_numbered(full: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("slide_id,prediction,prob_a b,prob_a/b\ns1,a b,0.75,0.25\n")
    path = export_anndata(full, tmp_path / "out", predictions=tmp_path / "p.csv").features
    group = zarr.open_group(path, mode="r")
    assert [name for name in metadata(path / "obs")["attributes"]["column-order"] if name.startswith("prob_")] == [
        "prob_0", "prob_1",
    ]  # fmt: skip
    assert (group["obs/prob_0"][0], group["obs/prob_1"][0]) == (0.75, 0.25)
    assert group["obs/prediction/categories"][:].tolist() == ["a b"]


def test_what_was_there_stays_where_nothing_can_take_its_place(
    full: FeatureStore, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (exported / "mine").write_text("kept")
    moves: list[str] = []
    move = os.replace

    def refuse_the_second(source: Any, target: Any) -> None:
        if Path(source).parent == exported.parent:
            moves.append(Path(target).name)
            if len(moves) == 2:
                raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(os, "replace", refuse_the_second)
    with pytest.raises(FormatError, match=r"cannot write .*s1\.zarr: No space left on device"):
        export_anndata(full, tmp_path / "anndata", overwrite=True)
    assert moves[1:] == ["s1.zarr", "s1.zarr"]  # refused, and put back
    assert (exported / "mine").read_text() == "kept"
    assert [entry.name for entry in (tmp_path / "anndata").iterdir()] == ["s1.zarr"]


def edit(path: Path, **changes: Any) -> None:
    (path / "zarr.json").write_text(json.dumps(metadata(path) | changes))


def edit_record(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    array = zarr.open_group(path, mode="r+")["uns/wsi_engine/record"]
    value = json.loads(str(array[...]))
    change(value)
    array[...] = np.array(json.dumps(value), dtype=object)


HARM: dict[str, Callable[[Path], object]] = {
    "no X": lambda path: shutil.rmtree(path / "X"),
    "X is sparse": lambda path: (shutil.rmtree(path / "X"), zarr.open_group(path, mode="r+").create_group("X")),
    "X of absurd shape": lambda path: edit(path / "X", shape=[1 << 40, 1 << 20]),
    "X of many rows": lambda path: edit(path / "X", shape=[1 << 50, 6]),
    "chunks of absurd size": lambda path: edit(
        path / "X", chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1 << 40, 1 << 20]}}
    ),
    "an unknown codec": lambda path: edit(path / "X", codecs=[{"name": "numcodecs.pickle", "configuration": {}}]),
    "no JSON": lambda path: (path / "X/zarr.json").write_text("{"),
    "deep JSON": lambda path: (path / "X/zarr.json").write_text("[" * 100_000),
    "a list": lambda path: (path / "zarr.json").write_text("[]"),
    "another kind": lambda path: edit(path, attributes={"encoding-type": "dict"}),
    "a rotten chunk": lambda path: (path / "X/c/0/0").write_bytes(os.urandom(50)),
    "a chunk that is a pipe": lambda path: ((path / "X/c/0/0").unlink(), os.mkfifo(path / "X/c/0/0")),
    "a chunk elsewhere": lambda path: ((path / "X/c/0/0").unlink(), (path / "X/c/0/0").symlink_to("/etc/hostname")),
    "a folder elsewhere": lambda path: (shutil.rmtree(path / "obsm"), (path / "obsm").symlink_to("/etc")),
    "a slide that climbs": lambda path: edit_record(path, lambda v: v["slide"].update(name="../../escaped")),
    "a grid that climbs": lambda path: edit_record(path, lambda v: v.update(grid_name="../../escaped")),
    "a grid of nothing": lambda path: edit_record(path, lambda v: v["grid"].update(tile_px=0)),
    "a run that climbs": lambda path: edit_record(
        path, lambda v: v["attention"].update({"../../x": v["attention"].pop("one")})
    ),
    "an encoder that is a number": lambda path: edit_record(path, lambda v: v["provenance"]["encoder"].update(name=3)),
    "an encoder of other size": lambda path: edit_record(path, lambda v: v["provenance"]["encoder"].update(dim=7)),
    "a scale of NaN": lambda path: edit_record(path, lambda v: v["slide"].update(mpp=[float("nan")] * 2)),
    "a version of tomorrow": lambda path: edit_record(path, lambda v: v.update(version=99)),
    "no provenance": lambda path: edit_record(path, lambda v: v.pop("provenance")),
    "no record": lambda path: shutil.rmtree(path / "uns/wsi_engine"),
}


@pytest.mark.parametrize("harm", HARM)
def test_folders_that_mean_harm(exported: Path, tmp_path: Path, harm: str) -> None:
    HARM[harm](exported)
    with pytest.raises((FormatError, StoreError)) as caught:
        import_anndata(exported, tmp_path / "in/back")
    assert "\n" not in str(caught.value)
    outside = {entry.name for entry in tmp_path.iterdir()}
    assert outside <= {"anndata", "in"}, outside


def test_a_format_2_array_that_would_unpickle(exported: Path, tmp_path: Path) -> None:
    shutil.rmtree(exported / "X")
    (exported / "X").mkdir()
    array = {"zarr_format": 2, "shape": [9], "chunks": [9], "dtype": "|O", "compressor": None, "fill_value": None,
             "order": "C", "filters": [{"id": "pickle"}]}  # fmt: skip
    (exported / "X/.zarray").write_text(json.dumps(array))
    with pytest.raises(FormatError, match="codec pickle"):
        import_anndata(exported, tmp_path / "back")


def test_folders_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no"):
        import_anndata(tmp_path, tmp_path / "back")
    make_store(tmp_path / "s1.zarr")
    with pytest.raises(FormatError, match="not an AnnData group"):
        import_anndata(tmp_path, tmp_path / "back")


def test_anndata_itself_reads_and_writes_it(full: FeatureStore, exported: Path, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata", reason="anndata is not installed")
    table = anndata.read_zarr(exported)
    assert table.shape == (9, 6)
    assert table.X.dtype == np.float16
    assert table.X.tobytes() == full.features().tobytes()
    assert table.obs_names.tolist() == [str(n) for n in range(9)]
    assert table.obs["library_id"].cat.categories.tolist() == ["tiles"]
    assert np.array_equal(table.obs[["x", "y"]].to_numpy(), full.origins())
    assert np.array_equal(table.obs["attention_one"].to_numpy(), full.attention("one")[:, 0])
    assert table.uns["spatialdata_attrs"] == {
        "region": "tiles", "region_key": "library_id", "instance_key": "tile_id"
    }  # fmt: skip
    assert np.array_equal(table.obsm["spatial"], full.origins() + 256 * 0.5 / 0.2527 / 2)
    for number in (2, 3):
        with anndata.settings.override(zarr_write_format=number):
            table.write_zarr(tmp_path / f"format{number}.zarr")
        (path,) = import_anndata(tmp_path / f"format{number}.zarr", tmp_path / f"back{number}")
        assert_same_store(FeatureStore.open(path), full)
