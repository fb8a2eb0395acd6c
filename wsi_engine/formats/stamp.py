"""STAMP's features in HDF5.

Layout (STAMP 2.1, El Nahhas et al., Nature Protocols 2025)::

    <extractor>/<slide>.h5   feats float16 (N, D); coords float32 (N, 2), µm from the slide's corner
                             attributes of the file: stamp_version, extractor, unit, tile_size_um, tile_size_px,
                             code_hash, feat_type
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from wsi_engine.arrays import storing
from wsi_engine.errors import FormatError
from wsi_engine.formats import hdf5
from wsi_engine.formats.keeping import import_each
from wsi_engine.grid import TileGrid
from wsi_engine.slide_record import SlideRecord
from wsi_engine.store import FeatureStore, features_key
from wsi_engine.version import __version__

LAYOUT = "2.1.0"
"""Version of STAMP whose layout is written; STAMP refuses files of versions newer than its own."""

KEPT = "stamp_coords"
"""Array beside a grid's origins that keeps STAMP's own coordinates, which need not be whole pixels."""


@dataclass(frozen=True)
class StampFiles:
    """The one file of a slide."""

    features: Path


def export_stamp(store: FeatureStore, out: Path, encoder: str | None = None, *, overwrite: bool = False) -> StampFiles:
    """Write a store's coordinates and features as STAMP does, into ``<out>/<encoder>/<slide>.h5``.

    Features keep their type: STAMP itself writes float16 and reads float32 as well. A slide that came from STAMP gets
    its own coordinates and attributes back.

    Raises:
        StoreError: the store has no (complete) features of that encoder.
        FormatError: the file exists and ``overwrite`` is off, or cannot be written.
    """
    provenance = store.provenance(encoder)
    name = provenance["encoder"]["name"]
    grid = store.grid(provenance["grid"])
    origin = provenance.get("imported", {})
    features = store.features(encoder)
    coords, attrs = _coords_um(store.slide, grid), _file_attrs(name, grid)
    if origin.get("format") == "stamp":
        coords, attrs = _kept_coords(store, provenance["grid"], coords), dict(origin["coords"])
    path = out / features_key(name) / f"{store.slide.name}.h5"
    with hdf5.writing_hdf5(path, overwrite=overwrite) as file:
        file.create_dataset("coords", data=coords)
        file.create_dataset("feats", data=features)
        hdf5.write_attrs(file, attrs)
    return StampFiles(path)


def import_stamp(folder: Path, out: Path, encoder: str | None = None, slide_mpp: float | None = None) -> list[Path]:
    """Read STAMP's features, in a folder and those below it, into stores, one a slide.

    STAMP does not record how large a slide is: the store takes the extent of its tiles.

    Args:
        folder: holds ``<slide>.h5``.
        out: folder of the stores.
        encoder: name of the encoder; None for what the files say.
        slide_mpp: micrometres per level-0 pixel, which STAMP does not record.

    Raises:
        FormatError: the layout is another, a file is damaged, or ``slide_mpp`` is missing.
        StoreError: a store cannot be written or holds something else.
    """
    if slide_mpp is None:
        raise FormatError(f"STAMP's files in {folder} do not say how large a pixel is: pass --slide-mpp")
    mpp = hdf5.check_number(slide_mpp, "--slide-mpp", folder)
    found: dict[str, Path] = {}
    for place in [folder, *sorted(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())]:
        for slide_id in hdf5.list_slides(place, ".h5", needed=False):
            if slide_id in found:
                raise FormatError(f"{folder} holds {slide_id}.h5 twice ({found[slide_id].parent}, {place}): name one")
            found[slide_id] = place / f"{slide_id}.h5"
    if not found:
        raise FormatError(f"{folder} holds no *.h5 file: pass the folder that the other tool wrote")
    return import_each(sorted(found.items()), lambda one: _import_slide(one[1], one[0], out, encoder, mpp))


def _import_slide(path: Path, slide_id: str, out: Path, encoder: str | None, slide_mpp: float) -> Path:
    with hdf5.reading(path) as file:
        attrs = hdf5.read_attrs(file)
        if attrs.get("feat_type", "tile") != "tile" or attrs.get("unit", "um") != "um":
            raise ValueError(f"features of a {attrs.get('feat_type')} in {attrs.get('unit')}, not of tiles in um")
        features = hdf5.read_array(file, "feats", "f")
        coords = hdf5.read_array(file, "coords", "f", 2)
        side_um = hdf5.check_number(attrs.get("tile_size_um", attrs.get("tile_size")), "tile_size_um", path)
        tile_px = int(hdf5.check_number(attrs["tile_size_px"], "tile_size_px", path))
        name = encoder or str(attrs["extractor"])
        origins = _pixels(coords, slide_mpp)
    side = side_um / slide_mpp
    extent = np.ceil(origins.max(axis=0) + side).astype(int).tolist() if len(origins) else [1, 1]
    record = SlideRecord(slide_id, "", (extent[0], extent[1]), (slide_mpp, slide_mpp), "override", "", "")
    grid = TileGrid(
        origins=origins,
        tile_px=tile_px,
        stride_px=tile_px,
        mpp=side_um / tile_px,
        tile_size_level0=(side, side),
        lattice_tiles=len(origins),
    )
    kept = hdf5.keep_imported(out, record, grid, name, features, {"format": "stamp", "coords": attrs})
    _keep_coords(FeatureStore.create(kept, record), name, coords)
    return kept


def _pixels(coords: NDArray[Any], mpp: float) -> NDArray[np.int64]:
    """The nearest level-0 pixels (N, 2) of coordinates in µm."""
    pixels = np.rint(coords.astype(np.float64) / mpp)
    if not np.isfinite(pixels).all() or (len(pixels) and np.abs(pixels).max() > 2**40):
        raise ValueError("coordinates that no slide has")
    return pixels.astype(np.int64)


def _coords_um(slide: SlideRecord, grid: TileGrid) -> NDArray[np.float32]:
    found: NDArray[np.float32] = (grid.origins * np.asarray(slide.mpp)).astype(np.float32)
    return found


def _keep_coords(store: FeatureStore, encoder: str, coords: NDArray[Any]) -> None:
    """Keep STAMP's coordinates where whole pixels do not give them again, to the bit."""
    grid = store.provenance(encoder)["grid"]
    again = _coords_um(store.slide, store.grid(grid))
    if coords.dtype == again.dtype and coords.tobytes() == again.tobytes():
        return
    group = store.group(f"tiles/{grid}")
    with storing(store.path):
        codecs = [Crc32cCodec()]
        array = group.create_array(KEPT, shape=coords.shape, dtype=coords.dtype, compressors=codecs, overwrite=True)
        array[...] = coords


def _kept_coords(store: FeatureStore, grid: str, otherwise: NDArray[np.float32]) -> NDArray[Any]:
    kept = f"tiles/{grid}/{KEPT}"
    with storing(store.path):
        there = (store.place / kept / "zarr.json").exists()
    return store.read(kept) if there else otherwise


def _file_attrs(encoder: str, grid: TileGrid) -> dict[str, Any]:
    """The attributes that STAMP writes on its files."""
    return {
        "stamp_version": LAYOUT,
        "extractor": encoder,
        "unit": "um",
        "tile_size_um": grid.tile_px * grid.mpp,
        "tile_size_px": grid.tile_px,
        "code_hash": hashlib.sha256(f"wsi-engine {__version__}".encode()).hexdigest()[:8],
        "feat_type": "tile",
    }
