"""Whether the files of an array can hold what its metadata declare, found out before any memory is taken for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.places import Place, RemotePath

_SMALL = 1 << 26
"""Bytes of an array that is never doubted."""

_SPARSE = 16
"""How many times larger than its chunks on disk an array may be: chunks of the fill value alone are not written."""

_MOST_FILES = 1 << 20
_MOST_JSON = 1 << 26
_LONGEST = 1 << 24
"""Largest length of an axis but the first."""


def check_extent(folder: Place, shape: Sequence[Any], item_bytes: int, chunk_shape: Sequence[Any]) -> None:
    """Refuse an array that declares far more than its chunks can hold, or has chunks that are no plain files.

    Args:
        folder: of the array, which holds its ``zarr.json`` (or ``.zarray``) and its chunks.
        shape: as declared.
        item_bytes: bytes of one value.
        chunk_shape: of what one file holds: a shard, or a chunk where there are no shards.

    Raises:
        ValueError: such an array; the message completes "is damaged (…)".
        OSError: the folder cannot be read.
    """
    sizes, chunk = [int(n) for n in shape], [int(n) for n in chunk_shape]
    if any(n < 0 for n in sizes) or any(n < 1 for n in chunk) or any(n > _LONGEST for n in sizes[1:]):
        raise ValueError(f"{folder.name} has the shape {tuple(sizes)} in chunks of {tuple(chunk)}")
    declared, held = _product(sizes) * item_bytes, _product(chunk) * item_bytes
    if isinstance(folder, Path):
        files = sum(1 for _ in walk_plain_files(folder))
    else:  # objects are plain, and to list them takes longer
        files = len(folder.files()) if declared > _SMALL else 1
    if declared > _SMALL and declared > _SPARSE * held * files:
        raise ValueError(f"{folder.name} declares {declared / 2**30:.3g} GiB and has {files} files")
    if held > _SMALL and held > _SPARSE * max(declared, 1):
        raise ValueError(f"{folder.name} has chunks of {held / 2**30:.3g} GiB for {declared} bytes")


def read_array(group: Any, path: str, folder: Place) -> NDArray[Any]:
    """An array of a Zarr group, whole, with its files looked at before any of them is opened.

    Args:
        group: the ``zarr.Group``.
        path: of the array in it.
        folder: of the array on disk.

    Raises:
        ValueError: as :func:`check_extent`, or there is a group at the path.
        OSError, KeyError: it is not there or cannot be read.
    """
    if isinstance(folder, Path):
        for _ in walk_plain_files(folder):  # opening reads zarr.json, which may be a pipe
            pass
    array = group[path]
    if not hasattr(array, "chunks"):
        raise ValueError(f"{path} is a group")
    check_extent(folder, array.shape, array.dtype.itemsize, array.shards or array.chunks)
    return np.asarray(array[...])


def read_json(path: Place) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: it is no JSON, nested beyond sense, larger than 64 MiB, or no plain file.
        OSError: it is not there or cannot be read.
    """
    if isinstance(path, RemotePath):
        return _parse(path.name, path.read_bytes(_MOST_JSON))
    state = os.stat(path)
    if not S_ISREG(state.st_mode):
        raise ValueError(f"{path.name} is no plain file")
    if state.st_size > _MOST_JSON:
        raise ValueError(f"{path.name} has {state.st_size} bytes")
    return _parse(path.name, path.read_bytes())


def _parse(name: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} is nested beyond sense") from None


def walk_plain_files(folder: Path) -> Iterator[Path]:
    """Files below a folder, at any depth.

    Raises:
        ValueError: one is no plain file (a pipe would wait for ever, a device never end), a link leads out of the
            folder, or there are more than a million.
        OSError: the folder cannot be read.
    """
    root = os.path.realpath(folder)
    waiting, seen = [folder], 0
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                seen += 1
                if seen > _MOST_FILES:
                    raise ValueError(f"{folder.name} holds more than {_MOST_FILES} files")
                if entry.is_symlink() and not os.path.realpath(entry.path).startswith(root + os.sep):
                    raise ValueError(f"{entry.name} is a link that leads out of {folder.name}")
                mode = entry.stat().st_mode
                if S_ISDIR(mode):
                    if entry.is_symlink():
                        raise ValueError(f"{entry.name} in {folder.name} is a link to a folder")
                    waiting.append(Path(entry.path))
                elif S_ISREG(mode):
                    yield Path(entry.path)
                else:
                    raise ValueError(f"{entry.name} in {folder.name} is no plain file")


def _product(numbers: Sequence[int]) -> int:
    found = 1
    for number in numbers:
        found *= number
    return found
