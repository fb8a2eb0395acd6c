"""What the HDF5 formats share: checked reading, and writing that never leaves half a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import FormatError
from wsi_engine.grid import TileGrid
from wsi_engine.store import FeatureStore, SlideRecord
from wsi_engine.writer import FeatureIdentity, write_features


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file open for reading; whatever goes wrong becomes a FormatError that names it."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].strip("'\"")
        raise FormatError(f"{path} is missing, damaged or laid out otherwise ({reason})") from error


@contextmanager
def writing(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well."""
    if path.exists() and not overwrite:
        raise FormatError(f"{path} exists: choose another folder, or pass --overwrite")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise FormatError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_array(file: h5py.File, name: str, kinds: str, columns: int | None = None) -> NDArray[Any]:
    """A two-dimensional dataset of one of the NumPy kinds (``"f"``, ``"iu"``), with so many columns if given."""
    array = np.asarray(file[name])
    if array.ndim != 2 or array.dtype.kind not in kinds or (columns and array.shape[1] != columns):
        raise ValueError(f"dataset {name} has type {array.dtype} and shape {array.shape}")
    return array


def read_attrs(dataset: h5py.Dataset) -> dict[str, Any]:
    """Attributes of a dataset as plain JSON values."""
    return {name: _plain(value) for name, value in dataset.attrs.items()}


def write_attrs(dataset: h5py.Dataset, attrs: Mapping[str, Any]) -> None:
    """Set attributes one by one."""
    for name, value in attrs.items():
        dataset.attrs[name] = value


def list_slides(folder: Path, ending: str) -> list[str]:
    """Slide ids of the files ``<id><ending>`` in a folder, sorted.

    Raises:
        FormatError: there is none.
    """
    ids = sorted(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))
    if not ids:
        raise FormatError(f"{folder} holds no *{ending} file: pass the folder that the other tool wrote")
    return ids


def keep_imported(
    out: Path, record: SlideRecord, grid: TileGrid, encoder: str, features: NDArray[Any], attrs: dict[str, Any]
) -> Path:
    """Write another tool's features of one slide into a store of ours.

    ``attrs`` holds the other tool's own attributes, kept so that they can be written again unchanged.

    Raises:
        FormatError: features and coordinates differ in number, or the features are neither float16 nor float32.
        StoreError: the store cannot be written or holds something else.
    """
    if len(features) != len(grid):
        raise FormatError(f"{record.name} has {len(features)} features but {len(grid)} coordinates")
    if features.dtype not in (np.float16, np.float32):
        raise FormatError(f"the features of {record.name} have type {features.dtype}: float16 or float32 is needed")
    path = out / f"{record.name}.zarr"
    store = FeatureStore.create(path, record)
    name = f"{grid.tile_px}px_{grid.mpp:g}mpp" + (f"_stride{grid.stride_px}" if grid.stride_px != grid.tile_px else "")
    if store.grid_settings(name) is None:
        store.write_grid(name, grid, {"imported": attrs}, tissue=None)
    card = EncoderCard(
        name=encoder,
        builder="imported",
        architecture=encoder,
        input_px=grid.tile_px,
        dim=features.shape[1],
        pooling="none",
        licence="as the encoder's",
        weights=f"imported from {attrs['format']}",
    )
    dtype: Literal["float16", "float32"] = "float16" if features.dtype == np.float16 else "float32"
    identity = FeatureIdentity(card, name, store.grid(name), "imported", dtype)
    write_features(store, identity, features, attrs)
    return path


def _plain(value: Any) -> Any:
    """An HDF5 attribute as a JSON value."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value
