"""The rows of a cohort: which slides there are, whose they are, and what is known of them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from wsi_engine.errors import InputError
from wsi_engine.inputs import check_slide_id
from wsi_engine.slide import slide_name

RosterSource: TypeAlias = "str | os.PathLike[str] | Iterable[Mapping[str, object]] | Roster"
"""What a roster is made of: a CSV file, rows as mappings, a pandas data frame, or a roster."""


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
    def read(cls, source: RosterSource) -> Roster:
        """Read a cohort.

        A CSV has a column ``slide_id`` or ``slide`` (or both), and, if wanted, ``patient`` and any others (labels,
        site, split).

        Args:
            source: path of a CSV in UTF-8, rows as mappings, a pandas data frame, or a roster, which is returned.

        Raises:
            InputError: it cannot be read, is empty, has no column that names slides, or a row names none.
        """
        if isinstance(source, Roster):
            return source
        if isinstance(source, str | os.PathLike):
            return _read_csv(Path(source))
        to_dict = getattr(source, "to_dict", None)  # a data frame's
        records = to_dict("records") if to_dict is not None else list(source)
        columns = tuple(dict.fromkeys(str(name) for record in records for name in record))
        texts = [{str(name): _text(value) for name, value in record.items()} for record in records]
        return _from_records("the cohort", columns, texts, Path(), first=1, unit="row")

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


def _read_csv(path: Path) -> Roster:
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = tuple(reader.fieldnames or ())
            records = [{name: _text(record.get(name)) for name in columns} for record in reader]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8: {error}") from error
    return _from_records(str(path), columns, records, path.parent, first=2, unit="line")


def _from_records(
    source: str, columns: tuple[str, ...], records: list[dict[str, str]], folder: Path, first: int, unit: str
) -> Roster:
    if records and not {"slide", "slide_id"} & set(columns):
        raise InputError(f'{source} has no column "slide" or "slide_id" (its columns: {", ".join(columns) or "none"})')
    if not records:
        raise InputError(f"{source} lists no slide")
    rows = [_make_row(record, folder, f"{source}, {unit} {at}") for at, record in enumerate(records, start=first)]
    return Roster(source, columns, tuple(rows))


def _make_row(record: dict[str, str], folder: Path, where: str) -> RosterRow:
    slide = record.get("slide", "")
    slide_id = record.get("slide_id", "") or (slide_name(slide) if slide else "")
    if not slide_id:
        raise InputError(f'{where}: names no slide; fill in "slide" or "slide_id"')
    if slide and "://" not in slide:
        slide = str(folder / slide)  # an absolute path stays as it is
    slide_id = check_slide_id(slide_id, where)
    return RosterRow(slide_id, slide or None, record.get("patient", "") or slide_id, record, where)


def _text(value: Any) -> str:
    """A cell as text; nothing, NaN and a data frame's missing values are empty."""
    if value is None or value != value:  # noqa: PLR0124 - NaN alone differs from itself
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a data frame turns whole numbers with gaps into floats
    return str(value).strip()
