"""Telling one slide's content from another's without reading gigabytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SlideError
from wsi_engine.readers.base import is_url

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
            import fsspec  # noqa: PLC0415 - only URLs need it

            with fsspec.open(path, "rb") as remote:
                return _hash_samples(cast(BinaryIO, remote)).hexdigest()
        with open(path, "rb") as local:
            digest = _hash_samples(local)
        beside = Path(path).with_suffix("")
        if path.lower().endswith(".mrxs") and beside.is_dir():
            for part in sorted(beside.iterdir()):
                digest.update(f"{part.name}:{part.stat().st_size};".encode())
        return digest.hexdigest()
    except OSError as error:
        raise SlideError(f"cannot read {path}: {error.strerror or error}") from error


def _hash_samples(stream: BinaryIO) -> hashlib._Hash:
    """Hash of the size, both ends and evenly spaced samples of an open file."""
    size = stream.seek(0, os.SEEK_END)
    digest = hashlib.sha256(f"{size};".encode())
    if size <= 2 * _ENDS + _SAMPLES * _SAMPLE:
        stream.seek(0)
        digest.update(stream.read())
        return digest
    inner = size - 2 * _ENDS - _SAMPLE
    starts = [_ENDS + inner * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    for start, count in [(0, _ENDS), *((start, _SAMPLE) for start in starts), (size - _ENDS, _ENDS)]:
        stream.seek(start)
        digest.update(stream.read(count))
    return digest
