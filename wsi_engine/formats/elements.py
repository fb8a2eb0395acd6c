"""Elements of AnnData on disk, written and read with Zarr alone.

Source: anndata's documentation, "On-disk format", encodings ``anndata`` 0.1.0, ``dataframe`` 0.2.0, ``array``,
``string-array``, ``categorical``, ``string`` and ``numeric-scalar`` 0.2.0, ``dict`` 0.1.0; Zarr format 3.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from wsi_engine.errors import FormatError, WsiError, first_line
from wsi_engine.extents import check_extent, walk_plain_files

_ROWS = 4096
_MOST_TEXT = 1 << 26
_MOST_METADATA = 1 << 26
_CODECS = frozenset(
    {"bytes", "crc32c", "gzip", "zlib", "zstd", "blosc", "lz4", "lzma", "bz2", "vlen-utf8", "shuffle", "delta"}
    | {"sharding_indexed", "transpose", "fixedscaleoffset", "adler32", "fletcher32"}
)
"""Codecs of foreign arrays that are run; ``pickle`` is one of those that are not."""


@contextmanager
def replacing_folder(path: Path, marks: Sequence[str], *, overwrite: bool) -> Iterator[Path]:
    """A folder to be filled, which takes the place of ``path`` when the block ends well.

    Only a folder of the same kind is ever removed: one whose ``zarr.json`` has an attribute among ``marks``.

    Raises:
        FormatError: ``path`` exists and ``overwrite`` is off or it is of another kind, or it cannot be written.
    """
    draft, old = (path.with_name(f".{path.name}.{os.getpid()}{end}") for end in ("", ".old"))
    try:
        if path.exists() or path.is_symlink():
            _refuse_to_replace(path, marks, overwrite=overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        yield draft
        _take_place(draft, path, old)
    except OSError as error:
        raise FormatError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _take_place(draft: Path, path: Path, old: Path) -> None:
    """Put the draft in the place of a folder, which is put back where that fails."""
    there = path.exists()
    if there:
        os.replace(path, old)
    try:
        os.replace(draft, path)
    except OSError:
        if there:
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _refuse_to_replace(path: Path, marks: Sequence[str], *, overwrite: bool) -> None:
    if not overwrite:
        raise FormatError(f"{path} exists: choose another folder, or pass --overwrite")
    try:
        attributes = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]
        ours = any(mark in attributes for mark in marks)
    except (OSError, ValueError, LookupError, TypeError):
        ours = False
    if path.is_symlink() or not ours:
        raise FormatError(f"{path} is something else than what would take its place: choose another folder")


def write_array(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    """A dense array, some thousand rows a chunk."""
    chunks = tuple(max(1, min(_ROWS, n) if axis == 0 else n) for axis, n in enumerate(values.shape))
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks=chunks or "auto", compressors=_codecs()
    )
    if values.size:
        array[...] = values
    array.update_attributes({"encoding-type": "array", "encoding-version": "0.2.0"})


def write_texts(group: zarr.Group, name: str, texts: Sequence[str]) -> None:
    """An array of texts."""
    array = group.create_array(
        name, shape=(len(texts),), dtype="string", chunks=(max(1, len(texts)),), compressors=_codecs()
    )
    if len(texts):
        array[...] = np.array(texts, dtype=object)
    array.update_attributes({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def write_categories(group: zarr.Group, name: str, texts: Sequence[str]) -> None:
    """Texts of which few differ: numbers and what they stand for."""
    names, codes = np.unique(np.array(texts, dtype=object).astype(str), return_inverse=True)
    inside = write_mapping(group, name, {"ordered": False}, kind="categorical", version="0.2.0")
    write_texts(inside, "categories", names.tolist())
    write_array(inside, "codes", codes.astype(np.int8 if len(names) < 128 else np.int32))


def write_frame(group: zarr.Group, name: str, index: Sequence[str], columns: Mapping[str, Any]) -> None:
    """A data frame: arrays, lists of texts, or tuples of texts of which few differ."""
    attributes = {"_index": "_index", "column-order": list(columns)}
    frame = write_mapping(group, name, attributes, kind="dataframe", version="0.2.0")
    write_texts(frame, "_index", index)
    for column, values in columns.items():
        if isinstance(values, tuple):
            write_categories(frame, column, values)
        elif isinstance(values, list):
            write_texts(frame, column, values)
        else:
            write_array(frame, column, values)


def write_text(group: zarr.Group, name: str, text: str) -> None:
    """One text."""
    array = group.create_array(name, shape=(), dtype="string", compressors=_codecs())
    array[...] = np.array(text, dtype=object)
    array.update_attributes({"encoding-type": "string", "encoding-version": "0.2.0"})


def write_mapping(
    group: zarr.Group,
    name: str,
    attributes: Mapping[str, Any] | None = None,
    kind: str = "dict",
    version: str = "0.1.0",
) -> zarr.Group:
    """A group with its encoding."""
    encoding = {"encoding-type": kind, "encoding-version": version}
    return group.create_group(name, attributes={**(attributes or {}), **encoding})


def open_foreign(path: Path) -> zarr.Group:
    """A group that another tool wrote, Zarr format 2 or 3, looked through before anything in it is read.

    Raises:
        ValueError: a file is no plain file, a link leads out of the folder, or an array has a codec not known here.
        OSError: it cannot be read.
    """
    size = 0
    for file in walk_plain_files(path):
        if file.name not in ("zarr.json", ".zarray", ".zgroup", ".zattrs"):
            continue
        size += file.stat().st_size
        if size > _MOST_METADATA:
            raise ValueError("more than 64 MiB of metadata")
        metadata = json.loads(file.read_bytes())
        if file.name == ".zarray":
            codecs = [metadata.get("compressor"), *(metadata.get("filters") or [])]
            _refuse_codecs([codec and codec.get("id") for codec in codecs], file.parent)
        elif file.name == "zarr.json" and metadata.get("node_type") == "array":
            _refuse_codecs(_list_codecs(metadata.get("codecs")), file.parent)
    return zarr.open_group(path, mode="r", use_consolidated=False)


@contextmanager
def reading_zarr(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a foreign Zarr becomes a FormatError that names it."""
    try:
        yield
    except WsiError:
        raise
    except (OSError, LookupError, ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError,
            AttributeError, NotImplementedError, AssertionError, RecursionError) as error:  # fmt: skip
        reason = first_line(error).strip("'\"")[:300]
        raise FormatError(f"{path} is missing, damaged or laid out otherwise ({reason})") from error


