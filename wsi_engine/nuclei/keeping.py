"""Nuclei in a slide's store: ``nuclei/<method>/``, one array per column, complete only once all is written.

Layout::

    nuclei/<method>/           attrs record, count, engine_version, complete
    ├── offsets                int64 (M + 1,)
    ├── points                 float32 (P, 2)     level-0 px
    ├── centroid               float64 (M, 2)     level-0 px
    └── area_um2, score, …     float32 (M,)       a column each
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from wsi_engine.errors import MismatchError, StoreError
from wsi_engine.nuclei.instances import MEASUREMENTS, InstanceRecord, InstanceSet
from wsi_engine.store import FeatureStore, features_key, storing
from wsi_engine.version import __version__

_ROWS = 1 << 17
"""Rows of a chunk: half a megabyte of a float32 column."""

_IDENTITY = ("dimensions", "mpp", "method", "method_settings", "tissue_digest")


def stored_nuclei(store: FeatureStore) -> tuple[str, ...]:
    """Names of the methods whose nuclei are complete in a store, sorted."""
    folder = Path(store.path) / "nuclei"
    there = sorted(entry.parent.name for entry in folder.glob("*/zarr.json")) if folder.is_dir() else []
    return tuple(name for name in there if _attributes(store, name).get("complete") is True)


def read_nuclei(store: FeatureStore, method: str | None = None) -> InstanceSet:
    """Nuclei of a store; None for the only method there is.

    Raises:
        StoreError: there are none, or several and no method was named, or the data are damaged.
    """
    there = stored_nuclei(store)
    name = there[0] if method is None and len(there) == 1 else features_key(method or "")
    if name not in there:
        listed = ", ".join(there) or "none"
        wanted = "name one of them" if method is None else f"{method} is not among them"
        raise StoreError(f"{store.path} holds nuclei of {len(there)} methods ({listed}): {wanted}")
    with storing(store.path):
        group = store.group(f"nuclei/{name}")
        columns = {column: np.asarray(_array(group, column)[...]) for column in _columns()}
        record = InstanceRecord.from_json(_attributes(store, name)["record"])
    return InstanceSet(
        offsets=columns.pop("offsets"),
        points=columns.pop("points"),
        centroid=columns.pop("centroid"),
        area=columns.pop("area_um2"),
        score=columns.pop("score"),
        measurements=columns,
        record=record,
    )


def write_nuclei(store: FeatureStore, nuclei: InstanceSet) -> None:
    """Write the nuclei of one method in place of those it gave before; they count only once all are written.

    The caller holds the slide's lease.

    Raises:
        StoreError: the store was opened for reading, or cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {
        "offsets": nuclei.offsets,
        "points": nuclei.points,
        "centroid": nuclei.centroid,
        "area_um2": nuclei.area,
        "score": nuclei.score,
        **nuclei.measurements,
    }
    parent = store.group("nuclei")
    with storing(store.path):
        group = parent.create_group(features_key(nuclei.record.method), overwrite=True)
        for name in _columns():
            _write(group, name, arrays[name])
        attributes = {"record": nuclei.record.to_json(), "count": len(nuclei), "engine_version": __version__}
        group.update_attributes(attributes | {"complete": True})


def check_nuclei(store: FeatureStore, expected: InstanceRecord) -> bool:
    """Whether the nuclei expected are in the store, complete.

    Raises:
        MismatchError: nuclei of the method are there, but made with other settings or on other tissue.
    """
    attributes = _attributes(store, features_key(expected.method))
    if attributes.get("complete") is not True:
        return False
    had, wanted = attributes["record"], json.loads(json.dumps(expected.to_json()))
    differing = [name for name in _IDENTITY if had.get(name) != wanted[name]]
    if differing:
        raise MismatchError(
            f"{store.path} already holds nuclei of {expected.method} found differently ({', '.join(differing)} "
            "changed): choose another output folder, or delete that store"
        )
    return True


def _columns() -> tuple[str, ...]:
    return ("offsets", "points", "centroid", "area_um2", "score", *MEASUREMENTS)


def _write(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    """One array, a chunk at a time, each with a checksum."""
    chunks = (max(1, min(_ROWS, len(values))), *values.shape[1:])
    codecs = [ZstdCodec(level=3), Crc32cCodec()]
    array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=codecs)
    for start in range(0, len(values), chunks[0]):
        array[start : start + chunks[0]] = values[start : start + chunks[0]]


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _attributes(store: FeatureStore, name: str) -> dict[str, Any]:
    """Attributes of a method's group; empty where there is none."""
    with storing(store.path):
        try:
            text = (Path(store.path) / "nuclei" / name / "zarr.json").read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return dict(json.loads(text).get("attributes", {}))
