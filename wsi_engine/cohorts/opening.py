"""What can be seen of a cohort's slides only by opening them: whether they can be read, and whether they are copies."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from wsi_engine.cohorts.findings import Problem, count
from wsi_engine.cohorts.roster import RosterRow
from wsi_engine.errors import InputError, WsiError
from wsi_engine.readers.base import is_url, local_path
from wsi_engine.slide import MPP_RANGE, open_slide

SCALE = "mpp"
"""Column of micrometres per level-0 pixel."""

_THREADS = 8
"""Slides opened side by side: on a network's disk opening is waiting."""

_ONE_OF_EACH = "keep one of each"


def parse_scale(row: RosterRow) -> float | None:
    """Micrometres per level-0 pixel that a row gives its slide; None where it gives none.

    Raises:
        InputError: it is no believable number.
    """
    text = row.value(SCALE)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not MPP_RANGE[0] <= value <= MPP_RANGE[1]:
        low, high = MPP_RANGE
        raise InputError(f'{row.where}: mpp must be micrometres per pixel within {low}–{high}, not "{text}"')
    return value


def look_inside(rows: Sequence[RosterRow]) -> tuple[list[Problem], list[Problem]]:
    """What must be mended of slides that are there, and what should be known."""
    with ThreadPoolExecutor(_THREADS, "open") as pool:
        looked = list(pool.map(_look, rows, _share_sizes(rows)))
    damaged = tuple(f"{row.slide_id}: {why}" for row, (why, _) in zip(rows, looked, strict=True) if why)
    problems = []
    if damaged:
        what = f"{count(len(damaged), 'slide')} cannot be read"
        problems.append(Problem(what, damaged, "replace the files, or leave them out"))
    torn, doubled = _find_copies((row, fingerprint) for row, (_, fingerprint) in zip(rows, looked, strict=True))
    return [*problems, *torn], doubled


def _find_copies(rows: Iterable[tuple[RosterRow, str]]) -> tuple[list[Problem], list[Problem]]:
    """Pictures that are several patients', and pictures that one patient has twice; without a fingerprint, none."""
    pictures: defaultdict[str, list[RosterRow]] = defaultdict(list)
    for row, fingerprint in rows:
        if fingerprint:
            pictures[fingerprint].append(row)
    torn: list[str] = []
    doubled: list[str] = []
    for same in pictures.values():
        files = {os.path.abspath(row.slide or ""): row for row in same}
        if len(files) > 1:  # one file in several rows is told of already
            several = len({row.patient for row in files.values()}) > 1
            (torn if several else doubled).append(", ".join(row.slide_id for row in files.values()))
    found = (torn, "several patients"), (doubled, "one patient")
    first, second = (
        [Problem(f"{count(len(some), 'slide')} there more than once, as slides of {whose}", tuple(some), _ONE_OF_EACH)]
        if some
        else []
        for some, whose in found
    )
    return first, second


def _share_sizes(rows: Sequence[RosterRow]) -> list[bool]:
    """Which files are as large as another one: others are no copies, and need not be read to know it."""
    sizes = [_size(row.slide or "") for row in rows]
    numbers = Counter(sizes)
    return [size is not None and numbers[size] > 1 for size in sizes]


def _size(slide: str) -> int | None:
    """Bytes of a file on disk."""
    try:
        return None if is_url(slide) else os.path.getsize(local_path(slide))
    except OSError:
        return None


def _look(row: RosterRow, compared: bool) -> tuple[str, str]:
    """Why a slide cannot be read, or its fingerprint where it is to be compared with others."""
    try:
        with open_slide(row.slide or "", parse_scale(row)) as slide:
            slide.read_region(0, 0, 1, 1)
            _ = slide.mpp
            return "", slide.fingerprint if compared else ""
    except InputError:
        return "", ""  # its scale is told of already
    except WsiError as error:
        return str(error), ""