def read_values(group: zarr.Group, name: str, kinds: str, ndim: int) -> NDArray[Any]:
    """An array of one of the NumPy kinds; ValueError where it is another, or declares more than it holds."""
    array = group.get(name)
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{name} is {'sparse or a group' if array is not None else 'not there'}, not a dense array")
    if array.ndim != ndim or np.dtype(array.dtype).kind not in kinds:
        raise ValueError(f"{name} has type {array.dtype} and shape {array.shape}")
    _check_array(array)
    return np.asarray(array[...])


def read_text(group: zarr.Group, name: str) -> str | None:
    """One text; None where there is none."""
    array = group.get(name)
    if array is None:
        return None
    if not isinstance(array, zarr.Array) or array.ndim:
        raise ValueError(f"{name} is not a text")
    _check_array(array)
    value = np.asarray(array[...]).item()
    if not isinstance(value, str) or len(value) > _MOST_TEXT:
        raise ValueError(f"{name} is not a text")
    return value


def _check_array(array: zarr.Array[Any]) -> None:
    item = getattr(np.dtype(array.dtype), "itemsize", 0) or 16
    folder = Path(str(array.store_path.store.root)) / array.store_path.path  # type: ignore[attr-defined]
    check_extent(folder, array.shape, item, array.shards or array.chunks)


def _list_codecs(codecs: Any) -> list[Any]:
    """Names of codecs, those inside of shards too."""
    found: list[Any] = []
    for codec in codecs or []:
        found.append(codec.get("name"))
        inner = codec.get("configuration") or {}
        for key in ("codecs", "index_codecs"):
            found += _list_codecs(inner.get(key))
    return found


def _refuse_codecs(names: Sequence[Any], folder: Path) -> None:
    for name in names:
        if name is not None and str(name).removeprefix("numcodecs.") not in _CODECS:
            raise ValueError(f"{folder.name} has the codec {str(name)[:40]}, which is not run")


def _codecs() -> list[Any]:
    return [ZstdCodec(level=3), Crc32cCodec()]
