"""A small cohort on disk: feature stores with a planted signal, and the CSV that names them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsi_engine import FeatureStore, TileGrid
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.slide_record import SlideRecord
from wsi_engine.writer import FeatureIdentity, FeatureWriter


def write_cohort(folder: Path, slides: int, dim: int, broken: int | None = None) -> Path:
    """``cohort.csv`` and ``features/`` in a folder, which is returned.

    Every second slide is basal: a few of its tiles stand out. Patients have two slides of one class. The features of
    slide ``broken`` hold a NaN, which the engine would not have written.
    """
    card = EncoderCard("net", "timm", "resnet", 224, dim, "mean", "open", weights="random:0", weights_digest="d" * 64)
    generator = np.random.default_rng(4)
    lines = ["slide_id,patient,subtype"]
    for number in range(slides):
        name, basal = f"slide-{number:02}", number % 2
        tiles = int(generator.integers(9, 40))
        features = generator.normal(size=(tiles, dim)).astype(np.float32)
        features[:4, :3] += 2.5 * basal
        _write_store(folder / "features" / f"{name}.zarr", name, features, card, number)
        if number == broken:
            _spoil(folder / "features" / f"{name}.zarr")
        lines.append(f"{name},patient-{number // 4}-{basal},{'basal' if basal else 'luminal'}")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    return folder


def _write_store(path: Path, name: str, features: np.ndarray, card: EncoderCard, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = len(features)
    origins = np.stack([np.arange(rows) * 512, np.zeros(rows, int)], axis=1).astype(np.int64)
    grid = TileGrid(origins, 256, 256, 0.5, (512.0, 512.0), rows)
    record = SlideRecord(name, f"{number:064x}", (40_000, 30_000), (0.25, 0.25), "aperio MPP", "aperio", "turbo")
    store = FeatureStore.create(path, record)
    store.write_grid("g", grid, {"mpp": 0.5}, None)
    writer = FeatureWriter(store, FeatureIdentity(card, "g", grid, "fp32", "float16"), 64)
    missing = writer.missing_rows()
    writer.add(missing, features[missing])
    writer.finish({"encode": 1.0})


def _spoil(path: Path) -> None:
    import zarr

    array = zarr.open_array(path / "features" / "net" / "values", mode="r+")
    array[1, 0] = np.nan
