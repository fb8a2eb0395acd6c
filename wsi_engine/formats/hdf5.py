"""What the HDF5 formats share: checked reading, and writing that never leaves half a file."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import FormatError, WsiError, first_line
from wsi_engine.formats.keeping import keep_features
from wsi_engine.formats.probe import check_hdf5
from wsi_engine.grid import TileGrid
from wsi_engine.slide_record import SlideRecord

_SMALL = 1 << 26
"""Bytes of a dataset that is never doubted."""

_DEFLATE = 1032
"""Most bytes that Deflate can make of one (zlib's technical details): features never come near it."""

_MOST_ATTRIBUTE_BYTES = 1 << 16


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file open for reading; whatever goes wrong becomes a FormatError that names it."""
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise ValueError("no regular file")
        if path.exists():
            check_hdf5(path)
        with h5py.File(path, "r") as file:
            yield file
    except WsiError:
        raise
    except (OSError, LookupError, ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
        reason = first_line(error).strip("'\"")
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
    except (OSError, RuntimeError) as error:  # what HDF5 and torch raise
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise FormatError(f"cannot write {path}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_hdf5(path: Path, *, overwrite: bool) -> Iterator[h5py.File]:
    """A new HDF5 file that takes the place of ``path`` when the block ends well.

    It is made in memory first: where a disk is full, HDF5's library can crash the process, long after the error.
    """
    with writing(path, overwrite=overwrite) as temporary:
        image = io.BytesIO()
        with h5py.File(image, "w") as file:
            yield file
        temporary.write_bytes(image.getbuffer())


def read_array(file: h5py.File, name: str, kinds: str, columns: int | None = None) -> NDArray[Any]:
    """A two-dimensional dataset of one of the NumPy kinds (``"f"``, ``"iu"``), with so many columns if given.

    What lies in other files (external links, external or virtual datasets) is refused, and so is a dataset that
    declares far more values than the file can hold.
    """
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is a link to another place, or not there")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise ValueError(f"{name} is no dataset of this file alone")
    if dataset.ndim != 2 or dataset.dtype.kind not in kinds or (columns and dataset.shape[1] != columns):
        raise ValueError(f"dataset {name} has type {dataset.dtype} and shape {dataset.shape}")
    if dataset.nbytes > _SMALL and dataset.nbytes > _DEFLATE * dataset.id.get_storage_size():
        raise ValueError(f"dataset {name} declares {dataset.nbytes / 2**30:.3g} GiB that the file does not hold")
    return np.asarray(dataset)


def read_attrs(dataset: h5py.HLObject) -> dict[str, Any]:
    """Attributes of a dataset, or of a file, as plain JSON values."""
    found = {}
    for name in dataset.attrs:
        if dataset.attrs.get_id(name).get_storage_size() > _MOST_ATTRIBUTE_BYTES:
            raise ValueError(f"the attribute {name} is larger than {_MOST_ATTRIBUTE_BYTES} bytes")
        value = _plain(dataset.attrs[name], name)
        if isinstance(value, str | list) and len(value) > _MOST_ATTRIBUTE_BYTES:
            raise ValueError(f"the attribute {name} is longer than {_MOST_ATTRIBUTE_BYTES}")
        found[str(name)] = value
    return found


def write_attrs(dataset: h5py.HLObject, attrs: Mapping[str, Any]) -> None:
    """Set attributes one by one."""
    for name, value in attrs.items():
        dataset.attrs[name] = value


def check_number(value: Any, name: str, path: Path) -> float:
    """A positive, finite number of a sensible size, or FormatError."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    if not 1e-6 < number < 1e9:
        raise FormatError(f"{path} gives {name} as {str(value)[:40]}, which is no size in pixels or micrometres")
    return number


def list_slides(folder: Path, ending: str, *, needed: bool = True) -> list[str]:
    """Slide ids of the files ``<id><ending>`` in a folder, sorted; hidden files are left out.

    Raises:
        FormatError: there is none, and one is ``needed``.
    """
    paths = folder.glob(f"*{ending}") if folder.is_dir() else ()
    ids = sorted(path.name.removesuffix(ending) for path in paths if not path.name.startswith("."))
    if needed and not ids:
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
    return keep_features(out, record, grid, card, features, attrs)


def _plain(value: Any, name: str) -> Any:
    """An HDF5 attribute as a JSON value."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), name)
    if isinstance(value, list | tuple):
        return [_plain(one, name) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the attribute {name} is {value}")
    if not isinstance(value, str | bool | int | float):
        raise ValueError(f"the attribute {name} is a {type(value).__name__}")
    return value
