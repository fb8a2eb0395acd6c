"""The store: what is complete, what is torn, what differs, and who may write."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from wsi_engine import FeatureStore, TileGrid, TissueMask
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import FeatureError, MismatchError, StoreError
from wsi_engine.slide_record import SlideRecord
from wsi_engine.store import features_key
from wsi_engine.tissue import FilterCount
from wsi_engine.writer import FeatureIdentity, FeatureWriter

RECORD = SlideRecord("a", "f" * 64, (4000, 3000), (0.25, 0.25), "aperio MPP", "aperio", "turbo")
CARD = EncoderCard("net", "timm", "resnet", 224, 5, "mean", "open", weights="random:0", weights_digest="d" * 64)


def make_grid(n: int = 23, mpp: float = 0.5) -> TileGrid:
    origins = np.stack([np.arange(n) * 512, np.zeros(n, int)], axis=1).astype(np.int64)
    return TileGrid(origins, 256, 256, mpp, (512.0, 512.0), n + 7)


def make_writer(
    path: Path, *, grid: TileGrid | None = None, card: EncoderCard = CARD, dtype: str = "float16", batch: int = 4
) -> FeatureWriter:
    store = FeatureStore.create(path, RECORD)
    grid = make_grid() if grid is None else grid
    if store.grid_settings("g") is None:
        store.write_grid("g", grid, {"mpp": 0.5}, None)
    return FeatureWriter(store, FeatureIdentity(card, "g", grid, "fp32", dtype), batch)  # type: ignore[arg-type]


def fill(writer: FeatureWriter, features: np.ndarray, *, finish: bool = True, batches: range | None = None) -> None:
    size = writer.batch_size
    rows = writer.missing_rows()
    rows = rows if batches is None else rows[np.isin(rows // size, batches)]
    for some in np.array_split(rows, 5):  # portions that do not follow the batches
        writer.add(some, features[some])
    if finish:
        writer.finish({"encode": 1.0})


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)


def array_files(path: Path) -> dict[str, bytes]:
    """Every data file of a store; attributes hold times and are left out."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("c/**/*")) if p.is_file()}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_come_back(tmp_path: Path, features: np.ndarray, dtype: str) -> None:
    fill(make_writer(tmp_path / "a.zarr", dtype=dtype), features)
    store = FeatureStore.open(tmp_path / "a.zarr")
    assert store.encoders() == ("net",)
    assert store.features().dtype == dtype
    assert np.array_equal(store.features("net"), features.astype(dtype))
    assert np.array_equal(store.origins(), make_grid().origins)
    assert store.grid().digest == make_grid().digest
    assert store.slide == RECORD
    made = store.provenance("net")
    assert made["encoder"]["weights_digest"] == "d" * 64
    assert made["grid_digest"] == make_grid().digest
    assert made["seconds"] == {"encode": 1.0}
    assert made["complete"] is True


def test_the_array_is_plain_zarr(tmp_path: Path, features: np.ndarray) -> None:
    """Anyone can read it with zarr alone; chunks of 1,024 rows lie in shards, and nothing else is left behind."""
    rows = 3000
    many = np.random.default_rng(1).normal(size=(rows, 5)).astype(np.float32)
    fill(make_writer(tmp_path / "a.zarr", grid=make_grid(rows), batch=512), many)
    array = zarr.open_array(tmp_path / "a.zarr" / "features" / "net" / "values", mode="r")
    assert np.array_equal(array[:], many.astype(np.float16))
    assert array.chunks == (1024, 5)
    assert array.shards == (2048, 5)
    assert sorted(os.listdir(tmp_path / "a.zarr" / "features" / "net")) == ["values", "zarr.json"]


def test_not_complete_is_not_handed_out(tmp_path: Path, features: np.ndarray) -> None:
    fill(make_writer(tmp_path / "a.zarr"), features, finish=False)
    store = FeatureStore.open(tmp_path / "a.zarr")
    assert store.encoders() == ()
    with pytest.raises(StoreError, match="not complete yet"):
        store.features("net")


