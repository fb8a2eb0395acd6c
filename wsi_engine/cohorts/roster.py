"""The rows of a cohort: which slides there are, whose they are, and what is known of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from wsi_engine.errors import InputError
from wsi_engine.inputs import check_slide_id, place_slide
from wsi_engine.places import Place, as_place
from wsi_engine.slide import slide_name
from wsi_engine.spreadsheet import Records, read_csv

RosterSource: TypeAlias = "str | os.PathLike[str] | Iterable[Mapping[str, object]] | Roster"
"""What a roster is made of: a CSV or Parquet file, rows as mappings, a pandas data frame, or a roster."""

PARQUET = (".parquet", ".pq")
"""Endings of Parquet files, in small letters."""


@dataclass(frozen=True)
class RosterRow:
    """One slide of a cohort.

    Attributes:
        slide_id: name of its store.
        slide: where the slide is, relative paths taken from the CSV's folder; None where the cohort names ids alone.
        patient: whose it is; the slide's own id where the cohort does not say.
        values: every column of the row as text, by name; empty text where nothing was given.
        where: the line, for messages.
    """

    slide_id: str
    slide: str | None
    patient: str
    values: Mapping[str, str]
    where: str

    def value(self, column: str) -> str | None:
        """What a column says, None where it is empty."""
        return self.values.get(column) or None


@dataclass(frozen=True)
class Roster:
    """The slides of a cohort in the order given. ``source`` names it in messages; ``columns`` are those of the CSV."""

    source: str
    columns: tuple[str, ...]
    rows: tuple[RosterRow, ...]

    @classmethod
    def read(
        cls, source: RosterSource, root: str | os.PathLike[str] | None = None, faults: list[str] | None = None
    ) -> Roster:
        """Read a cohort.

        A CSV has a column ``slide_id`` or ``slide`` (or both), and, if wanted, ``patient`` and any others (labels,
        site, split).

        Args:
            source: path or URL of a CSV in UTF-8, path of a Parquet file, rows as mappings, a pandas data frame (an
                index with a name is a column of it), or a roster, which is returned.
            root: folder that relative paths of slides start from; None for that of the file, or the working folder.
            faults: filled with a sentence for every row that names no slide or one that cannot name a store; such rows
                are left out. None raises at the first.

        Raises:
            InputError: it cannot be read, is empty, has no column that names slides, or a row names none.
            SettingsError: it is a Parquet file, and pandas or pyarrow is not installed.
        """
        if isinstance(source, Roster):
            return source
        if isinstance(source, str | os.PathLike):
            place = as_place(source)
            folder = place.parent if root is None else as_place(root)
            if isinstance(place, Path) and place.suffix.lower() in PARQUET:
                return _from_records(str(place), *_read_parquet(place), folder, faults)
            return _from_records(str(place), *read_csv(place), folder, faults)
        records = with_index(source).to_dict("records") if hasattr(source, "to_dict") else list(source)
        for at, record in enumerate(records, start=1):
            if not isinstance(record, Mapping):
                raise InputError(f"row {at} of the cohort is a {type(record).__name__}, not columns and their values")
        columns = tuple(dict.fromkeys(str(name) for record in records for name in record))
        texts = [
            (f"the cohort, row {at}", {str(name): cell_text(value) for name, value in record.items()})
            for at, record in enumerate(records, start=1)
        ]
        return _from_records("the cohort", columns, texts, as_place(root or ""), faults)

    def column(self, name: str) -> tuple[str | None, ...]:
        """What a column says of each slide, None where it is empty.

        Raises:
            InputError: there is no such column.
        """
        if name not in self.columns:
            raise InputError(f'{self.source} has no column "{name}" (its columns: {", ".join(self.columns)})')
        return tuple(row.value(name) for row in self.rows)

    def select(self, places: Sequence[int]) -> Roster:
        """The rows at these places, in this order."""
        return Roster(self.source, self.columns, tuple(self.rows[place] for place in places))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[RosterRow]:
        return iter(self.rows)


def _read_parquet(path: Path) -> tuple[tuple[str, ...], Records]:
    """Columns of a Parquet file, and its rows."""
    from wsi_engine.cohorts.frames import read_parquet  # noqa: PLC0415 - pandas is optional

    columns, records = read_parquet(path)
    return columns, [
        (f"{path}, row {at}", {name: cell_text(value) for name, value in record.items()})
        for at, record in enumerate(records, start=1)
    ]


def _from_records(
    source: str, columns: tuple[str, ...], records: Records, folder: Place, faults: list[str] | None
) -> Roster:
    """A roster of records, each with where it stands; rows that cannot be used go to ``faults`` where that is given."""
    if records and not {"slide", "slide_id"} & set(columns):
        raise InputError(f'{source} has no column "slide" or "slide_id" (its columns: {", ".join(columns) or "none"})')
    if not records:
        raise InputError(f"{source} lists no slide")
    rows = []
    for where, record in records:
        try:
            rows.append(_make_row(record, folder, where))
        except InputError as error:
            if faults is None:
                raise
            faults.append(str(error))
    return Roster(source, columns, tuple(rows))


def _make_row(record: dict[str, str], folder: Place, where: str) -> RosterRow:
    slide = place_slide(record["slide"], folder) if record.get("slide") else ""
    slide_id = record.get("slide_id", "") or (slide_name(slide) if slide else "")
    if not slide_id:
        raise InputError(f'{where}: names no slide; fill in "slide" or "slide_id"')
    slide_id = check_slide_id(slide_id, where)
    return RosterRow(slide_id, slide or None, record.get("patient", "") or slide_id, record, where)


def with_index(frame: Any) -> Any:
    """A pandas data frame whose index, where that has a name, is a column; not where there is one of that name."""
    names = getattr(getattr(frame, "index", None), "names", ())
    kept = [level for level, name in enumerate(names) if name is not None and name not in frame.columns]
    return frame.reset_index(kept) if kept else frame


def cell_text(value: Any) -> str:
    """A cell as text; nothing, NaN and a data frame's missing values are empty."""
    if value is None or _is_missing(value):
        return ""
    if isinstance(value, float | np.floating) and value.is_integer():
        return str(int(value))  # a data frame turns whole numbers with gaps into floats
    return str(value).strip()


def _is_missing(value: Any) -> bool:
    try:
        return bool(value != value)  # noqa: PLR0124 - NaN alone differs from itself
    except TypeError:  # pandas.NA is neither equal nor different
        return True
    except ValueError:  # an array, which Parquet can have in a cell
        return False
