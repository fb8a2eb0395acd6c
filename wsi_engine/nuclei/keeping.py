"""Nuclei in a slide's store: ``nuclei/<method>/``, one array per column, complete only once all is written.

Layout::

    nuclei/<method>/           attrs record, count, summary, engine_version, complete
    ├── offsets                int64 (M + 1,)
    ├── points                 float32 (P, 2)     level-0 px
    ├── centroid               float64 (M, 2)     level-0 px
    └── area_um2, score, …     float32 (M,)       a column each
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from wsi_engine.arrays import EVERY_CHUNK, storing
from wsi_engine.errors import MismatchError, StoreError
from wsi_engine.extents import read_json
from wsi_engine.nuclei.instances import MEASUREMENTS, InstanceRecord, InstanceSet
from wsi_engine.places import list_folders
from wsi_engine.store import FeatureStore, features_key
from wsi_engine.version import __version__

_ROWS = 1 << 17
"""Rows of a chunk: half a megabyte of a float32 column."""

_IDENTITY = ("dimensions", "mpp", "method", "method_settings", "tissue_digest")


def stored_nuclei(store: FeatureStore) -> tuple[str, ...]:
    """Names of the methods whose nuclei are complete in a store, sorted."""
    with storing(store.path):
        there = list_folders(store.place / "nuclei")
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
    columns = {column: store.read(f"nuclei/{name}/{column}") for column in _columns()}
    with storing(store.path):
        _check_columns(columns)
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


def summarise_nuclei(store: FeatureStore, method: str | None = None) -> dict[str, Any]:
    """:meth:`~wsi_engine.nuclei.instances.InstanceSet.summary` of a store's nuclei, mostly without reading them.

    Raises:
        StoreError: as :func:`read_nuclei`.
    """
    there = stored_nuclei(store)
    name = there[0] if method is None and len(there) == 1 else features_key(method or "")
    kept = _attributes(store, name).get("summary") if name in there else None
    return dict(kept) if kept else read_nuclei(store, method).summary()


def write_nuclei(store: FeatureStore, nuclei: InstanceSet, check: Callable[[], None] = lambda: None) -> None:
    """Write the nuclei of one method in place of those it gave before; they count only once all are written.

    The caller holds the slide's lease; ``check`` is called before they are marked, and raises where it was lost.

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
        attributes |= {"summary": nuclei.summary()}  # a table of thousands of slides need not read every nucleus
        check()
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
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=codecs, attributes={EVERY_CHUNK: True},
        config={"write_empty_chunks": True},
    )  # fmt: skip
    for start in range(0, len(values), chunks[0]):
        array[start : start + chunks[0]] = values[start : start + chunks[0]]


def _check_columns(columns: dict[str, NDArray[Any]]) -> None:
    """ValueError where columns are not of one number of nuclei, or contours lie outside of the points."""
    offsets, points = columns["offsets"], columns["points"]
    count = len(offsets) - 1
    shapes = {"offsets": (count + 1,), "points": (len(points), 2), "centroid": (count, 2)}
    for name, values in columns.items():
        kind = "i" if name == "offsets" else "f"
        if values.shape != shapes.get(name, (count,)) or values.dtype.kind != kind:
            raise ValueError(f"{name} of {count} nuclei has type {values.dtype} and shape {values.shape}")
    if count < 0 or offsets[0] or offsets[-1] != len(points) or (np.diff(offsets) < 0).any():
        raise ValueError("contours lie outside of the points")


def _attributes(store: FeatureStore, name: str) -> dict[str, Any]:
    """Attributes of a method's group; empty where there is none."""
    with storing(store.path):
        try:
            node = read_json(store.place / "nuclei" / name / "zarr.json")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return dict(node.get("attributes", {}))
