"""Rows of a CSV as people and their spreadsheets leave them: lists of slides and cohorts are read by this alone."""

from __future__ import annotations

import csv
import io
from itertools import zip_longest
from typing import TypeAlias

from wsi_engine.errors import InputError
from wsi_engine.places import Place

Records: TypeAlias = list[tuple[str, dict[str, str]]]
"""Where each row stands, for messages, and its cells by column; empty text where nothing was given."""


def read_csv(place: Place) -> tuple[tuple[str, ...], Records]:
    """Columns of a CSV in UTF-8, and its rows, without space around names and cells.

    Rows and columns without any text are left out; a row stands where its last line does.

    Raises:
        InputError: it cannot be read, is no CSV in UTF-8, has a column twice, or a row is longer than the header.
    """
    try:
        text = place.read_bytes().decode("utf-8-sig")
        cells = csv.reader(io.StringIO(text, newline=""))
        columns = tuple(name.strip() for name in next(cells, []))
        rows = [(f"{place}, line {cells.line_num}", row) for row in cells if any(map(str.strip, row))]
    except OSError as error:
        raise InputError(f"cannot read {place}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{place} is not a CSV file in UTF-8: {error}") from error
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise InputError(f"{place} has more than one column {', '.join(twice)}: rename or remove one")
    for where, row in rows:
        if any(map(str.strip, row[len(columns) :])):
            raise InputError(
                f"{where}: has {len(row)} cells and the header {len(columns)}; put texts with commas in quotes"
            )
    records = [
        (where, {name: (value or "").strip() for name, value in zip_longest(columns, row[: len(columns)]) if name})
        for where, row in rows
    ]
    return tuple(filter(None, columns)), records
