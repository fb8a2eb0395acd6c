"""Measurements of nuclei as a table on disk: CSV, or Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsi_engine.errors import SettingsError, StoreError
from wsi_engine.nuclei.instances import InstanceSet

_ROWS = 20_000


def write_csv(nuclei: InstanceSet, path: str | os.PathLike[str]) -> None:
    """Write the table of nuclei as CSV, some rows at a time; the file appears whole or not at all.

    Raises:
        StoreError: the file cannot be written.
    """
    table = nuclei.table()
    with _replacing(Path(path)) as draft, open(draft, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(table)
        for start in range(0, len(nuclei), _ROWS):
            columns = [values[start : start + _ROWS].tolist() for values in table.values()]
            digits = [
                ".0f" if name in ("id", "neighbours") else ".2f" if name in ("x", "y") else ".6g" for name in table
            ]
            texts = [[format(v, how) for v in column] for column, how in zip(columns, digits, strict=True)]
            writer.writerows(zip(*texts, strict=True))


def write_parquet(nuclei: InstanceSet, path: str | os.PathLike[str]) -> None:
    """Write the table of nuclei as Parquet; the file appears whole or not at all.

    Raises:
        SettingsError: pyarrow is not installed.
        StoreError: the file cannot be written.
    """
    check_parquet()
    pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    with _replacing(Path(path)) as draft:
        parquet.write_table(pyarrow.table(nuclei.table()), draft)


def check_parquet() -> None:
    """``SettingsError`` where Parquet cannot be written."""
    try:
        importlib.import_module("pyarrow")
    except ImportError:
        raise SettingsError(
            "Parquet needs the package pyarrow, which is not installed; pip install pyarrow, or write CSV"
        ) from None


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A draft beside the file, which takes its place at the end."""
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield draft
        os.replace(draft, target)
    except OSError as error:
        raise StoreError(f"cannot write the table {target}: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)
