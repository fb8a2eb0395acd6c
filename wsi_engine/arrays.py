"""Zarr arrays as the engine writes them: checksummed, and what goes wrong with them told as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import zarr
from zarr.codecs import Crc32cCodec

from wsi_engine.errors import StoreError, WsiError, first_line
from wsi_engine.places import Place, RemotePath, is_url

EVERY_CHUNK = "every_chunk"
"""Attribute of arrays of which every chunk is a file, also where it holds nothing but the fill value."""

_ROWS_PER_CHUNK = 1024
_CHUNKS_PER_SHARD = 2


def open_group(place: Place, mode: Literal["r", "r+"]) -> zarr.Group:
    """The Zarr group at a place."""
    return zarr.open_group(_zarr_store(place, mode == "r"), mode=mode, zarr_format=3)


def create_group(place: Place, attributes: dict[str, Any]) -> None:
    """Make the Zarr group at a place."""
    zarr.create_group(_zarr_store(place, False), zarr_format=3, attributes=attributes)


def _zarr_store(place: Place, read_only: bool) -> Any:
    return place.zarr_store(read_only) if isinstance(place, RemotePath) else str(place)


@contextmanager
def storing(path: object) -> Iterator[None]:
    """Turn what goes wrong in Zarr, on the disk or on a server into a StoreError that names the store at ``path``."""
    try:
        yield
    except WsiError:
        raise
    except OSError as error:
        raise StoreError(f"cannot use the store {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise StoreError(f"there is not enough memory to use the store {path}: give the run more") from error
    except (ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, AttributeError, AssertionError) as error:
        raise StoreError(f"the store {path} is damaged ({first_line(error)}): delete it and extract again") from error
    except Exception as error:
        if not is_url(str(path)):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"  # every file system has errors of its own
        raise StoreError(f"cannot use the store {path}: {reason}") from error


def create_rows(
    group: zarr.Group, name: str, rows: int, dim: int, dtype: Literal["float16", "float32"], batch: int | None = None
) -> zarr.Array[Any]:
    """An empty features array (rows, dim), filled with NaN and checksummed.

    With ``batch`` every chunk is one batch, a file of its own; without, chunks of 1,024 rows are gathered in shards,
    so that thousands of slides do not make millions of files. Features do not compress; they are kept as they are.
    """
    chunk = batch or _ROWS_PER_CHUNK
    shards = None
    if batch is None:
        shards = (chunk * max(1, min(_CHUNKS_PER_SHARD, -(-rows // chunk))), dim)
    return group.create_array(
        name,
        shape=(rows, dim),
        dtype=dtype,
        chunks=(chunk, dim),
        shards=shards,
        compressors=checked_codecs(None),
        fill_value=float("nan"),
        overwrite=True,
    )


def checked_codecs(compressor: Literal["zstd"] | None) -> list[Any]:
    """Codecs that end in a checksum, so that a torn or rotten chunk is noticed when it is read."""
    return [*([zarr.codecs.ZstdCodec(level=3)] if compressor else []), Crc32cCodec()]
