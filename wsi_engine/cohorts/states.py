"""How far a cohort is: what is done, running, failed and pending of every slide, as the disk tells it."""

from __future__ import annotations

import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from wsi_engine.cohorts.findings import count
from wsi_engine.cohorts.inventory import read_node
from wsi_engine.cohorts.roster import Roster
from wsi_engine.errors import InputError
from wsi_engine.failures import Failure, read_failures
from wsi_engine.lease import STALE_SECONDS
from wsi_engine.leaserecord import lease_record
from wsi_engine.places import Place, as_place, list_folders, list_names

State: TypeAlias = Literal["done", "running", "failed", "pending"]

STATES: tuple[State, ...] = get_args(State)
"""All of them, in the order in which people want to read them."""

_KINDS = {"features": "values", "attention": "values", "nuclei": ""}
"""Groups of a store that jobs fill, and the node below each result that says whether it is complete."""

_PART = re.compile(r".+\.[0-9]+-[0-9]+")
"""Lease of some rows of a slide."""

_THREADS = 8


@dataclass(frozen=True)
class JobState:
    """How far one job of one slide is.

    Attributes:
        slide_id: which slide.
        job: by the place of its result in the store, as ``features/resnet50``.
        state: ``done``, ``running``, ``failed`` or ``pending``.
        detail: why it failed, who is at it, or what was left behind; empty where there is nothing to say.
    """

    slide_id: str
    job: str
    state: State
    detail: str = ""


@dataclass(frozen=True)
class CohortStatus:
    """How far every job of every slide is.

    Attributes:
        folder: of the stores.
        slides: the ids looked at.
        jobs: what is or was made of at least one slide, and what was asked for.
        states: one for each slide and job, slides in order and jobs in order within.
        others: ids that are in the folder but not in the cohort that was given.
    """

    folder: Place
    slides: tuple[str, ...]
    jobs: tuple[str, ...]
    states: tuple[JobState, ...]
    others: tuple[str, ...] = ()

    def counts(self) -> dict[str, dict[State, int]]:
        """Slides in each state, by job."""
        numbers = Counter((one.job, one.state) for one in self.states)
        return {job: {state: numbers[job, state] for state in STATES} for job in self.jobs}

    def having(self, state: State) -> tuple[JobState, ...]:
        """Jobs of slides that are in one state."""
        return tuple(one for one in self.states if one.state == state)

    @property
    def complete(self) -> bool:
        """Whether every job of every slide is done."""
        return bool(self.jobs) and all(one.state == "done" for one in self.states)

    def to_json(self) -> dict[str, Any]:
        """The status as plain JSON values."""
        return {
            "folder": str(self.folder),
            "slides": len(self.slides),
            "jobs": self.counts(),
            "complete": self.complete,
            "states": [asdict(one) for one in self.states],
            "not_in_the_cohort": list(self.others),
        }

    def __str__(self) -> str:
        lines = [f"{self.folder}: {count(len(self.slides), 'slide')}"]
        for job, numbers in self.counts().items():
            lines.append(f"- {job}: " + ", ".join(f"{numbers[state]} {state}" for state in STATES if numbers[state]))
        if not self.jobs:
            lines.append("- nothing was begun yet")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Hold:
    """A lease as it is seen: the job it is held for, by whom, and whether that one seems to be alive."""

    job: str
    who: str
    alive: bool


@dataclass(frozen=True)
class _Store:
    """What a store says of its jobs: complete ones, begun ones, and what keeps it from being read."""

    done: frozenset[str] = frozenset()
    begun: frozenset[str] = frozenset()
    fault: str = ""


