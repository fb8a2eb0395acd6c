"""Rows straight out of the shards of a features array, at the pace of the disk cache.

Zarr takes several copies, and a task for every chunk, to read what this engine writes: whole rows, uncompressed, each
chunk followed by its CRC-32C, gathered in shards with an index at the end (Zarr v3 sharding codec, version 1.0). Such
arrays are read here in one piece a shard; any other layout is left to Zarr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from wsi_engine.places import Place, open_binary

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CHECKSUM = {"name": "crc32c"}
_CHECKSUM_BYTES = 4
_PAGE = 4096

_ABSENT = 2**64 - 1
"""Offset and size, in a shard's index, of a chunk that was never written."""


@dataclass(frozen=True)
class ShardLayout:
    """A features array (rows, dim) whose shards can be read directly.

    Attributes:
        folder: the array's folder, or its URL.
        rows: tiles.
        dim: numbers per tile.
        dtype: ``float16`` or ``float32``.
        chunk_rows: rows in a chunk; the last chunk is as long as the others.
        shard_chunks: chunks in a shard, which is one file.
    """

    folder: Place
    rows: int
    dim: int
    dtype: str
    chunk_rows: int
    shard_chunks: int

    @classmethod
    def of(cls, folder: Place, metadata: dict[str, Any]) -> Self | None:
        """The layout that an array's ``zarr.json`` describes, or None where it is not exactly this engine's."""
        try:
            rows, dim = metadata["shape"]
            outer = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
            inner = metadata["codecs"][0]["configuration"]["chunk_shape"][0]
            layout = cls(folder, rows, dim, metadata["data_type"], inner, outer // max(1, inner))
            usable = sys.byteorder == "little" and layout.dtype in ("float16", "float32") and dim > 0 and inner > 0
            return layout if usable and layout._describes(metadata) else None
        except (LookupError, TypeError, ValueError):
            return None

    def _describes(self, metadata: dict[str, Any]) -> bool:
        """Whether the metadata say this and nothing more; what they leave out has its default."""
        codec = {
            "chunk_shape": [self.chunk_rows, self.dim],
            "codecs": [_BYTES, _CHECKSUM],
            "index_codecs": [_BYTES, _CHECKSUM],
            "index_location": "end",
        }
        wanted = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.rows, self.dim],
            "data_type": self.dtype,
            "fill_value": "NaN",
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.chunk_rows * self.shard_chunks, self.dim]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": codec}],
        }
        defaults: dict[str, Any] = {"attributes": {}, "dimension_names": None, "storage_transformers": []}
        free: dict[str, Any] = {"attributes": {}, "dimension_names": None}
        return defaults | metadata | free == defaults | wanted

    def read(self, only: int | None = None) -> Iterator[tuple[int, NDArray[Any]]]:
        """All rows, or those of one shard, in order, a chunk at a time: its first row and its rows (n, dim), good until
        the next.

        Raises:
            ValueError: a shard is missing or cut short, or a checksum differs.
            OSError: the disk refuses.
        """
        buffer = _allocate(0)
        count = -(-self.rows // (self.chunk_rows * self.shard_chunks))
        for number in range(count) if only is None else (only,):
            name = f"c/{number}/0"
            try:
                with open_binary(self.folder / name) as stream:
                    buffer, size = _read_file(stream, buffer)
            except FileNotFoundError:
                raise ValueError(f"shard {name} is missing") from None
            yield from self._read_shard(number, name, buffer[:size])

    def _read_shard(self, number: int, name: str, shard: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[Any]]]:
        index_bytes = 16 * self.shard_chunks
        end = len(shard) - index_bytes - _CHECKSUM_BYTES
        if end < 0:
            raise ValueError(f"shard {name} is cut short")
        index = _verify(shard[end:], f"the index of shard {name}").view("<u8").reshape(-1, 2).tolist()
        chunk_bytes = self.chunk_rows * self.dim * np.dtype(self.dtype).itemsize
        for place, (offset, size) in enumerate(index):
            start = (number * self.shard_chunks + place) * self.chunk_rows
            if start >= self.rows:
                return
            what = f"chunk {place} of shard {name}"
            if (offset, size) == (_ABSENT, _ABSENT):
                raise ValueError(f"{what} is missing")
            if size != chunk_bytes + _CHECKSUM_BYTES or offset + size > end:
                raise ValueError(f"{what} is cut short")
            values = _verify(shard[offset : offset + size], what).view(self.dtype).reshape(-1, self.dim)
            yield start, values[: self.rows - start]


def parse_metadata(text: bytes) -> dict[str, Any]:
    """What an array's ``zarr.json`` says.

    Raises:
        ValueError: it is no JSON object.
    """
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise ValueError("zarr.json of the features is not an object")
    return metadata


def find_bad_tile(values: NDArray[Any]) -> int | None:
    """The first row of values (N, D), float16 or float32, that holds NaN or infinity; None if there is none.

    Takes a tenth of the time of ``np.isfinite`` on float16: read as whole numbers, infinity and NaN lie above all
    other floats of their sign; signed numbers show it of the positive values and unsigned ones of the negative.
    """
    infinity = np.asarray(np.inf, values.dtype)
    kinds = [np.dtype(f"{kind}{values.dtype.itemsize}") for kind in "iu"]
    limits = [edge.view(kind) for edge, kind in zip((infinity, -infinity), kinds, strict=True)]
    if not values.size or all(values.view(kind).max() < limit for kind, limit in zip(kinds, limits, strict=True)):
        return None
    return int(np.argmin(np.isfinite(values).all(axis=1)))


def _verify(data: NDArray[np.uint8], what: str) -> NDArray[np.uint8]:
    """Bytes without the checksum that follows them, if it is theirs."""
    content, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if google_crc32c.value(content) != int.from_bytes(checksum.tobytes(), "little"):
        raise ValueError(f"the checksum of {what} differs")
    return content


def _read_file(stream: Any, buffer: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    """A whole file, into a new buffer where the given one is too small; and its size."""
    size = stream.seek(0, 2)
    stream.seek(0)
    if len(buffer) < size:
        buffer = _allocate(size)
    there = 0
    while there < size and (got := stream.readinto(buffer[there:size])):
        there += got
    return buffer, there


def _allocate(size: int) -> NDArray[np.uint8]:
    """Uninitialised bytes that begin on a page: the system copies pages onto pages twice as fast as between them."""
    memory = np.empty(size + _PAGE, np.uint8)
    start = -memory.ctypes.data % _PAGE
    return memory[start : start + size]
