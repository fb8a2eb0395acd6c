"""What can be seen of a cohort's slides only by opening them: whether they can be read, and whether they are copies."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from wsi_engine.cohorts.findings import Problem, count
from wsi_engine.cohorts.roster import RosterRow
from wsi_engine.errors import InputError, WsiError
from wsi_engine.inputs import parse_mpp
from wsi_engine.places import is_url, local_path
from wsi_engine.slide import open_slide

SCALE = "mpp"
"""Column of micrometres per level-0 pixel."""

_THREADS = 8
"""Slides opened side by side: on a network's disk opening is waiting."""


def parse_scale(row: RosterRow) -> float | None:
    """Micrometres per level-0 pixel that a row gives its slide; None where it gives none.

    Raises:
        InputError: it is no believable number.
    """
    return parse_mpp(row.values.get(SCALE, ""), row.where)


def look_inside(rows: Sequence[RosterRow]) -> tuple[list[Problem], list[Problem]]:
    """What must be mended of slides that are there, and what should be known."""
    with ThreadPoolExecutor(_THREADS, "open") as pool:
        looked = list(pool.map(_look, rows, _share_sizes(rows)))
    damaged = tuple(f"{row.slide_id}: {why}" for row, (why, _) in zip(rows, looked, strict=True) if why)
    problems = []
    if damaged:
        what = f"{count(len(damaged), 'slide')} cannot be read"
        problems.append(Problem(what, damaged, "replace the files, or leave them out"))
    fingerprints = [fingerprint for _, fingerprint in looked]
    torn, doubled = find_copies(zip(rows, fingerprints, strict=True), lambda row: os.path.abspath(row.slide or ""))
    return [*problems, *torn], doubled


def find_copies(
    rows: Iterable[tuple[RosterRow, str]], name: Callable[[RosterRow], str]
) -> tuple[list[Problem], list[Problem]]:
    """Pictures that are several patients' (they would be learned and tested on), and that one patient has twice.

    Args:
        rows: each with the fingerprint of its slide, which is empty where it is not known.
        name: of the file or slide of a row: rows of one name are no copies, and told of elsewhere.
    """
    pictures: defaultdict[str, dict[str, RosterRow]] = defaultdict(dict)
    for row, fingerprint in rows:
        if fingerprint:
            pictures[fingerprint][name(row)] = row
    copies = [list(same.values()) for same in pictures.values() if len(same) > 1]
    torn = [same for same in copies if len({row.patient for row in same}) > 1]
    doubled = [same for same in copies if same not in torn]
    return _tell_copies(torn, "several patients"), _tell_copies(doubled, "one patient")


def _tell_copies(copies: Sequence[Sequence[RosterRow]], whose: str) -> list[Problem]:
    if not copies:
        return []
    what = f"{count(len(copies), 'slide')} there more than once, as slides of {whose}"
    return [Problem(what, tuple(", ".join(row.slide_id for row in same) for same in copies), "keep one of each")]


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
