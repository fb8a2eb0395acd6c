"""Bags: what is read is what Zarr reads, and damage, bad values and features of another kind are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from wsi_engine import FeatureStore, TileGrid
from wsi_engine.bags import ArrayBags, StoredBags, prefetch
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import FeatureError, InputError, ModelError, StoreError
from wsi_engine.shards import ShardLayout, find_bad_tile, parse_metadata
from wsi_engine.slide_record import SlideRecord
from wsi_engine.writer import FeatureIdentity, FeatureWriter

VALUES = Path("features", "net", "values")


def write_store(
    path: Path, features: np.ndarray, *, encoder: str = "net", digest: str = "d" * 64, mpp: float = 0.5
) -> Path:
    tiles, dim = features.shape
    origins = np.stack([np.arange(tiles) * 512, np.zeros(tiles, int)], axis=1).astype(np.int64)
    grid = TileGrid(origins, 256, 256, mpp, (512.0, 512.0), tiles)
    record = SlideRecord("a", "f" * 64, (4000, 3000), (0.25, 0.25), "aperio MPP", "aperio", "turbo")
    card = EncoderCard(encoder, "timm", "resnet", 224, dim, "mean", "open", weights="random:0", weights_digest=digest)
    store = FeatureStore.create(path, record)
    if not store.grids():
        store.write_grid("g", grid, {}, None)
    identity = FeatureIdentity(card, "g", grid, "fp32", str(features.dtype))  # type: ignore[arg-type]
    FeatureWriter(store, identity, 64).keep(features, {})
    return path


def make_features(tiles: int, dim: int = 5, dtype: str = "float16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tiles, dim)).astype(dtype)


def read_metadata(folder: Path) -> dict[str, Any]:
    return parse_metadata((folder / "zarr.json").read_bytes())


def layout_of(store: Path) -> ShardLayout | None:
    return ShardLayout.of(store / VALUES, read_metadata(store / VALUES))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("tiles", [1, 23, 1023, 1024, 1025, 2048, 2049, 3072, 5000])
def test_a_bag_is_what_zarr_reads(tmp_path: Path, tiles: int, dtype: str) -> None:
    features = make_features(tiles, 7, dtype)
    path = write_store(tmp_path / "a.zarr", features)
    bags = StoredBags([path])
    bag = bags.load(0)
    assert bag.dtype == features.dtype
    assert bag.flags.c_contiguous
    assert bag.flags.writeable
    assert bag.tobytes() == features.tobytes() == FeatureStore.open(path).features().tobytes()
    assert (len(bags), bags.dim, bags.tiles(0)) == (1, 7, tiles)
    assert layout_of(path) is not None  # so it was not Zarr that read it


def test_bags_are_loaded_anew(tmp_path: Path) -> None:
    bags = StoredBags([write_store(tmp_path / "a.zarr", make_features(3000))])
    first = bags.load(0)
    kept = first.copy()
    bags.load(0)[:] = 0
    assert np.array_equal(first, kept)


def test_an_empty_bag(tmp_path: Path) -> None:
    bags = StoredBags([write_store(tmp_path / "a.zarr", make_features(0))])
    assert bags.tiles(0) == 0
    assert bags.load(0).shape == (0, 5)


def test_many_bags_from_many_threads(tmp_path: Path) -> None:
    features = [make_features(tiles, seed=tiles) for tiles in (3000, 10, 2048, 5000)]
    paths = [write_store(tmp_path / f"{k}.zarr", one) for k, one in enumerate(features)]
    bags = StoredBags(paths, "net")
    places = [k % 4 for k in range(40)]
    for wanted, (place, bag) in zip(places, prefetch(bags, places, workers=4), strict=True):
        assert place == wanted
        assert np.array_equal(bag, features[place])
    assert [bags.tiles(k) for k in range(4)] == [3000, 10, 2048, 5000]


OTHER_LAYOUTS = {
    "compressed": {"compressors": [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]},
    "without a checksum": {"compressors": None},
    "checked twice": {"compressors": [zarr.codecs.Crc32cCodec()] * 2},
    "without shards": {"shards": None},
    "split in columns": {"chunks": (50, 3), "shards": (100, 6)},
    "columns in two shards": {"chunks": (50, 3), "shards": (100, 3)},
    "filled with zeros": {"fill_value": 0},
    "big-endian": {"serializer": zarr.codecs.BytesCodec(endian="big")},
    "transposed": {"filters": [zarr.codecs.TransposeCodec(order=(1, 0))]},
    "other names of chunks": {"chunk_key_encoding": {"name": "v2", "separator": "."}},
    "separated by dots": {"chunk_key_encoding": {"name": "default", "separator": "."}},
    "index first": {"shards": {"shape": (100, 6), "index_location": "start"}},
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_other_layouts_are_left_to_zarr(tmp_path: Path, name: str) -> None:
    features = make_features(230, 6)
    path = write_store(tmp_path / "a.zarr", features)
    attributes = read_metadata(path / VALUES)["attributes"]
    usual = {"chunks": (50, 6), "shards": (100, 6), "compressors": [zarr.codecs.Crc32cCodec()], "fill_value": np.nan}
    for settings, direct in ((usual, True), (usual | OTHER_LAYOUTS[name], False)):
        array = zarr.create_array(
            path / VALUES, shape=features.shape, dtype="float16", attributes=attributes, overwrite=True, **settings
        )
        array[:] = features
        assert (layout_of(path) is not None) is direct
        assert np.array_equal(StoredBags([path]).load(0), features)


def test_zeros_that_another_writer_left_out_are_zeros(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", make_features(230, 6))
    attributes = read_metadata(path / VALUES)["attributes"]
    zarr.create_array(path / VALUES, shape=(230, 6), dtype="float16", attributes=attributes, overwrite=True)
    assert not StoredBags([path]).load(0).any()


def test_metadata_that_say_more_are_left_to_zarr(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", make_features(5))
    metadata = read_metadata(path / VALUES)
    assert ShardLayout.of(path / VALUES, metadata) is not None
    assert ShardLayout.of(path / VALUES, metadata | {"dimension_names": ["tile", "value"]}) is not None
    for other in ({"new": 1}, {"storage_transformers": [{}]}, {"codecs": []}, {"codecs": ["bytes"]}, {"shape": [5]}):
        assert ShardLayout.of(path / VALUES, metadata | other) is None


def test_features_that_are_not_of_a_known_type(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", make_features(23))
    attributes = read_metadata(path / VALUES)["attributes"]
    zarr.create_array(path / VALUES, shape=(23, 5), dtype="float64", attributes=attributes, overwrite=True)
    with pytest.raises(StoreError, match=r"a\.zarr are float64"):
        StoredBags([path]).load(0)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Wherever in a file: chunks, rows beyond the last tile, checksums, index."""
    path = write_store(tmp_path / "a.zarr", make_features(1500, 2))
    bags = StoredBags([path])
    shard = path / VALUES / "c" / "0" / "0"
    good = shard.read_bytes()
    ends = [0, 4095, 4096, 4099, 4100, 6500, 8195, 8199, *range(len(good) - 36, len(good))]
    for place in {*ends, *np.random.default_rng(0).integers(0, len(good), 50).tolist()}:
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        shard.write_bytes(bad)
        with pytest.raises(StoreError, match=r"a\.zarr is damaged \(the checksum of (chunk|the index)"):
            bags.load(0)
    shard.write_bytes(good)
    assert bags.load(0).shape == (1500, 2)


