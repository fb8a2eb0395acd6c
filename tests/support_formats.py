"""What the tests of formats share: a store with everything in it, and the content of files."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from support_nuclei import make_nuclei

from wsi_engine import FeatureStore, TileGrid
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.nuclei.keeping import write_nuclei
from wsi_engine.slide_record import SlideRecord
from wsi_engine.writer import FeatureIdentity, FeatureWriter

GRID = "256px_0.5mpp_stride192"


def make_store(path: Path, dtype: str = "float16", n: int = 9, name: str = "s1") -> FeatureStore:
    """A store as an extraction leaves it: features of ``uni`` (N, 6) on a grid with overlap, at 0.2527 mpp."""
    rng = np.random.default_rng(0)
    origins = np.stack([np.arange(n) * 379, np.arange(n) * 7 + 3], axis=1).astype(np.int64)
    side = 256 * 0.5 / 0.2527
    grid = TileGrid(origins, 256, 192, 0.5, (side, side), 20)
    slide = SlideRecord(name, "f" * 64, (9000, 8000), (0.2527, 0.2527), "aperio MPP", "aperio", "turbo")
    store = FeatureStore.create(path, slide)
    store.write_grid(GRID, grid, {"min_tissue": 0.25}, None)
    card = EncoderCard("uni", "timm", "vit", 224, 6, "cls", "gated", options=(("depth", 2),), weights_digest="d" * 64)
    writer = FeatureWriter(store, FeatureIdentity(card, GRID, grid, "bf16", dtype), 4)  # type: ignore[arg-type]
    writer.keep(rng.normal(size=(n, 6)).astype(dtype), {"seconds": {"read": 1.5}})
    return store


def add_attention(store: FeatureStore, run: str, columns: list[str], seed: int = 1) -> None:
    """Attention of a run, a column a class."""
    n = len(store.origins())
    values = np.random.default_rng(seed).normal(size=(n, len(columns))).astype(np.float32)
    record = {"run": run, "encoder": "uni", "grid": GRID, "grid_digest": store.grid().digest, "columns": columns}
    FeatureStore.create(store.path, store.slide).write_attention(run, values, record)


def make_full_store(path: Path) -> FeatureStore:
    """:func:`make_store` with attention of two runs and the nuclei of one method."""
    store = make_store(path)
    add_attention(store, "one", ["attention"])
    add_attention(store, "two", ["normal", "tumour/other"], seed=2)
    write_nuclei(FeatureStore.create(path, store.slide), make_nuclei(40))
    return FeatureStore.open(path)


def assert_same_store(back: FeatureStore, store: FeatureStore) -> None:
    """Everything of the tiles is as it was, to the bit."""
    assert back.slide == store.slide
    assert back.encoders() == store.encoders()
    assert back.grid().to_json() == store.grid().to_json()
    assert back.origins().tobytes() == store.origins().tobytes()
    assert back.grid_settings(GRID) == store.grid_settings(GRID)
    assert (back.features().dtype, back.features().tobytes()) == (store.features().dtype, store.features().tobytes())
    kept = ("encoder", "precision", "grid", "grid_digest", "dtype", "exact_resample")
    assert {name: back.provenance()[name] for name in kept} == {name: store.provenance()[name] for name in kept}
    assert back.runs() == store.runs()
    for run in store.runs():
        assert back.attention(run).tobytes() == store.attention(run).tobytes()
        assert back.attention_record(run) == store.attention_record(run)


def h5_content(path: Path) -> dict[str, object]:
    """Everything in an HDF5 file: datasets with type, shape and bytes, and all attributes with their types."""
    found: dict[str, object] = {}
    with h5py.File(path) as file:
        for key, value in file.attrs.items():
            found[f".{key}"] = (type(value), np.asarray(value).tolist())
        for name, data in file.items():
            found[name] = (data.dtype.str, data.shape, data[...].tobytes())
            for key, value in data.attrs.items():
                found[f"{name}.{key}"] = (type(value), np.asarray(value).tolist())
    return found
