"""LazySlide's tables of features, which say in other places than ours where tiles are.

Layout (LazySlide 0.7 with wsidata 0.8, a SpatialData folder)::

    <slide>.zarr                attrs tile_spec {tiles: {width, stride_width, mpp, base_downsample, …}},
                                slide_properties {shape (rows, columns), mpp, …}
    ├── shapes/tiles            GeoParquet: tile_id, tissue_id, a square each in level-0 px
    └── tables/<encoder>_tiles  AnnData: X; obs tile_id, library_id
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from wsi_engine.errors import FormatError
from wsi_engine.formats.elements import read_values
from wsi_engine.formats.hdf5 import check_number, keep_imported
from wsi_engine.formats.polygons import read_polygons
from wsi_engine.grid import TileGrid
from wsi_engine.slide_record import SlideRecord


def keep_lazyslide(
    root: zarr.Group, table: zarr.Group, name: str, path: Path, out: Path, slide_mpp: float | None
) -> Path:
    """Put one table of a LazySlide folder into a store named as the folder.

    Args:
        root: the SpatialData folder.
        table: one of its tables.
        name: the table's, ``<encoder>_<shapes>``.
        path: the folder's, for messages.
        out: folder of the stores.
        slide_mpp: micrometres per level-0 pixel; None for what LazySlide recorded.

    Raises:
        FormatError: the tiles, their size or the slide's scale are not told.
        ValueError, LookupError: something is damaged.
    """
    specs: Mapping[str, Any] = json.loads(json.dumps(dict(root.attrs))).get("tile_spec") or {}
    shapes = next((key for key in sorted(specs, key=len, reverse=True) if name.endswith(f"_{key}")), None)
    if shapes is None:
        raise FormatError(f"{path} does not say how large the tiles of its table {name} are (no tile_spec)")
    spec, properties = specs[shapes], _properties(root, path)
    mpp = slide_mpp if slide_mpp is not None else properties.get("mpp")
    if mpp is None:
        raise FormatError(f"{path} does not say how large a pixel is: pass --slide-mpp")
    mpp = check_number(mpp, "the slide's mpp", path)
    if spec["width"] != spec["height"] or spec["stride_width"] != spec["stride_height"]:
        raise FormatError(f"{path} has tiles of {spec['width']} × {spec['height']} px: only square ones can be kept")
    factor = check_number(spec["base_downsample"], "base_downsample", path)
    tile_px = int(check_number(spec["width"], "the tiles' width", path))
    origins = _origins(path / "shapes" / shapes / "shapes.parquet", read_values(table, "obs/tile_id", "iu", 1))
    rows, columns = properties["shape"]
    told = "override" if slide_mpp is not None else "LazySlide slide_properties"
    record = SlideRecord(path.name.removesuffix(".zarr"), "", (int(columns), int(rows)), (mpp, mpp), told, "", "")
    grid = TileGrid(
        origins=origins,
        tile_px=tile_px,
        stride_px=int(check_number(spec["stride_width"], "the tiles' stride", path)),
        mpp=mpp * factor,
        tile_size_level0=(tile_px * factor, tile_px * factor),
        lattice_tiles=len(origins),
    )
    encoder = name.removesuffix(f"_{shapes}")
    return keep_imported(out, record, grid, encoder, read_values(table, "X", "f", 2), {"format": "lazyslide"})


def _properties(root: zarr.Group, path: Path) -> dict[str, Any]:
    found: Any = json.loads(json.dumps(dict(root.attrs))).get("slide_properties")
    if not isinstance(found, dict) or len(found.get("shape") or ()) != 2:
        raise FormatError(f"{path} does not say how large its slide is (no slide_properties)")
    return found


def _origins(path: Path, wanted: NDArray[Any]) -> NDArray[np.int64]:
    """Level-0 corners (N, 2) of the tiles that a table names, in its order."""
    offsets, points, columns = read_polygons(path, ("tile_id",))
    ids = columns.get("tile_id", np.arange(len(offsets) - 1))
    if ids.dtype.kind not in "iu" or len(np.unique(ids)) != len(ids):
        raise ValueError(f"{path.parent.name} names a tile twice")
    order = np.argsort(ids)
    at = np.searchsorted(ids[order], wanted)
    if len(wanted) and (at.max(initial=0) >= len(ids) or not np.array_equal(ids[order][at], wanted)):
        raise ValueError(f"the table names a tile that {path.parent.name} has not")
    corners = np.minimum.reduceat(points, offsets[:-1], axis=0) if len(points) else np.zeros((0, 2))
    found: NDArray[np.int64] = np.rint(corners[order][at]).astype(np.int64)
    return found