@pytest.mark.parametrize("size", [0, 10, 36, 3000, -1])
def test_truncated_shards_are_found(tmp_path: Path, size: int) -> None:
    path = write_store(tmp_path / "a.zarr", make_features(3000, 2))
    bags = StoredBags([path])
    shard = path / VALUES / "c" / "1" / "0"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(StoreError, match=r"a\.zarr is damaged.*delete it and extract again"):
        bags.load(0)


def test_a_sound_index_of_chunks_that_are_not_there(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", make_features(3000, 2))
    bags = StoredBags([path])
    shard = path / VALUES / "c" / "0" / "0"
    index = shard.read_bytes()[-36:]
    shard.write_bytes(index)
    with pytest.raises(StoreError, match=r"chunk 0 of shard c/0/0 is cut short"):
        bags.load(0)


def test_missing_parts_are_found(tmp_path: Path) -> None:
    features = make_features(5000)
    features[1024:2048] = np.nan  # Zarr leaves out a chunk that holds nothing but the fill value
    path = write_store(tmp_path / "a.zarr", features)
    bags = StoredBags([path])
    with pytest.raises(StoreError, match=r"chunk 1 of shard c/0/0 is missing"):
        bags.load(0)
    features[1024:2048] = 0
    shutil.rmtree(path)
    write_store(path, features)
    (path / VALUES / "c" / "2" / "0").unlink()
    with pytest.raises(StoreError, match=r"a\.zarr is damaged \(shard c/2/0 is missing\)"):
        bags.load(0)
    shutil.rmtree(path)
    with pytest.raises(StoreError, match=r"a\.zarr"):
        bags.load(0)


@pytest.mark.parametrize("tiles", [4, 5000])
def test_features_made_again_are_not_mixed_in(tmp_path: Path, tiles: int) -> None:
    path = write_store(tmp_path / "a.zarr", make_features(3000))
    bags = StoredBags([path])
    shutil.rmtree(path)
    write_store(path, make_features(tiles))
    with pytest.raises(StoreError, match=r"a\.zarr were made again"):
        bags.load(0)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"shape": 5}'])
