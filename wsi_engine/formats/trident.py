"""TRIDENT's coordinates and features in HDF5.

Layout (TRIDENT 0.2, Zhang et al. 2025)::

    <mag>x_<px>px_<overlap>px_overlap/
    ├── patches/<slide>_patches.h5     coords int64 (N, 2), level-0 x, y, with attributes
    └── features_<encoder>/<slide>.h5  features (N, D) and coords with the same attributes
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import FormatError
from wsi_engine.formats import hdf5
from wsi_engine.formats.keeping import import_each
from wsi_engine.grid import TileGrid
from wsi_engine.slide_record import SlideRecord
from wsi_engine.store import FeatureStore, features_key

UM_PER_PX_AT_1X = 10.0
"""TRIDENT's convention: 20x is 0.5 µm per pixel."""

_OBJECTIVES = (1, 2, 5, 10, 20, 40, 60, 80)
"""Magnifications that there are."""


@dataclass(frozen=True)
class TridentFiles:
    """The two files of one slide."""

    coords: Path
    features: Path


def export_trident(
    store: FeatureStore, out: Path, encoder: str | None = None, *, overwrite: bool = False
) -> TridentFiles:
    """Write a store's coordinates and features as TRIDENT does.

    Features keep their type. A grid that came from TRIDENT gets its own attributes back. Coordinates are shared by all
    encoders of a job folder, and written where they are not there yet.

    Raises:
        StoreError: the store has no (complete) features of that encoder.
        FormatError: the features exist, or coordinates of other tiles, and ``overwrite`` is off, or a file cannot be
            written.
    """
    provenance = store.provenance(encoder)
    name = provenance["encoder"]["name"]
    features = store.features(encoder)
    grid = store.grid(provenance["grid"])
    origin = provenance.get("imported", {})
    overlap = grid.tile_px - grid.stride_px
    job = out / f"{_number(UM_PER_PX_AT_1X / grid.mpp)}x_{grid.tile_px}px_{overlap}px_overlap"
    slide_id = store.slide.name
    folder = job / f"features_{features_key(name)}"
    files = TridentFiles(job / "patches" / f"{slide_id}_patches.h5", folder / f"{slide_id}.h5")
    attrs = origin.get("coords") if origin.get("format") == "trident" else None
    attrs = attrs or _coords_attrs(store.slide, grid, files.coords.parent)
    _write_coords(files.coords, grid, attrs, overwrite=overwrite)
    with hdf5.writing_hdf5(files.features, overwrite=overwrite) as file:
        data = file.create_dataset("features", data=features)
        hdf5.write_attrs(data, {"name": slide_id, "savetodir": str(folder), "encoder": name})
        hdf5.write_attrs(file.create_dataset("coords", data=grid.origins), attrs)
    return files


def _write_coords(path: Path, grid: TileGrid, attrs: dict[str, Any], *, overwrite: bool) -> None:
    """Write coordinates, or leave those of another encoder's export, which must be the same."""
    if path.exists():
        if _holds_coords(path, grid, attrs):
            return
        if not overwrite:
            raise FormatError(f"{path} holds other tiles: choose another folder, or pass --overwrite")
    with hdf5.writing_hdf5(path, overwrite=True) as file:
        hdf5.write_attrs(file.create_dataset("coords", data=grid.origins), attrs)


def _holds_coords(path: Path, grid: TileGrid, attrs: dict[str, Any]) -> bool:
    """Whether a file holds these coordinates with these attributes, wherever it was first written."""
    try:
        with hdf5.reading(path) as file:
            origins, found = hdf5.read_array(file, "coords", "iu", 2), hdf5.read_attrs(file["coords"])
    except FormatError:
        return False
    here = {"savetodir": attrs.get("savetodir")}
    return np.array_equal(origins, grid.origins) and found | here == attrs | here


