"""SpatialData in Zarr, laid out as LazySlide lays its own out.

Layout (SpatialData container format 0.2: shapes 0.3, tables 0.2; written without the library)::

    <slide>.zarr               attrs spatialdata_attrs, tile_spec, slide_properties
    ├── shapes/tiles           GeoParquet: tile_id, x, y, a square each
    ├── shapes/nuclei_<method> GeoParquet: an outline each, with its measurements
    └── tables/<encoder>_tiles AnnData, see :mod:`wsi_engine.formats.anndata`; annotates ``tiles`` by ``tile_id``
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from wsi_engine.errors import FormatError
from wsi_engine.formats.anndata import REGION, keep_table, list_zarr, read_prediction, write_table
from wsi_engine.formats.elements import open_foreign, read_text, reading_zarr, replacing_folder
from wsi_engine.formats.keeping import import_each
from wsi_engine.formats.lazyslide import keep_lazyslide
from wsi_engine.formats.polygons import frame_tiles, read_polygons, write_polygons
from wsi_engine.formats.records import TiledFeatures
from wsi_engine.nuclei.instances import MEASUREMENTS, InstanceRecord, InstanceSet
from wsi_engine.nuclei.keeping import read_nuclei, stored_nuclei, write_nuclei
from wsi_engine.store import FeatureStore, features_key
from wsi_engine.version import __version__

MARKS = ("spatialdata_attrs",)
_NUCLEI = "nuclei_"
_OURS = "wsi_engine"
_AXES = [{"name": name, "type": "space", "unit": "unit"} for name in "xy"]


@dataclass(frozen=True)
class SpatialDataFiles:
    """The folder of one slide."""

    features: Path


def export_spatialdata(
    store: FeatureStore,
    out: Path,
    encoder: str | None = None,
    *,
    predictions: Path | None = None,
    overwrite: bool = False,
) -> SpatialDataFiles:
    """Write a store's features, tiles, attention and nuclei as SpatialData, ``<out>/<slide>.zarr``.

    ``spatialdata.read_zarr`` reads it, and LazySlide beside its slide; coordinates are level-0 pixels.

    Arguments and errors are those of :func:`~wsi_engine.formats.anndata.export_anndata`.

    Raises:
        SettingsError: pyarrow is not installed.
    """
    tiles = TiledFeatures.gather(store, encoder)
    extra = read_prediction(predictions, store.slide.name, len(tiles.grid))
    path = out / f"{store.slide.name}.zarr"
    with replacing_folder(path, MARKS, overwrite=overwrite) as draft:
        root = zarr.create_group(draft, zarr_format=3, attributes=_root_attributes(tiles))
        shapes = root.create_group("shapes")
        columns = {name: values for name, values in tiles.columns().items() if name in ("tile_id", "x", "y")}
        _write_shapes(shapes, REGION, draft, *frame_tiles(tiles.grid.origins, tiles.grid.tile_size_level0), columns)
        found = [read_nuclei(store, method) for method in stored_nuclei(store)]
        records = {_write_nuclei(shapes, draft, nuclei): nuclei.record.to_json() for nuclei in found}
        root.update_attributes({_OURS: {"nuclei": records}})
        name = f"{features_key(tiles.encoder)}_{REGION}"
        table = root.create_group("tables").create_group(name)
        write_table(table, tiles, extra)
        link = {"region": REGION, "region_key": "library_id", "instance_key": "tile_id", "version": "0.2"}
        table.update_attributes({"spatialdata-encoding-type": "ngff:regions_table", **link})
    return SpatialDataFiles(path)


def import_spatialdata(
    folder: Path, out: Path, encoder: str | None = None, slide_mpp: float | None = None
) -> list[Path]:
    """Read SpatialData folders into stores, one a slide: those of this engine, and those of LazySlide.

    Of a folder that this engine wrote, features, grids, attention and nuclei come back as they were; of LazySlide's,
    features and tiles.

    Args:
        folder: a SpatialData folder (``.zarr``), or a folder of them.
        out: folder of the stores.
        encoder: whose features; None for all there are.
        slide_mpp: micrometres per level-0 pixel, where LazySlide did not know it; not for folders of this engine.

    Raises:
        SettingsError: pyarrow is needed and not installed.
        FormatError: the layout is another, or something is damaged.
        StoreError: a store cannot be written or holds something else.
    """
    return import_each(list_zarr(folder), lambda path: _import_folder(path, out, encoder, slide_mpp))


def _import_folder(path: Path, out: Path, encoder: str | None, slide_mpp: float | None) -> Path:
    with reading_zarr(path):
        root = open_foreign(path)
        tables = root.get("tables")
        names = _list_tables(root, tables, encoder) if isinstance(tables, zarr.Group) else []
        if not names or not isinstance(tables, zarr.Group):
            raise FormatError(f"{path} holds no table of features{f' of {encoder}' if encoder else ''}")
        kept: Path | None = None
        for name in names:
            table = tables[name]
            if not isinstance(table, zarr.Group):
                raise ValueError(f"the table {name} is no group")
            if read_text(table, f"uns/{_OURS}/record") is not None:
                if slide_mpp is not None:
                    raise FormatError(f"{path} says itself how large a pixel is: leave out --slide-mpp")
                kept = keep_table(table, path, out, "spatialdata")
            else:
                kept = keep_lazyslide(root, table, name, path, out, slide_mpp)
        assert kept is not None
        _import_nuclei(root, path, kept)
        return kept


def _list_tables(root: zarr.Group, tables: zarr.Group, encoder: str | None) -> list[str]:
    """Names of the tables of features of an encoder, or of all, sorted; each is named after its tiles as well."""
    names = sorted(tables.group_keys())
    if encoder is None:
        return names
    tiles = {REGION, *(json.loads(json.dumps(dict(root.attrs))).get("tile_spec") or {})}
    wanted = {f"{key}_{shapes}" for key in (encoder, features_key(encoder)) for shapes in tiles}
    return [name for name in names if name in wanted]


def _root_attributes(tiles: TiledFeatures) -> dict[str, Any]:
    """What SpatialData and LazySlide look for at the top."""
    grid, slide = tiles.grid, tiles.slide
    factor = grid.mpp / slide.mpp[0]
    spec = {
        "height": grid.tile_px,
        "width": grid.tile_px,
        "stride_height": grid.stride_px,
        "stride_width": grid.stride_px,
        "mpp": grid.mpp,
        "ops_level": 0,
        "ops_downsample": factor,
        "base_level": 0,
        "base_downsample": factor,
        "tissue_name": None,
    }
    properties = {"shape": [slide.dimensions[1], slide.dimensions[0]], "mpp": slide.mpp[0]}
    return {
        "spatialdata_attrs": {"version": "0.2", "spatialdata_software_version": f"wsi-engine {__version__}"},
        "tile_spec": {REGION: spec},
        "slide_properties": properties,
    }


def _write_shapes(
    shapes: zarr.Group,
    name: str,
    root: Path,
    offsets: NDArray[np.int64],
    points: NDArray[Any],
    columns: Mapping[str, NDArray[Any]],
) -> None:
    """One element of shapes, in level-0 pixels."""
    identity = {
        "type": "identity",
        "input": {"name": "xy", "axes": _AXES},
        "output": {"name": "global", "axes": _AXES},
    }
    attributes = {
        "encoding-type": "ngff:shapes",
        "axes": ["x", "y"],
        "coordinateTransformations": [identity],
        "spatialdata_attrs": {"version": "0.3"},
    }
    shapes.create_group(name, attributes=attributes)
    write_polygons(root / "shapes" / name / "shapes.parquet", offsets, points, columns)


def _write_nuclei(shapes: zarr.Group, root: Path, nuclei: InstanceSet) -> str:
    """Outlines with their measurements; returns the name of the element."""
    table = nuclei.table()
    columns = {"nucleus_id": table.pop("id"), **table}
    name = f"{_NUCLEI}{features_key(nuclei.record.method)}"
    _write_shapes(shapes, name, root, nuclei.offsets, nuclei.points, columns)
    return name


def _import_nuclei(root: zarr.Group, path: Path, store: Path) -> None:
    """Nuclei that this engine exported; shapes of others are left alone."""
    ours = json.loads(json.dumps(dict(root.attrs))).get(_OURS) or {}
    for name, record in dict(ours.get("nuclei") or {}).items():
        if features_key(name) != name or not name.startswith(_NUCLEI):
            raise ValueError(f"nuclei under the name {name[:40]!r}")
        shapes = path / "shapes" / name / "shapes.parquet"
        if shapes.exists():
            slide = FeatureStore.open(store).slide
            write_nuclei(FeatureStore.create(store, slide), _read_nuclei(shapes, record))


def _read_nuclei(path: Path, record: dict[str, Any]) -> InstanceSet:
    wanted = ("x", "y", "area_um2", "score", *MEASUREMENTS)
    offsets, points, columns = read_polygons(path, wanted)
    missing = [name for name in wanted if name not in columns or columns[name].dtype.kind not in "iuf"]
    if missing:
        raise ValueError(f"{path.parent.name} lacks the measurement {missing[0]}")
    values = {name: columns[name].astype(np.float32) for name in wanted[2:]}
    return InstanceSet(
        offsets=offsets,
        points=points.astype(np.float32),
        centroid=np.stack([columns["x"], columns["y"]], axis=1).astype(np.float64),
        area=values.pop("area_um2"),
        score=values.pop("score"),
        measurements=values,
        record=InstanceRecord.from_json(record),
    )
