"""CLAM's coordinates and features in HDF5 and torch files.

Layout (Lu et al., Nature BME 2021; its public scripts)::

    patches/<slide>.h5    coords int (N, 2), level-0 x, y, with attributes
    h5_files/<slide>.h5   features float32 (N, D), coords int32 (N, 2)
    pt_files/<slide>.pt   the features as a bare tensor
"""

from __future__ import annotations

import io
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
from wsi_engine.store import FeatureStore


@dataclass(frozen=True)
class ClamFiles:
    """The three files of one slide."""

    coords: Path
    features: Path
    tensor: Path


def export_clam(store: FeatureStore, out: Path, encoder: str | None = None, *, overwrite: bool = False) -> ClamFiles:
    """Write a store's coordinates and features as CLAM does; features become float32, which loses nothing.

    Raises:
        StoreError: the store has no (complete) features of that encoder.
        FormatError: a file exists and ``overwrite`` is off, or cannot be written.
    """
    import torch  # noqa: PLC0415 - only CLAM's .pt files need it

    provenance = store.provenance(encoder)
    grid = store.grid(provenance["grid"])
    features = store.features(encoder).astype(np.float32)
    slide_id = store.slide.name
    files = ClamFiles(
        out / "patches" / f"{slide_id}.h5", out / "h5_files" / f"{slide_id}.h5", out / "pt_files" / f"{slide_id}.pt"
    )
    origin = provenance.get("imported", {})
    attrs = origin.get("coords") if origin.get("format") == "clam" else None
    attrs = attrs or _coords_attrs(store.slide, grid, files.coords.parent)
    with hdf5.writing_hdf5(files.coords, overwrite=overwrite) as file:
        hdf5.write_attrs(file.create_dataset("coords", data=grid.origins), attrs)
    with hdf5.writing_hdf5(files.features, overwrite=overwrite) as file:
        file.create_dataset("features", data=features)
        file.create_dataset("coords", data=grid.origins.astype(np.int32))
    with hdf5.writing(files.tensor, overwrite=overwrite) as temporary:
        image = io.BytesIO()
        torch.save(torch.from_numpy(features), image)
        temporary.write_bytes(image.getbuffer())
    return files


def import_clam(folder: Path, out: Path, encoder: str, slide_mpp: float | None = None) -> list[Path]:
    """Read a folder of CLAM's into stores, one a slide.

    Args:
        folder: holds ``patches``, and ``h5_files`` or, where there is none, ``pt_files``.
        out: folder of the stores.
        encoder: name of the encoder that made the features, which CLAM does not record.
        slide_mpp: micrometres per level-0 pixel, which CLAM does not record either.

    Raises:
        FormatError: the layout is another, a file is damaged, or ``slide_mpp`` is missing.
        StoreError: a store cannot be written or holds something else.
    """
    if slide_mpp is None:
        raise FormatError(f"CLAM's files in {folder} do not say how large a pixel is: pass --slide-mpp")
    mpp = hdf5.check_number(slide_mpp, "--slide-mpp", folder)
    if not (folder / "h5_files").is_dir() and (folder / "pt_files").is_dir():
        slides = hdf5.list_slides(folder / "pt_files", ".pt")
    else:
        slides = hdf5.list_slides(folder / "h5_files", ".h5")
    return import_each(slides, lambda slide_id: _import_slide(folder, slide_id, out, encoder, mpp))


def _import_slide(folder: Path, slide_id: str, out: Path, encoder: str, slide_mpp: float) -> Path:
    path = folder / "patches" / f"{slide_id}.h5"
    with hdf5.reading(path) as file:
        laid = hdf5.read_array(file, "coords", "iu", 2).astype(np.int64)
        attrs = hdf5.read_attrs(file["coords"])
        tile_px = int(hdf5.check_number(attrs["patch_size"], "patch_size", path))
        downsample = tuple(float(value) for value in np.broadcast_to(np.asarray(attrs["downsample"], float), 2))
        width, height = (round(n * d) for n, d in zip(attrs["level_dim"], downsample, strict=True))
    features, coords = _read_features(folder, slide_id, laid)
    if not np.array_equal(laid, coords):
        raise FormatError(f"patches/{slide_id}.h5 and h5_files/{slide_id}.h5 in {folder} have different coordinates")
    record = SlideRecord(slide_id, "", (width, height), (slide_mpp, slide_mpp), "override", "", "")
    grid = TileGrid(
        origins=coords,
        tile_px=tile_px,
        stride_px=tile_px,
        mpp=slide_mpp * downsample[0],
        tile_size_level0=(tile_px * downsample[0], tile_px * downsample[1]),
        lattice_tiles=len(coords),
    )
    return hdf5.keep_imported(out, record, grid, encoder, features, {"format": "clam", "coords": attrs})


def _read_features(folder: Path, slide_id: str, laid: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Features and their coordinates; a bare tensor has none of its own."""
    if not (folder / "h5_files").is_dir():
        return _read_tensor(folder / "pt_files" / f"{slide_id}.pt"), laid
    with hdf5.reading(folder / "h5_files" / f"{slide_id}.h5") as file:
        return hdf5.read_array(file, "features", "f"), hdf5.read_array(file, "coords", "iu", 2).astype(np.int64)


def _read_tensor(path: Path) -> NDArray[Any]:
    """A bare tensor (N, D) from a file of ``torch.save``, in which nothing is run."""
    import torch  # noqa: PLC0415

    try:
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FormatError(
            f"{path} is missing, damaged or holds Python objects other than a tensor, which are refused because they "
            "could run code"
        ) from error
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta
    if not plain or tensor.dtype not in (torch.float16, torch.float32) or tensor.ndim != 2:
        what = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise FormatError(f"{path} holds {what}: one tensor (N, D) of float16 or float32 is needed")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FormatError(f"{path} declares {tensor.numel()} values and holds fewer: save the tensor again")
    values: NDArray[Any] = tensor.detach().numpy()
    return values


def _coords_attrs(slide: SlideRecord, grid: TileGrid, folder: Path) -> dict[str, Any]:
    """The attributes that CLAM writes beside coordinates; tiles are described in level-0 pixels."""
    size = np.asarray(slide.dimensions)
    return {
        "patch_size": round(sum(grid.tile_size_level0) / 2),
        "patch_level": 0,
        "downsample": np.ones(2),
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": slide.name,
        "save_path": str(folder),
    }
