"""Everything that can be seen to be wrong with a cohort before a night is spent on it, told in one report."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from wsi_engine.cohorts.findings import Problem, count, find_torn, write_report
from wsi_engine.cohorts.opening import look_inside, parse_scale
from wsi_engine.cohorts.roster import Roster, RosterRow
from wsi_engine.cohorts.splits import find_part_problems
from wsi_engine.errors import InputError
from wsi_engine.places import is_url, local_path

SPLIT, SITE = "split", "site"
"""Columns that mean something wherever a cohort has them."""

_THREADS = 8
"""Slides opened side by side: on a network's disk opening is waiting."""


@dataclass(frozen=True)
class CohortReport:
    """What is wrong with a cohort.

    Attributes:
        source: what it was read from.
        slides: rows that can be used.
        patients: whose they are.
        opened: slides that were opened to see whether they can be.
        problems: what must be mended.
        warnings: what should be known.
    """

    source: str
    slides: int
    patients: int
    opened: int
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing must be mended."""
        return not self.problems

    def require(self) -> None:
        """Refuse a cohort with problems.

        Raises:
            InputError: it has some; the message is the report.
        """
        if self.problems:
            raise InputError(str(self))

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        size = f"{self.source}: {count(self.slides, 'slide')} of {count(self.patients, 'patient')}"
        if not (self.problems or self.warnings):
            return f"{size}, nothing wrong was found"
        told = [count(len(self.problems), "problem"), count(len(self.warnings), "warning")]
        return write_report(f"{size}, {' and '.join(told)} found:", (*self.problems, *self.warnings))


def examine_roster(roster: Roster, faults: Sequence[str] = (), open_slides: bool = True) -> CohortReport:
    """Look at the rows of a cohort, at the files they name and, if wanted, into these.

    Args:
        roster: the rows.
        faults: what was wrong with rows that are left out of it.
        open_slides: open every slide, in threads, to see that it can be read, has a scale, and is not another one's
            copy (of files on disk that are as large as another, some mebibytes are read to tell).
    """
    problems = [Problem(f"{count(len(faults), 'row')} cannot be used", tuple(faults), "mend them")] if faults else []
    problems += [*_find_repeats(roster), *_find_bad_scales(roster), *_find_split_patients(roster)]
    warnings = [*_find_nameless(roster), *_find_torn_sites(roster)]
    there, missing = _find_missing(roster)
    problems += missing
    if open_slides:
        wrong, doubled = look_inside(there)
        problems += wrong
        warnings += doubled
    patients = len({row.patient for row in roster})
    opened = len(there) if open_slides else 0
    return CohortReport(roster.source, len(roster), patients, opened, tuple(problems), tuple(warnings))


def find_duplicates(roster: Roster) -> list[Problem]:
    """Slides named twice, small letters or capitals: some file systems do not tell them apart."""
    lines: defaultdict[str, list[RosterRow]] = defaultdict(list)
    for row in roster:
        lines[row.slide_id.lower()].append(row)
    twice = tuple(
        f"{rows[0].slide_id}: {'; '.join(row.where for row in rows)}" for rows in lines.values() if len(rows) > 1
    )
    return (
        [Problem(f"{count(len(twice), 'slide')} named more than once", twice, "keep one row for each slide")]
        if twice
        else []
    )


def _find_repeats(roster: Roster) -> list[Problem]:
    """Slides named twice, and files named under several ids."""
    files: defaultdict[str, list[str]] = defaultdict(list)
    for row in roster:
        if row.slide:
            place = row.slide if is_url(row.slide) else os.path.abspath(local_path(row.slide))
            files[place].append(row.slide_id)
    # a slide that is named twice is told of already
    shared = tuple(
        f"{file}: {', '.join(ids)}" for file, ids in files.items() if len({name.lower() for name in ids}) > 1
    )
    found = find_duplicates(roster)
    if shared:
        found.append(Problem(f"{count(len(shared), 'file')} named as several slides", shared, "keep one row for each"))
    return found


def _find_bad_scales(roster: Roster) -> list[Problem]:
    found = []
    for row in roster:
        try:
            parse_scale(row)
        except InputError as error:
            found.append(str(error))
    return [Problem(f"{count(len(found), 'slide')} with an impossible scale", tuple(found))] if found else []


def _find_split_patients(roster: Roster) -> list[Problem]:
    """Patients in several parts of the column of splits, and values there that mean no part."""
    if SPLIT not in roster.columns:
        return []
    return list(find_part_problems([row.patient for row in roster], roster.column(SPLIT), SPLIT))


def _find_torn_sites(roster: Roster) -> list[Problem]:
    if SITE not in roster.columns:
        return []
    torn = find_torn(zip((row.patient for row in roster), roster.column(SITE), strict=True))
    return [Problem(f"{count(len(torn), 'patient')} at several sites", torn)] if torn else []


def _find_nameless(roster: Roster) -> list[Problem]:
    """Slides of which only the id is known, and slides of nobody."""
    bare = tuple(row.slide_id for row in roster if not row.slide)
    found = []
    if bare:
        cure = 'name their files in a column "slide" to extract or to look for nuclei'
        found.append(Problem(f"{count(len(bare), 'slide')} of which only the id is known", bare, cure))
    alone = tuple(row.slide_id for row in roster if not row.value("patient"))
    if alone:
        what = f"{count(len(alone), 'slide')} without a patient, each taken for one"
        found.append(Problem(what, alone if len(alone) < len(roster) else ()))
    return found


def _find_missing(roster: Roster) -> tuple[list[RosterRow], list[Problem]]:
    """The rows whose slide is there, or may be (URLs), and those whose is not."""
    with ThreadPoolExecutor(_THREADS, "missing") as pool:
        rows = [row for row in roster if row.slide]
        found = list(pool.map(lambda row: is_url(row.slide or "") or os.path.exists(local_path(row.slide or "")), rows))
    missing = tuple(f"{row.slide_id}: {row.slide}" for row, yes in zip(rows, found, strict=True) if not yes)
    what = f"{count(len(missing), 'file')} not there"
    cure = "mend the paths (relative ones start from the folder of the file that names them, or from root)"
    return [row for row, yes in zip(rows, found, strict=True) if yes], (
        [Problem(what, missing, cure)] if missing else []
    )
