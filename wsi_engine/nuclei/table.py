"""Measurements of nuclei as a table on disk: CSV, or Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import importlib
import os

from wsi_engine.errors import SettingsError
from wsi_engine.nuclei.drafts import replacing
from wsi_engine.nuclei.instances import InstanceSet

_ROWS = 20_000


def write_csv(nuclei: InstanceSet, path: str | os.PathLike[str]) -> None:
    """Write the table of nuclei as CSV, some rows at a time; the file appears whole or not at all.

    Raises:
        StoreError: the file cannot be written.
    """
    table = nuclei.table()
    with replacing(path, "the table") as draft, open(draft, "w", newline="", encoding="utf-8") as stream:
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
    with replacing(path, "the table") as draft:
        parquet.write_table(pyarrow.table(nuclei.table()), draft)


def check_parquet() -> None:
    """``SettingsError`` where Parquet cannot be written."""
    try:
        importlib.import_module("pyarrow")
    except ImportError:
        raise SettingsError(
            "Parquet needs the package pyarrow, which is not installed; pip install pyarrow, or write CSV"
        ) from None
