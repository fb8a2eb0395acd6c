"""AnnData in Zarr: tiles are observations, features are variables.

Layout (anndata ≥ 0.8, "On-disk format"; written without the library)::

    <slide>.zarr
    ├── X               float16 or float32 (N, D), the features
    ├── obs             tile_id, library_id, x, y (level-0 px of the corner), attention_<run>…, and, where a table of
    │                   predictions is given, prediction and prob_<class>
    ├── var             the names of the features
    ├── obsm/spatial    float64 (N, 2), centres of the tiles in level-0 px
    └── uns             spatialdata_attrs; wsi_engine/record, JSON: slide, grid, encoder, provenance
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from wsi_engine.errors import FormatError
from wsi_engine.formats.elements import (
    open_foreign,
    read_text,
    read_values,
    reading_zarr,
    replacing_folder,
    write_array,
    write_frame,
    write_mapping,
    write_text,
)
from wsi_engine.formats.keeping import import_each
from wsi_engine.formats.records import TiledFeatures, keep_recorded, needed_columns
from wsi_engine.predictions import read_lines
from wsi_engine.store import FeatureStore, features_key

REGION = "tiles"
"""Name of the tiles among the shapes of a SpatialData folder, which tables refer to."""

MARKS = ("encoding-type",)
_EMPTY = ("layers", "obsp", "varm", "varp")
_OURS = "wsi_engine"


@dataclass(frozen=True)
class AnnDataFiles:
    """The folder of one slide."""

    features: Path


def export_anndata(
    store: FeatureStore,
    out: Path,
    encoder: str | None = None,
    *,
    predictions: Path | None = None,
    overwrite: bool = False,
) -> AnnDataFiles:
    """Write a store's features as AnnData, ``<out>/<slide>.zarr``, which ``anndata.read_zarr`` reads.

    Args:
        store: the slide.
        out: folder to write to.
        encoder: whose features; None for the only ones there are.
        predictions: ``predictions.csv`` of ``wsi classify`` or ``wsi train``; the slide's row becomes columns.
        overwrite: replace an AnnData folder that exists.

    Raises:
        StoreError: the store has no (complete) features of that encoder.
        InputError: the table of predictions cannot be read.
        FormatError: the folder exists and ``overwrite`` is off, or cannot be written.
    """
    tiles = TiledFeatures.gather(store, encoder)
    extra = read_prediction(predictions, store.slide.name, len(tiles.grid))
    path = out / f"{store.slide.name}.zarr"
    with replacing_folder(path, MARKS, overwrite=overwrite) as draft:
        write_table(zarr.create_group(draft, zarr_format=3), tiles, extra)
    return AnnDataFiles(path)


def write_table(group: zarr.Group, tiles: TiledFeatures, extra: Mapping[str, Any]) -> None:
    """Fill a group with the features and what is known of the tiles; ``extra`` are more columns."""
    places = tiles.columns()
    columns = {"tile_id": places.pop("tile_id"), "library_id": (REGION,) * len(tiles.grid), **places, **extra}
    write_array(group, "X", tiles.features)
    write_frame(group, "obs", [str(number) for number in range(len(tiles.grid))], columns)
    write_frame(group, "var", tiles.names, {})
    write_array(write_mapping(group, "obsm"), "spatial", tiles.centres())
    for name in _EMPTY:
        write_mapping(group, name)
    uns = write_mapping(group, "uns")
    link = write_mapping(uns, "spatialdata_attrs")
    for name, text in (("region", REGION), ("region_key", "library_id"), ("instance_key", "tile_id")):
        write_text(link, name, text)
    write_text(write_mapping(uns, _OURS), "record", tiles.record())
    group.update_attributes({"encoding-type": "anndata", "encoding-version": "0.1.0"})


def import_anndata(folder: Path, out: Path) -> list[Path]:
    """Read AnnData folders that this engine wrote, or that were made of such, into stores, one a slide.

    Tiles may have been left out or put in another order meanwhile; what other tools added is not read.

    Args:
        folder: an AnnData folder (``.zarr``), or a folder of them.
        out: folder of the stores.

    Raises:
        FormatError: the layout is another, something is damaged, or the slide and its scale are not told.
        StoreError: a store cannot be written or holds something else.
    """
    return import_each(list_zarr(folder), lambda path: _import_table(path, out))


def _import_table(path: Path, out: Path) -> Path:
    with reading_zarr(path):
        return keep_table(open_foreign(path), path, out, "anndata")


def keep_table(group: zarr.Group, path: Path, out: Path, origin: str) -> Path:
    """Put the table in a group into a store, by the record that it carries.

    Raises:
        FormatError: it carries none.
        ValueError: it is damaged.
    """
    if group.attrs.get("encoding-type") != "anndata":
        raise ValueError("not an AnnData group")
    text = read_text(group, f"uns/{_OURS}/record")
    if text is None:
        raise FormatError(
            f"{path} does not say which slide its tiles are of and how large they are: import the SpatialData folder "
            "that it belongs to"
        )
    columns = {name: read_values(group, f"obs/{name}", "iuf", 1) for name in needed_columns(text)}
    return keep_recorded(text, read_values(group, "X", "f", 2), columns, out, origin)


def list_zarr(folder: Path) -> list[Path]:
    """The folder itself where it is a Zarr group, else the ``*.zarr`` in it, by name.

    Raises:
        FormatError: there is none.
    """
    if any((folder / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs")):
        return [folder]
    found = sorted(path for path in folder.glob("*.zarr") if not path.name.startswith(".")) if folder.is_dir() else []
    if not found:
        raise FormatError(f"{folder} holds no *.zarr folder: pass the folder that the other tool wrote")
    return found


def read_prediction(path: Path | None, slide_id: str, count: int) -> dict[str, Any]:
    """What a table of predictions says of a slide, as columns of its ``count`` tiles: all rows alike.

    Raises:
        InputError: the table cannot be read.
    """
    if path is None:
        return {}
    lines = read_lines(path, ("slide_id", "prediction"))
    rows = [row for row, name in enumerate(lines.slide_ids) if name == slide_id]
    if not rows:
        return {}
    shares: NDArray[np.float64] = lines.probabilities()[rows].mean(axis=0)
    found: dict[str, Any] = {"prediction": (lines.classes[int(shares.argmax())],) * count}
    keys = [features_key(name) for name in lines.classes]
    if len(set(keys)) < len(keys):  # classes that differ in signs alone that no name of a column has
        keys = [str(number) for number in range(len(keys))]
    return found | {f"prob_{key}": np.full(count, share) for key, share in zip(keys, shares, strict=True)}
