"""The files of one Zarr array: all there, none torn or rotten.

Every chunk that the engine writes ends in the CRC-32C of the bytes before it (Zarr v3 codec ``crc32c``), so that a file
is verified without decoding it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import google_crc32c

from wsi_engine.arrays import EVERY_CHUNK
from wsi_engine.extents import check_extent
from wsi_engine.places import Place, file_size, list_files
from wsi_engine.shards import ShardLayout, find_bad_tile

_CHECKSUM_BYTES = 4


@dataclass
class ArrayFiles:
    """What was found of an array's files.

    Attributes:
        problems: path from the array's folder, and what is wrong with the data there.
        strays: files that are none of the array's, paths from its folder.
        files: verified.
        bytes: of those.
    """

    problems: list[tuple[str, str]] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0


def verify_array(folder: Place, metadata: dict[str, Any], whole: bool) -> ArrayFiles:
    """Read every file of an array and compare checksums.

    Args:
        folder: of the array.
        metadata: its ``zarr.json``.
        whole: all files must be there.

    Raises:
        LookupError, TypeError, ValueError: the metadata describe no array.
        OSError: a file cannot be read.
    """
    found = ArrayFiles()
    shape, chunk = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    check_extent(folder, shape, 1, chunk)
    counts = [-(-size // side) for size, side in zip(shape, chunk, strict=True)]
    expected = {"/".join(map(str, ("c", *place))) for place in itertools.product(*map(range, counts))}
    there = {*list_files(folder)} - {"zarr.json"}
    found.strays = sorted(there - expected)
    whole = whole or metadata.get("attributes", {}).get(EVERY_CHUNK) is True
    layout = ShardLayout.of(folder, metadata)
    checksummed = layout is not None or metadata["codecs"][-1]["name"] == "crc32c"
    for name in sorted(expected, key=_natural):
        if name not in there:
            if whole:
                found.problems.append((name, "is missing"))
            continue
        problem = _verify_shard(layout, name) if layout else _verify_chunk(folder / name) if checksummed else None
        if problem:
            found.problems.append((name, problem))
        found.files += 1
        found.bytes += file_size(folder / name)
    return found


def _verify_chunk(path: Place) -> str | None:
    """What is wrong with a file that is one chunk."""
    data = path.read_bytes()
    if len(data) < _CHECKSUM_BYTES:
        return "is cut short"
    same = google_crc32c.value(data[:-_CHECKSUM_BYTES]) == int.from_bytes(data[-_CHECKSUM_BYTES:], "little")
    return None if same else "is torn or rotten (its checksum differs)"


def _verify_shard(layout: ShardLayout, name: str) -> str | None:
    """What is wrong with a file that is a shard of features."""
    try:
        for start, values in layout.read(int(name.split("/")[1])):
            bad = find_bad_tile(values)
            if bad is not None:
                return f"holds values that are not finite (tile {start + bad})"
    except ValueError as error:
        return f"is torn or rotten ({error})"
    return None


def _natural(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("/")[1:])