def import_trident(folder: Path, out: Path, encoder: str | None = None, slide_mpp: float | None = None) -> list[Path]:
    """Read a TRIDENT job folder (``…x_…px_…px_overlap``) into stores, one a slide.

    TRIDENT stores magnifications, not micrometres; the slide's mpp becomes 10 / level0_magnification unless
    ``slide_mpp`` gives the true one.

    Args:
        folder: the job folder, which holds ``features_<encoder>``.
        out: folder of the stores.
        encoder: which features; None for the only ones there are.
        slide_mpp: micrometres per level-0 pixel.

    Raises:
        FormatError: the layout is another, or a file is damaged.
        StoreError: a store cannot be written or holds something else.
    """
    features = _features_folder(folder, encoder)
    slides = hdf5.list_slides(features, ".h5")
    return import_each(slides, lambda slide_id: _import_slide(features, slide_id, out, slide_mpp))


def _import_slide(folder: Path, slide_id: str, out: Path, slide_mpp: float | None) -> Path:
    path = folder / f"{slide_id}.h5"
    with hdf5.reading(path) as file:
        features = hdf5.read_array(file, "features", "f")
        coords = hdf5.read_array(file, "coords", "iu", 2)
        attrs = hdf5.read_attrs(file["coords"])
        encoder = str(hdf5.read_attrs(file["features"]).get("encoder", folder.name.removeprefix("features_")))
        mpp = UM_PER_PX_AT_1X / hdf5.check_number(attrs["level0_magnification"], "level0_magnification", path)
        mpp = mpp if slide_mpp is None else hdf5.check_number(slide_mpp, "--slide-mpp", path)
        record = SlideRecord(
            name=slide_id,
            fingerprint="",
            dimensions=(int(attrs["level0_width"]), int(attrs["level0_height"])),
            mpp=(mpp, mpp),
            mpp_source="override" if slide_mpp is not None else "TRIDENT level0_magnification",
            vendor="",
            reader="",
        )
        grid = _read_grid(coords, attrs, path)
    return hdf5.keep_imported(out, record, grid, encoder, features, {"format": "trident", "coords": attrs})


def _read_grid(coords: NDArray[Any], attrs: dict[str, Any], path: Path) -> TileGrid:
    tile_px = int(hdf5.check_number(attrs["patch_size"], "patch_size", path))
    side = hdf5.check_number(attrs["patch_size_level0"], "patch_size_level0", path)
    return TileGrid(
        origins=coords.astype(np.int64),
        tile_px=tile_px,
        stride_px=tile_px - int(attrs["overlap"]),
        mpp=UM_PER_PX_AT_1X / hdf5.check_number(attrs["target_magnification"], "target_magnification", path),
        tile_size_level0=(side, side),
        lattice_tiles=len(coords),
    )


def _coords_attrs(slide: SlideRecord, grid: TileGrid, folder: Path) -> dict[str, Any]:
    """The attributes that TRIDENT writes beside coordinates."""
    return {
        "patch_size": grid.tile_px,
        "patch_size_level0": round(sum(grid.tile_size_level0) / 2),
        "level0_magnification": _whole(UM_PER_PX_AT_1X / slide.mpp[0]),
        "target_magnification": _whole(UM_PER_PX_AT_1X / grid.mpp),
        "overlap": grid.tile_px - grid.stride_px,
        "name": slide.name,
        "savetodir": str(folder),
        "level0_width": slide.dimensions[0],
        "level0_height": slide.dimensions[1],
    }


def _features_folder(folder: Path, encoder: str | None) -> Path:
    if encoder:
        return folder / f"features_{features_key(encoder)}"
    there = sorted(path for path in folder.glob("features_*") if path.is_dir())
    if len(there) != 1:
        names = ", ".join(path.name for path in there) or "none"
        raise FormatError(f"{folder} holds {len(there)} features_<encoder> folders ({names}): name one with --encoder")
    return there[0]


def _whole(magnification: float) -> int | float:
    """A magnification as TRIDENT writes it: that of an objective where it is one within 5 %, as for 0.2525 µm (40x)."""
    near = min(_OBJECTIVES, key=lambda power: abs(power - magnification))
    return near if abs(near - magnification) < 0.05 * near else magnification


def _number(value: float) -> str:
    return f"{_whole(value):g}"