def read_status(folder: str | os.PathLike[str], cohort: Roster | None = None, jobs: Iterable[str] = ()) -> CohortStatus:
    """How far the slides of a folder of stores are; only small files are read, and nothing is written.

    Args:
        folder: of the stores, ``<folder>/<slide_id>.zarr``.
        cohort: which slides there should be; None for those that have left anything in the folder.
        jobs: what there should be of each slide beside what there is of any, as ``nuclei/stain``.

    Raises:
        InputError: the folder cannot be read, or is not there and no cohort says what should be in it.
    """
    root = as_place(folder)
    stores, leases = _list_folder(root) if cohort is None or root.exists() else (set(), [])
    failures = {(failure.slide_id, failure.job): failure for failure in read_failures(root)}
    present = sorted({*stores, *leases, *(slide_id for slide_id, _ in failures)})
    slides = tuple(dict.fromkeys(row.slide_id for row in cohort)) if cohort is not None else tuple(present)
    with ThreadPoolExecutor(_THREADS, "status") as pool:
        known = dict(zip(slides, pool.map(lambda one: _survey(root, one, one in stores), slides), strict=True))
        held = dict(zip(leases, pool.map(lambda one: _look(root / f".{one}.lease"), leases), strict=True))
    found = {job for store in known.values() for job in (*store.done, *store.begun)}
    found |= {failure.job for failure in failures.values() if failure.slide_id in known}
    found |= {lease.job for one, lease in held.items() if one in known and lease and lease.job}
    named = tuple(sorted({*found, *jobs}, key=_order))
    states = tuple(
        _judge(one, job, known[one], held.get(one), failures.get((one, job))) for one in slides for job in named
    )
    others = tuple(one for one in present if one not in known)
    return CohortStatus(root, slides, named, states, others)


def _judge(slide_id: str, job: str, store: _Store, lease: _Hold | None, failure: Failure | None) -> JobState:
    """The state of one job. A failure is written down until the job succeeds, so it is of the last attempt."""
    mine = lease is not None and lease.job in ("", job)
    if lease is not None and mine and lease.alive and (lease.job or job not in store.done):
        return JobState(slide_id, job, "running", f"by {lease.who}")
    if failure is not None:
        return JobState(slide_id, job, "failed", failure.why)
    if store.fault:
        return JobState(slide_id, job, "failed", f"its store {store.fault}")
    if job in store.done:
        return JobState(slide_id, job, "done")
    if lease is not None and mine and not lease.alive:
        return JobState(slide_id, job, "pending", f"left by {lease.who}, which is gone")
    return JobState(slide_id, job, "pending", "begun" if job in store.begun else "")


def _look(path: Place) -> _Hold | None:
    """A lease without waiting to see it change, as who wants to have it must."""
    try:
        sight = lease_record(path).look()
    except OSError:
        return _Hold("", "a process whose lease cannot be read", True)
    if sight is None:
        return None
    # of processes elsewhere this compares clocks: good enough to be shown, not to act upon
    silent = time.time() - sight.changed / 1e9 > STALE_SECONDS
    alive = sight.state == "running" or (sight.state == "unknown" and not silent)
    return _Hold(sight.holder.job if sight.holder else "", sight.who, alive)


def _list_folder(root: Place) -> tuple[set[str], list[str]]:
    """Ids of the slides that have a store, and of those that have a lease."""
    try:
        names = list_names(root)
    except OSError as error:
        raise InputError(f"cannot read the folder {root}: {error.strerror or error}") from error
    stores = {name.removesuffix(".zarr") for name in names if name.endswith(".zarr") and not name.startswith(".")}
    leases = [name[1:].removesuffix(".lease") for name in names if name.startswith(".") and name.endswith(".lease")]
    # parts of a large slide have leases of their own, within that of the slide
    return stores, sorted(one for one in leases if one in stores or not _PART.fullmatch(one))


def _survey(root: Place, slide_id: str, exists: bool) -> _Store:
    """What a store says, from its small JSON files alone."""
    if not exists:
        return _Store()
    store = root / f"{slide_id}.zarr"
    jobs: defaultdict[bool, set[str]] = defaultdict(set)
    try:
        if not (store / "zarr.json").is_file():
            return _Store(fault="lacks its zarr.json: delete it and run again")
        for kind, node in _KINDS.items():
            for name in list_folders(store / kind):
                jobs[_is_complete(store / kind / name / node)].add(f"{kind}/{name}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return _Store(fault=f"is damaged ({type(error).__name__}: {error}): delete it and run again")
    return _Store(frozenset(jobs[True]), frozenset(jobs[False]))


def _is_complete(node: Place) -> bool:
    try:
        value = read_node(node)
    except FileNotFoundError:
        return False
    return value.get("attributes", {}).get("complete") is True


def _order(job: str) -> tuple[int, str]:
    """Features first, then what is made of them, then nuclei."""
    kinds: Sequence[str] = tuple(_KINDS)
    kind = job.partition("/")[0]
    return (kinds.index(kind) if kind in kinds else len(kinds)), job
