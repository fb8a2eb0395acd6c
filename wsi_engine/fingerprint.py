"""Telling one slide's content from another's without reading gigabytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SlideError
from wsi_engine.places import RemotePath, is_url

_ENDS = 1 << 20
_SAMPLES = 16
_SAMPLE = 1 << 16


def fingerprint_source(source: str | os.PathLike[str] | NDArray[np.uint8]) -> str:
    """SHA-256 over a slide's content, as 64 hex digits.

    An array is hashed whole with its shape. Of a file, its size, its first and last mebibyte and 16 samples
    of 64 KiB evenly between are hashed: enough to tell slides apart, and independent of name, folder and
    dates, so that a copy has the same fingerprint. Of an MRXS slide, the sizes of the data files count too.

    Raises:
        SlideError: the file cannot be read.
    """
    if isinstance(source, np.ndarray):
        digest = hashlib.sha256(repr((source.shape, source.dtype.str)).encode())
        digest.update(np.ascontiguousarray(source).data)
        return digest.hexdigest()
    path = os.fspath(source)
    try:
        if is_url(path):
            remote = RemotePath(path)
            size = remote.size()
            return _hash_ranges(size, remote.read_ranges(_sample(size))).hexdigest()
        with open(path, "rb") as local:
            size = local.seek(0, os.SEEK_END)
            digest = _hash_ranges(size, (_read(local, *one) for one in _sample(size)))
        beside = Path(path).with_suffix("")
        if path.lower().endswith(".mrxs") and beside.is_dir():
            for part in sorted(beside.iterdir()):
                digest.update(f"{part.name}:{part.stat().st_size};".encode())
        return digest.hexdigest()
    except OSError as error:
        where = path.split("?", 1)[0] if is_url(path) else path  # a signed URL carries its secret after the "?"
        raise SlideError(f"cannot read {where}: {error.strerror or error}") from error


def _sample(size: int) -> list[tuple[int, int]]:
    """Start and length of the parts of a file that are hashed."""
    if size <= 2 * _ENDS + _SAMPLES * _SAMPLE:
        return [(0, size)]
    inner = size - 2 * _ENDS - _SAMPLE
    starts = [_ENDS + inner * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    return [(0, _ENDS), *((start, _SAMPLE) for start in starts), (size - _ENDS, _ENDS)]


def _read(stream: BinaryIO, start: int, count: int) -> bytes:
    stream.seek(start)
    return stream.read(count)


def _hash_ranges(size: int, parts: Iterable[bytes]) -> hashlib._Hash:
    digest = hashlib.sha256(f"{size};".encode())
    for part in parts:
        digest.update(part)
    return digest
