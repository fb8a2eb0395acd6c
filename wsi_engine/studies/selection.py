"""Some of a cohort's slides, by what its columns say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from wsi_engine.cohorts.frames import select_by
from wsi_engine.cohorts.roster import Roster, RosterRow, cell_text
from wsi_engine.errors import InputError

Selection: TypeAlias = str | Callable[[RosterRow], bool] | Mapping[str, object]
"""Which slides: an expression of columns, a function of a row, or wanted values by column."""


def choose_places(roster: Roster, where: Selection) -> list[int]:
    """Places of the selected rows; see :meth:`wsi_engine.studies.cohort.Cohort.select`.

    Raises:
        InputError: a column is not there, the expression cannot be understood, or no slide is left.
        SettingsError: it is an expression, and pandas is not installed.
    """
    if isinstance(where, str):
        places = select_by(roster, where)
    elif isinstance(where, Mapping):
        places = _match(roster, where)
    else:
        places = [place for place, row in enumerate(roster) if where(row)]
    if not places:
        raise InputError(f"no slide of {roster.source} is selected by {where!r}: look at the values of its columns")
    return places


def _match(roster: Roster, wanted: Mapping[str, object]) -> list[int]:
    """Places of the rows that have one of the wanted values in every column."""
    chosen = set(range(len(roster)))
    for name, values in wanted.items():
        several = values if isinstance(values, Iterable) and not isinstance(values, str) else [values]
        texts = {cell_text(value) for value in several}
        chosen &= {place for place, value in enumerate(roster.column(name)) if (value or "") in texts}
    return sorted(chosen)
