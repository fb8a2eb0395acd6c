"""Between rosters and pandas, which is optional: everything that needs it is imported here, late."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_engine.cohorts.roster import Roster, with_index
from wsi_engine.errors import InputError, SettingsError, first_line

if TYPE_CHECKING:
    import pandas

TEXT_COLUMNS = ("slide_id", "slide", "patient", "site", "split")
"""Columns that stay text even where all their values look like numbers."""

_NUMBER = re.compile(r"[+-]?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|nan|[+-]?inf")
"""A number as people write it. 007 is none: somebody's zeros mean something."""


def load_pandas() -> Any:
    """The package pandas.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        return importlib.import_module("pandas")
    except ImportError:
        raise SettingsError(
            'tables of a cohort need the package pandas, which is not installed: pip install "wsi-engine[cohort]"'
        ) from None


def read_parquet(path: Path) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Columns and rows of a Parquet file.

    Raises:
        InputError: it cannot be read.
        SettingsError: pandas or pyarrow is not installed.
    """
    pandas = load_pandas()
    try:
        with open(path, "rb") as stream:
            frame = pandas.read_parquet(stream)
    except ImportError:
        raise SettingsError(
            f'{path} is a Parquet file, which needs the package pyarrow: pip install "wsi-engine[cohort]", or write CSV'
        ) from None
    except Exception as error:  # whatever pandas and pyarrow raise at damaged files
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        reason = first_line(error)
        raise InputError(f"{path} is not a Parquet file: {reason}") from error
    frame = with_index(frame)
    frame.columns = [str(name) for name in frame.columns]
    twice = sorted(set(frame.columns[frame.columns.duplicated()]))
    if twice:
        raise InputError(f"{path} has more than one column {', '.join(twice)}: rename or remove one")
    return tuple(frame.columns), frame.to_dict("records")


def to_frame(roster: Roster) -> pandas.DataFrame:
    """The rows of a roster as a data frame with ``slide_id``, ``patient`` and all other columns of the roster.

    Columns whose values are all numbers become numbers, NaN where nothing was given; other columns stay text, None
    where nothing was given. ``patient`` is the slide's own id where the cohort does not say.

    Raises:
        SettingsError: pandas is not installed.
    """
    pandas = load_pandas()
    columns: dict[str, Any] = {
        "slide_id": [row.slide_id for row in roster],
        "patient": [row.patient for row in roster],
    }
    for name in roster.columns:
        if name not in columns:
            columns[name] = _typed(name, roster.column(name))
    return pandas.DataFrame(columns)


def select_by(roster: Roster, expression: str) -> list[int]:
    """Places of the rows that an expression of :meth:`pandas.DataFrame.query` keeps.

    Raises:
        InputError: it cannot be understood, names a column that is not there, or gives something else than yes or no.
        SettingsError: pandas is not installed.
    """
    frame = to_frame(roster)
    try:
        kept = frame.eval(expression, engine="python")
        if str(getattr(kept, "dtype", "")) != "bool" or len(kept) != len(frame):
            raise TypeError("it does not say yes or no of every slide")
    except Exception as error:  # whatever an expression can do
        reason = first_line(error)
        raise InputError(
            f"cannot select by {expression!r} ({reason}): write an expression of columns, such as site == 'A' "
            f"(columns: {', '.join(frame.columns)})"
        ) from error
    return [place for place, yes in enumerate(kept) if yes]


def _typed(name: str, values: Sequence[str | None]) -> list[Any]:
    """Numbers where all values are numbers, else the texts."""
    given = [value for value in values if value is not None]
    if name in TEXT_COLUMNS or not given or not all(_NUMBER.fullmatch(value) for value in given):
        return list(values)
    if len(given) == len(values) and all(re.fullmatch(r"[+-]?[0-9]{1,18}", value) for value in given):
        return [int(value) for value in given]
    return [float("nan") if value is None else float(value) for value in values]