def test_unreadable_metadata(tmp_path: Path, text: str) -> None:
    """Zarr itself stumbles over most of them."""
    path = write_store(tmp_path / "a.zarr", make_features(5))
    (path / VALUES / "zarr.json").write_text(text)
    with pytest.raises(StoreError, match=r"a\.zarr"):
        StoredBags([path])


def test_a_shard_that_cannot_be_opened(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", make_features(5))
    bags = StoredBags([path])
    shard = path / VALUES / "c" / "0" / "0"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(StoreError, match=r"cannot use the store .*a\.zarr"):
        bags.load(0)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("compressed", [False, True])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: str, compressed: bool) -> None:
    features = make_features(2100, 3, dtype)
    features[2050, 1] = features[2090] = value
    path = write_store(tmp_path / "a.zarr", features)
    if compressed:
        attributes = read_metadata(path / VALUES)["attributes"]
        zarr.create_array(path / VALUES, data=features, attributes=attributes, overwrite=True)
        assert layout_of(path) is None
    with pytest.raises(FeatureError, match=r"tile 2050 in .*a\.zarr are NaN or infinite"):
        StoredBags([path]).load(0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_bit_pattern_is_judged_as_numpy_does(dtype: str) -> None:
    if dtype == "float16":
        values = np.arange(2**16).astype(np.uint16).view(np.float16)
    else:
        high = np.arange(2**16, dtype=np.uint32) << 16
        values = np.concatenate([high, high | 1, high | 0xFFFF]).view(np.float32)
    for some in np.array_split(values, 997):
        wrong = np.flatnonzero(~np.isfinite(some))
        assert find_bad_tile(some[:, None]) == (wrong[0] if len(wrong) else None)
    assert find_bad_tile(values[np.isfinite(values)][:, None]) is None
    assert find_bad_tile(np.empty((0, 4), dtype)) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"encoder": "net2"}, r"b\.zarr holds features of net2"),
        ({"digest": "e" * 64}, r"b\.zarr were made with other weights of net"),
        ({"mpp": 1.0}, r"b\.zarr are 256 px at 1 mpp"),
        ({"features": make_features(4, 6)}, r"b\.zarr holds features of net \(6 numbers per tile\).*\(5\)"),
    ],
)
def test_bags_of_several_kinds_are_refused(tmp_path: Path, other: dict[str, object], message: str) -> None:
    first = write_store(tmp_path / "a.zarr", make_features(4))
    second = write_store(tmp_path / "b.zarr", **({"features": make_features(4)} | other))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=message):
        StoredBags([first, second])


def test_stores_that_have_no_such_features(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", make_features(4))
    write_store(path, make_features(4, 9), encoder="net2")
    with pytest.raises(StoreError, match="holds 2 encoders"):
        StoredBags([path])
    assert StoredBags([path], "net2").dim == 9
    assert StoredBags([path], "net").dim == 5
    with pytest.raises(StoreError, match="net3"):
        StoredBags([path], "net3")
    with pytest.raises(StoreError, match="no store"):
        StoredBags([tmp_path / "b.zarr"])
    with pytest.raises(InputError, match="no store was given"):
        StoredBags([])


def test_an_array_that_does_not_fit_its_encoder(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", make_features(4))
    metadata = read_metadata(path / VALUES)
    metadata["attributes"]["encoder"]["dim"] = 6
    (path / VALUES / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="5 numbers per tile and their encoder gives 6"):
        StoredBags([path])


def test_arrays_in_memory() -> None:
    arrays = [make_features(4), make_features(6, dtype="float64"), np.ones((2, 5), int), np.empty((0, 5), np.float32)]
    bags = ArrayBags([*arrays, np.asfortranarray(make_features(3, dtype="float32"))])
    assert (len(bags), bags.dim, bags.tiles(1), bags.tiles(3)) == (5, 5, 6, 0)
    assert [bags.load(k).dtype.name for k in range(5)] == ["float16", *["float32"] * 4]
    assert all(bags.load(k).flags.c_contiguous for k in range(5))
    assert np.array_equal(bags.load(1), arrays[1].astype(np.float32))
    assert bags.load(0) is arrays[0]


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ([], InputError, "empty"),
        ([np.ones(3)], InputError, r"bag 0 is float64 \(3,\)"),
        ([np.array([["a"]])], InputError, "bag 0 is <U1"),
        ([np.ones((1, 2), complex)], InputError, "bag 0 is complex128"),
        ([np.ones((1, 2)), np.ones((1, 3))], InputError, "bag 1 has 3 numbers per tile and bag 0 has 2"),
        ([np.ones((1, 2)), np.array([[1, 2], [3, np.nan]])], FeatureError, "tile 1 of bag 1"),
        ([np.array([[1e300]])], FeatureError, "tile 0 of bag 0 .* too large"),
    ],
)
def test_arrays_that_are_no_bags(arrays: list[np.ndarray], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ArrayBags(arrays)