def test_resumes_where_it_stopped(tmp_path: Path, features: np.ndarray) -> None:
    fill(make_writer(tmp_path / "whole.zarr"), features)
    fill(make_writer(tmp_path / "a.zarr"), features, finish=False, batches=range(3))
    again = make_writer(tmp_path / "a.zarr", batch=7)
    assert again.batch_size == 4  # as begun, so that rows are computed in the same company
    assert again.missing_rows().tolist() == list(range(12, 23))
    fill(again, features)
    assert array_files(tmp_path / "a.zarr") == array_files(tmp_path / "whole.zarr")


def test_torn_batches_are_made_again(tmp_path: Path, features: np.ndarray) -> None:
    fill(make_writer(tmp_path / "a.zarr"), features, finish=False)
    chunks = tmp_path / "a.zarr" / "features" / "net" / "partial" / "c"
    torn = chunks / "1" / "0"
    torn.write_bytes(torn.read_bytes()[:-3])
    rotten = bytearray((chunks / "3" / "0").read_bytes())
    rotten[5] ^= 1
    (chunks / "3" / "0").write_bytes(rotten)
    (chunks / "4" / "0").write_bytes(b"")
    writer = make_writer(tmp_path / "a.zarr")
    assert writer.missing_rows().tolist() == [*range(4, 8), *range(12, 20)]
    fill(writer, features)
    assert np.array_equal(FeatureStore.open(tmp_path / "a.zarr").features(), features.astype(np.float16))


def test_a_kill_while_finishing_costs_nothing(tmp_path: Path, features: np.ndarray) -> None:
    writer = make_writer(tmp_path / "a.zarr")
    fill(writer, features, finish=False)
    store = writer._store
    from wsi_engine.arrays import create_rows

    values = create_rows(store.group("features/net"), "values", 23, 5, "float16")
    values[:7] = 1.0  # half-written, and not marked
    assert FeatureStore.open(tmp_path / "a.zarr").encoders() == ()
    again = make_writer(tmp_path / "a.zarr")
    assert again.missing_rows().tolist() == []
    again.finish({})
    assert np.array_equal(FeatureStore.open(tmp_path / "a.zarr").features(), features.astype(np.float16))


def test_finish_refuses_while_batches_are_missing(tmp_path: Path, features: np.ndarray) -> None:
    writer = make_writer(tmp_path / "a.zarr")
    fill(writer, features, finish=False, batches=range(2))
    with pytest.raises(StoreError, match="missing"):
        writer.finish({})
    assert FeatureStore.open(tmp_path / "a.zarr").encoders() == ()


def test_rotten_features_are_an_error(tmp_path: Path, features: np.ndarray) -> None:
    fill(make_writer(tmp_path / "a.zarr"), features)
    chunk = tmp_path / "a.zarr" / "features" / "net" / "values" / "c" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[11] ^= 4
    chunk.write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        FeatureStore.open(tmp_path / "a.zarr").features()


@pytest.mark.parametrize(
    ("value", "dtype", "match"),
    [
        (np.nan, "float16", "NaN or infinite"),
        (np.inf, "float32", "NaN or infinite"),
        (70_000.0, "float16", "--dtype float32"),
    ],
)
def test_bad_values_name_the_tile(tmp_path: Path, features: np.ndarray, value: float, dtype: str, match: str) -> None:
    writer = make_writer(tmp_path / "a.zarr", dtype=dtype)
    features[6, 2] = value
    with pytest.raises(FeatureError, match=match) as caught:
        fill(writer, features)
    assert "tile 6 at level-0 (3072, 0)" in str(caught.value)
    assert FeatureStore.open(tmp_path / "a.zarr").encoders() == ()


def test_large_values_fit_float32(tmp_path: Path, features: np.ndarray) -> None:
    features[6, 2] = 70_000.0
    fill(make_writer(tmp_path / "a.zarr", dtype="float32"), features)
    assert FeatureStore.open(tmp_path / "a.zarr").features()[6, 2] == 70_000.0


def test_no_tiles_make_a_complete_store(tmp_path: Path) -> None:
    fill(make_writer(tmp_path / "a.zarr", grid=make_grid(0)), np.empty((0, 5), np.float32))
    store = FeatureStore.open(tmp_path / "a.zarr")
    assert store.features("net").shape == (0, 5)
    assert store.origins().shape == (0, 2)


