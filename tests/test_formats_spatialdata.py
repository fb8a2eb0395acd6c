"""SpatialData: shapes in Parquet, tables of AnnData, LazySlide's folders, and round trips that lose nothing."""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support_formats import assert_same_store, make_full_store, make_store

from wsi_engine import FeatureStore
from wsi_engine.errors import FormatError
from wsi_engine.formats.elements import write_frame, write_mapping
from wsi_engine.nuclei.keeping import read_nuclei

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from wsi_engine.formats.polygons import frame_tiles, read_polygons, write_polygons
from wsi_engine.formats.spatialdata import export_spatialdata, import_spatialdata

OPTIONAL = "spatialdata is not installed"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_full_store(tmp_path_factory.mktemp("full") / "s1.zarr")


@pytest.fixture
def exported(full: FeatureStore, tmp_path: Path) -> Path:
    return export_spatialdata(full, tmp_path / "sd").features


def attributes(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((path / "zarr.json").read_text())["attributes"]
    return value


def assert_same_nuclei(back: FeatureStore, store: FeatureStore) -> None:
    found, known = read_nuclei(back), read_nuclei(store)
    assert found.record == known.record
    for name in ("offsets", "points", "centroid", "area", "score"):
        one, other = getattr(found, name), getattr(known, name)
        assert (one.dtype, one.tobytes()) == (other.dtype, other.tobytes()), name
    for name, values in known.measurements.items():
        assert found.measurements[name].tobytes() == values.tobytes(), name


def test_layout(exported: Path) -> None:
    root = attributes(exported)
    assert root["spatialdata_attrs"]["version"] == "0.2"
    assert root["slide_properties"] == {"shape": [8000, 9000], "mpp": 0.2527}
    spec = root["tile_spec"]["tiles"]
    assert (spec["width"], spec["stride_width"], spec["mpp"]) == (256, 192, 0.5)
    assert spec["base_downsample"] == 0.5 / 0.2527
    assert sorted(p.parent.name for p in exported.glob("*/zarr.json")) == ["shapes", "tables"]
    table = attributes(exported / "tables/uni_tiles")
    assert table["spatialdata-encoding-type"] == "ngff:regions_table"
    assert (table["region"], table["region_key"], table["instance_key"]) == ("tiles", "library_id", "tile_id")
    for name in ("tiles", "nuclei_squares"):
        shapes = attributes(exported / "shapes" / name)
        assert (shapes["encoding-type"], shapes["spatialdata_attrs"]) == ("ngff:shapes", {"version": "0.3"})
        assert shapes["coordinateTransformations"][0]["type"] == "identity"


def test_round_trip_is_bit_equal(full: FeatureStore, exported: Path, tmp_path: Path) -> None:
    (path,) = import_spatialdata(exported, tmp_path / "back")
    back = FeatureStore.open(path)
    assert_same_store(back, full)
    assert_same_nuclei(back, full)


def test_a_slide_without_tiles(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s1.zarr", n=0)
    path = export_spatialdata(store, tmp_path / "sd").features
    (back,) = import_spatialdata(path, tmp_path / "back")
    assert_same_store(FeatureStore.open(back), store)


def test_polygons_are_well_known_binary(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    offsets = np.array([0, 3, 8])
    points = np.random.default_rng(0).normal(size=(8, 2))
    write_polygons(tmp_path / "p.parquet", offsets, points, {"a": np.array([7, 9])})
    table = parquet.read_table(tmp_path / "p.parquet")
    geo = json.loads(table.schema.metadata[b"geo"])
    assert (geo["primary_column"], geo["columns"]["geometry"]["encoding"]) == ("geometry", "WKB")
    assert geo["columns"]["geometry"]["bbox"] == [*points.min(axis=0), *points.max(axis=0)]
    for k, shape in enumerate(table.column("geometry").to_pylist()):
        ring = points[offsets[k] : offsets[k + 1]]
        closed = [*ring.reshape(-1), *ring[0]]
        assert shape == struct.pack(f"<BIII{len(closed)}d", 1, 3, 1, len(closed) // 2, *closed)
    found = read_polygons(tmp_path / "p.parquet", ("a", "b"))
    assert np.array_equal(found[0], offsets)
    assert np.array_equal(found[1], points)
    assert list(found[2]) == ["a"]


def wkb(kind: int = 3, rings: int = 1, count: int = 4, cut: int = 0, last: float = 0.0, order: int = 1) -> bytes:
    points = [0.0, 0.0, 4.0, 0.0, 4.0, 4.0, last, last]
    whole = struct.pack("<BIII8d" if order else ">BIII8d", order, kind, rings, count, *points)
    return whole[: len(whole) - cut]


@pytest.mark.parametrize(
    "shape",
    [
        wkb(kind=6), wkb(rings=2), wkb(count=1 << 31), wkb(count=5), wkb(cut=8), wkb(cut=70), b"", None, wkb(last=1.0),
        wkb(last=float("nan")), b"\x07" + wkb()[1:],
    ],
)  # fmt: skip
def test_shapes_that_are_no_rings(tmp_path: Path, shape: bytes | None) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"geometry": pyarrow.array([wkb(), wkb(order=0), shape], pyarrow.binary())})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="shape 2"):
        read_polygons(tmp_path / "p.parquet")


def test_damaged_parquet(exported: Path, tmp_path: Path) -> None:
    path = exported / "shapes/nuclei_squares/shapes.parquet"
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    endings = Counter[str]()
    for trial in range(20):
        broken = bytearray(whole[: rng.integers(1, len(whole))] if trial % 2 else whole)
        for place in rng.integers(0, len(broken), 8):
            broken[place] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            (back,) = import_spatialdata(exported, tmp_path / f"back{trial}")
        except FormatError as error:
            endings["refused"] += "s1.zarr is missing, damaged" in str(error) and "\n" not in str(error)
        else:  # what was changed says nothing of outlines and measurements
            assert len(read_nuclei(FeatureStore.open(back))) == 40
            endings["read"] += 1
    assert endings["refused"] >= 10
    assert endings.total() == 20
    path.write_bytes(whole)
    assert len(import_spatialdata(exported, tmp_path / "back")) == 1


def lazyslide(path: Path, ids: list[int], **spec: Any) -> np.ndarray:
    """A folder as LazySlide lays it out: 6 tiles of 224 px at 0.5 mpp on a slide of 0.25, features of some of them."""
    origins = np.array([[0, 0], [448, 0], [896, 0], [0, 448], [448, 448], [896, 448]])
    tiles = {
        "height": 224, "width": 224, "stride_height": 224, "stride_width": 224, "mpp": 0.5, "ops_level": 0,
        "ops_downsample": 2.0, "base_level": 0, "base_downsample": 2.0, "tissue_name": "tissues",
    } | spec  # fmt: skip
    top = {"tile_spec": {"tiles": tiles}, "slide_properties": {"shape": [900, 1400], "mpp": 0.25}}
    root = zarr.create_group(path, zarr_format=3, attributes={"spatialdata_attrs": {"version": "0.2"}, **top})
    root.create_group("shapes").create_group("tiles")
    columns = {"tile_id": np.arange(6)[::-1].copy(), "tissue_id": np.zeros(6, int)}
    write_polygons(path / "shapes/tiles/shapes.parquet", *frame_tiles(origins[::-1], (448.0, 448.0)), columns)
    table = root.create_group("tables").create_group("uni_tiles")
    features = np.random.default_rng(0).normal(size=(len(ids), 5)).astype(np.float32)
    table.create_array("X", data=features)
    write_frame(table, "obs", list(map(str, ids)), {"tile_id": np.array(ids), "library_id": ("tiles",) * len(ids)})
    write_mapping(table, "uns")
    return features


def test_lazyslides_own_folder(tmp_path: Path) -> None:
    features = lazyslide(tmp_path / "slide 1.zarr", [4, 0, 5])
    (path,) = import_spatialdata(tmp_path / "slide 1.zarr", tmp_path / "back")
    store = FeatureStore.open(path)
    assert path.name == "slide 1.zarr"
    assert store.encoders() == ("uni",)
    assert store.features().tobytes() == features.tobytes()
    assert store.origins().tolist() == [[448, 448], [0, 0], [896, 448]]
    assert (store.grid().tile_px, store.grid().mpp, store.grid().tile_size_level0) == (224, 0.5, (448.0, 448.0))
    assert (store.slide.dimensions, store.slide.mpp) == ((1400, 900), (0.25, 0.25))


@pytest.mark.parametrize(
    ("spec", "ids", "words"),
    [
        ({"width": 100}, [0], "square"), ({"base_downsample": 0}, [0], "base_downsample"), ({}, [6], "names a tile"),
        ({"width": "x", "height": "x"}, [0], "width"), ({"stride_width": None}, [0], "square"),
    ],
)  # fmt: skip
def test_lazyslide_folders_that_cannot_be(tmp_path: Path, spec: dict[str, Any], ids: list[int], words: str) -> None:
    lazyslide(tmp_path / "slide.zarr", ids, **spec)
    with pytest.raises(FormatError, match=words):
        import_spatialdata(tmp_path, tmp_path / "back")


def test_an_encoder_is_told_by_its_whole_name(full: FeatureStore, exported: Path, tmp_path: Path) -> None:
    tables = zarr.open_group(exported / "tables", mode="r+")
    shutil.copytree(exported / "tables/uni_tiles", exported / "tables/uni_v2_tiles")
    del tables["uni_v2_tiles/X"]  # it cannot be imported
    (path,) = import_spatialdata(exported, tmp_path / "back", "uni")
    assert FeatureStore.open(path).encoders() == ("uni",)
    for name in ("un", "uni_v2_", "uni_v2_tiles"):
        with pytest.raises(FormatError, match=f"holds no table of features of {name}$"):
            import_spatialdata(exported, tmp_path / "other", name)


def test_a_scale_is_not_taken_where_the_folder_has_one(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"s1\.zarr says itself how large a pixel is: leave out --slide-mpp"):
        import_spatialdata(exported, tmp_path / "back", slide_mpp=0.25)
    lazyslide(tmp_path / "lazy/s.zarr", [0])
    (path,) = import_spatialdata(tmp_path / "lazy", tmp_path / "back", "uni", slide_mpp=0.2)
    assert FeatureStore.open(path).slide.mpp == (0.2, 0.2)


def test_another_encoder_is_not_there(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="resnet50"):
        import_spatialdata(exported, tmp_path / "back", "resnet50")


def test_spatialdata_itself_reads_and_writes_it(full: FeatureStore, exported: Path, tmp_path: Path) -> None:
    spatialdata = pytest.importorskip("spatialdata", reason=OPTIONAL)
    data = spatialdata.read_zarr(exported)
    assert sorted(data.shapes) == ["nuclei_squares", "tiles"]
    assert list(data.tables) == ["uni_tiles"]
    bounds = data["tiles"].bounds.to_numpy()
    assert np.array_equal(bounds[:, :2], full.origins())
    assert np.allclose(bounds[:, 2:] - bounds[:, :2], 256 * 0.5 / 0.2527)
    elements, table = spatialdata.join_spatialelement_table(
        sdata=data, spatial_element_names="tiles", table_name="uni_tiles", how="inner"
    )
    assert (len(elements["tiles"]), table.shape) == (9, (9, 6))
    assert data["nuclei_squares"].is_valid.all()
    mpp = read_nuclei(full).record.mpp
    assert np.allclose(data["nuclei_squares"].area * mpp[0] * mpp[1], data["nuclei_squares"]["area_um2"])
    data.write(tmp_path / "again.zarr")
    (path,) = import_spatialdata(tmp_path / "again.zarr", tmp_path / "back")
    assert_same_store(FeatureStore.open(path), full)
    assert_same_nuclei(FeatureStore.open(path), full)
