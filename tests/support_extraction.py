"""An encoder whose features are checked by hand, and the settings and files of extractions with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsi_engine.encoders.base import EncoderCard


class MeanEncoder:
    """Mean and standard deviation of each channel: features that are checked by hand."""

    precision = "fp32"

    def __init__(self, digest: str = "1" * 64) -> None:
        self.card = EncoderCard("mean", "timm", "mean", 0, 6, "none", "open", weights="none", weights_digest=digest)
        self.shapes: set[tuple[int, ...]] = set()

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        self.shapes.add(pixels.shape)
        values = pixels.reshape(len(pixels), -1, 3).astype(np.float32) / 255
        return np.concatenate([values.mean(axis=1), values.std(axis=1)], axis=1)


def options(**changes: object) -> dict[str, object]:
    return {"slide_mpp": 0.5, "tile_px": 64, "batch_size": 16, "dtype": "float32", **changes}


def data_files(store: Path) -> dict[str, bytes]:
    """Every data file of a store; the attributes hold times and are left out."""
    return {
        str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if "c" in p.parts and p.is_file()
    }
