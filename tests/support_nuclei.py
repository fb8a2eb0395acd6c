"""Nuclei that tests make up."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.nuclei.instances import InstanceRecord, InstanceSet, assemble_instances
from wsi_engine.nuclei.sheets import NucleiChunk


def make_chunk(corners: NDArray[np.int64], side: int = 4) -> NucleiChunk:
    """Squares of ``side`` pixels at corners (m, 2), x and y."""
    count = len(corners)
    ring = np.array([[0, 0], [side, 0], [side, side], [0, side]])
    return NucleiChunk(
        first=corners[:, ::-1].copy(),
        centroid=corners + side / 2,
        shapes=np.tile(np.float32([side**2, 4 * side, side, side, 0, 1]), (count, 1)),
        values=np.tile(np.float32([0.5, 0.1, 0.2, 0.05, 0.9]), (count, 1)),
        offsets=np.arange(count + 1) * 4,
        points=(corners[:, None] + ring).reshape(-1, 2).astype(np.int32),
    )


def make_record(width: int = 1000, height: int = 800, mpp: float = 0.5) -> InstanceRecord:
    return InstanceRecord(
        slide="made up",
        dimensions=(width, height),
        mpp=(mpp, mpp),
        method="squares",
        method_settings={"side": 4},
        fitted={},
        method_mpp=mpp,
        tissue_mm2=width * height * mpp**2 / 1e6,
    )


def make_nuclei(count: int, across: int = 100) -> InstanceSet:
    """``count`` squares of 4 pixels, 6 apart, in rows of ``across``."""
    k = np.arange(count)
    corners = np.stack([k % across, k // across], axis=1) * 6 + 1
    record = make_record(6 * across + 2, 6 * (count // across + 1) + 2)
    return assemble_instances([make_chunk(corners)], (1.0, 1.0), record)
