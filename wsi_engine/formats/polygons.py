"""Polygons in Parquet: one outer ring each, as well-known binary, with the metadata that GeoPandas reads.

Source: OGC Simple Feature Access 1.2.1, section 8.2 (WKB); GeoParquet 1.1.0. Needs pyarrow.
"""

from __future__ import annotations

import importlib
import itertools
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SettingsError, first_line

_POLYGON = 3
_HEADER = struct.Struct("<BIII")
_BYTES_PER_POINT = 16
_MOST_BYTES = 1 << 34
_MOST_RATIO = 1000


def write_polygons(
    path: Path, offsets: NDArray[np.int64], points: NDArray[Any], columns: Mapping[str, NDArray[Any]]
) -> None:
    """Write M polygons and a column of M values for each name.

    Args:
        path: the file.
        offsets: int64 (M + 1,): polygon k is ``points[offsets[k]:offsets[k + 1]]``.
        points: (P, 2), x and y, the first point of a ring not repeated.
        columns: values (M,).

    Raises:
        SettingsError: pyarrow is not installed.
        OSError: the file cannot be written.
    """
    arrow, parquet = _load_pyarrow()
    low, high = (points.min(axis=0), points.max(axis=0)) if len(points) else (np.zeros(2), np.zeros(2))
    geometry = {
        "encoding": "WKB",
        "crs": None,
        "geometry_types": ["Polygon"] if len(offsets) > 1 else [],
        "bbox": [float(value) for value in (*low, *high)],
    }
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    table = arrow.table({**columns, "geometry": arrow.array(list(_encode(offsets, points)), arrow.binary())})
    parquet.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), path)


def read_polygons(
    path: Path, wanted: tuple[str, ...] = ()
) -> tuple[NDArray[np.int64], NDArray[np.float64], dict[str, NDArray[Any]]]:
    """Offsets int64 (M + 1,), points float64 (P, 2) and the columns wanted, as far as they are there.

    Raises:
        SettingsError: pyarrow is not installed.
        ValueError: the file is damaged, declares far more than it holds, or has other shapes than rings.
        OSError: the file cannot be read.
    """
    arrow, parquet = _load_pyarrow()
    if not path.is_file():
        raise ValueError(f"{path.name} is missing, or no plain file")
    try:
        with parquet.ParquetFile(path) as file:
            _check_size(file.metadata, path)
            there = set(file.schema_arrow.names)
            if "geometry" not in there:
                raise ValueError(f"{path.name} has no column geometry")
            table = file.read(columns=["geometry", *(name for name in wanted if name in there)])
        shapes = [None if shape is None else bytes(shape) for shape in table.column("geometry").to_pylist()]
        columns = {name: np.asarray(table.column(name).to_numpy()) for name in table.column_names if name != "geometry"}
    except (arrow.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(f"{path.name} cannot be read ({first_line(error)})") from error
    rings = [_decode(shape, number) for number, shape in enumerate(shapes)]
    offsets = np.concatenate([[0], np.cumsum([len(ring) for ring in rings])]).astype(np.int64)
    points = np.concatenate(rings) if rings else np.zeros((0, 2))
    return offsets, points, columns


def frame_tiles(origins: NDArray[np.int64], size: tuple[float, float]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Offsets (N + 1,) and corners (4 N, 2) of tiles that span ``size`` level-0 pixels."""
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * np.asarray(size)
    return np.arange(len(origins) + 1) * 4, (origins[:, None] + corners).reshape(-1, 2)


def _encode(offsets: NDArray[np.int64], points: NDArray[Any]) -> Iterator[bytes]:
    """Each polygon as WKB, its ring closed."""
    exact = np.ascontiguousarray(points, "<f8")
    bounds = offsets.tolist()
    for start, stop in itertools.pairwise(bounds):
        ring = exact[start:stop].tobytes()
        yield _HEADER.pack(1, _POLYGON, 1, stop - start + 1) + ring + ring[:_BYTES_PER_POINT]


def _decode(shape: bytes | None, number: int) -> NDArray[np.float64]:
    """The ring (n, 2) of a WKB polygon without holes, its last point left out."""
    if shape is None or len(shape) < _HEADER.size or shape[0] not in (0, 1):
        raise ValueError(f"shape {number} is no polygon")
    order = "<" if shape[0] else ">"
    kind, rings, count = struct.unpack_from(f"{order}III", shape, 1)
    if kind != _POLYGON or rings != 1 or count < 4 or len(shape) != _HEADER.size + _BYTES_PER_POINT * count:
        raise ValueError(f"shape {number} is no polygon of one ring")
    ring = np.frombuffer(shape, f"{order}f8", offset=_HEADER.size).reshape(-1, 2).astype(np.float64)
    if not np.isfinite(ring).all() or not np.array_equal(ring[0], ring[-1]):
        raise ValueError(f"shape {number} is no closed ring")
    return ring[:-1]


def _check_size(metadata: Any, path: Path) -> None:
    """Refuse what would take far more memory than the file's size explains."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    size = sum(max(0, group.total_byte_size) for group in groups)
    held = path.stat().st_size
    if size > _MOST_BYTES or size > _MOST_RATIO * held + (1 << 26) or metadata.num_rows > 8 * _MOST_RATIO * held:
        raise ValueError(f"{path.name} declares {metadata.num_rows} rows in {held} bytes")


def _load_pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise SettingsError(
            'SpatialData keeps shapes in Parquet, for which pyarrow is missing; pip install "wsi-engine[parquet]"'
        ) from None