@pytest.mark.parametrize("state", ["partial", "complete"])
@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("weights_digest", {"card": replace(CARD, weights_digest="e" * 64)}),
        ("pooling", {"card": replace(CARD, pooling="cls")}),
        ("grid_digest", {"grid": make_grid(22)}),
        ("dtype", {"dtype": "float32"}),
    ],
)
def test_never_mixes_what_differs(
    tmp_path: Path, features: np.ndarray, state: str, what: str, change: dict[str, object]
) -> None:
    fill(make_writer(tmp_path / "a.zarr"), features, finish=state == "complete", batches=range(6))
    before = array_files(tmp_path / "a.zarr")
    with pytest.raises(MismatchError, match=what) as caught:
        make_writer(tmp_path / "a.zarr", **change)  # type: ignore[arg-type]
    assert "another output folder" in str(caught.value)
    assert array_files(tmp_path / "a.zarr") == before


@pytest.mark.parametrize("change", [{"fingerprint": "0" * 64}, {"dimensions": (1, 1)}, {"mpp": (0.5, 0.5)}])
def test_another_slide_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    FeatureStore.create(tmp_path / "a.zarr", RECORD)
    with pytest.raises(MismatchError, match=next(iter(change))):
        FeatureStore.create(tmp_path / "a.zarr", replace(RECORD, **change))  # type: ignore[arg-type]


def test_another_version_is_refused(tmp_path: Path) -> None:
    FeatureStore.create(tmp_path / "a.zarr", RECORD)
    meta = tmp_path / "a.zarr" / "zarr.json"
    content = json.loads(meta.read_text())
    content["attributes"]["schema_version"] = 99
    meta.write_text(json.dumps(content))
    for use in (FeatureStore.open, lambda path: FeatureStore.create(path, RECORD)):
        with pytest.raises(StoreError, match="schema version 99"):
            use(tmp_path / "a.zarr")


@pytest.mark.parametrize("content", [None, "", "{", '{"zarr_format": 3}', "[]"])
def test_what_is_no_store(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "a.zarr"
    folder.mkdir()
    if content is not None:
        (folder / "zarr.json").write_text(content)
    with pytest.raises(StoreError) as caught:
        FeatureStore.open(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(StoreError, match="no store"):
        FeatureStore.open(tmp_path / "nothing.zarr")


def test_tissue_comes_back(tmp_path: Path) -> None:
    mask = TissueMask(np.random.default_rng(0).random((30, 40)) < 0.5, 8.0, 12.0, (FilterCount("x", 5, 4, 3, 2),))
    store = FeatureStore.create(tmp_path / "a.zarr", RECORD)
    assert store.tissue() is None
    store.write_grid("g", make_grid(), {}, mask)
    back = FeatureStore.open(tmp_path / "a.zarr").tissue()
    assert back is not None
    assert np.array_equal(back.mask, mask.mask)
    assert (back.mpp, back.threshold, back.counts) == (8.0, 12.0, mask.counts)


def test_grids_of_one_store_share_its_tissue(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "a.zarr", RECORD)
    mask = TissueMask(np.ones((3, 4), bool), 8.0)
    store.write_grid("g", make_grid(), {}, mask)
    store.write_grid("h", make_grid(5), {}, mask)
    assert store.grids() == ("g", "h")
    with pytest.raises(MismatchError, match="tissue"):
        store.write_grid("i", make_grid(6), {}, TissueMask(np.zeros((3, 4), bool), 8.0))
    assert store.grids() == ("g", "h")


def test_a_torn_grid_counts_as_none(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "a.zarr", RECORD)
    store.group("tiles/g").create_array("origins", shape=(23, 2), dtype="int64")  # killed before its attributes
    assert store.grids() == ()
    assert store.grid_settings("g") is None
    store.write_grid("g", make_grid(), {}, None)
    assert store.grid().digest == make_grid().digest


def test_names_are_asked_for_when_there_are_several(tmp_path: Path, features: np.ndarray) -> None:
    for name in ("one", "timm:some/two"):
        fill(make_writer(tmp_path / "a.zarr", card=replace(CARD, name=name)), features)
    store = FeatureStore.open(tmp_path / "a.zarr")
    assert features_key("timm:some/two") == "timm_some_two"
    assert store.encoders() == ("one", "timm_some_two")
    assert len(store.features("timm:some/two")) == 23
    with pytest.raises(StoreError, match="name one"):
        store.features()
    with pytest.raises(StoreError, match="not there"):
        store.features("three")
