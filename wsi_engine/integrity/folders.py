"""Folders of stores and runs: each is found and checked, and so is what killed processes left beside them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from wsi_engine.errors import InputError
from wsi_engine.integrity.report import CheckReport, Finding, PartReport
from wsi_engine.integrity.runs import check_run
from wsi_engine.integrity.stores import check_store
from wsi_engine.leaserecord import lease_record
from wsi_engine.places import Place, RemotePath, as_place, list_folders, list_names

_WORKERS = 4
"""Stores that are read at a time: a network file system answers slowly, not little."""

_DRAFT = re.compile(r"^\..+\.(\d+|\d+\.partial|[0-9a-f]{32}\.partial)$")
"""Files that are written under another name first, and renamed when they are whole."""

_CLAIM = re.compile(r"^\..+\.lease(\.[0-9a-f]{32}\.(draft|end|beat))+$")

_ROWS = re.compile(r"\.\d+-\d+$")
"""In the name of a lease on some rows of a slide."""

_PROBE = re.compile(r"^\.(write-test-\d+|run-[0-9a-f]{32})$")


class CheckProgress(Protocol):
    """Told how a check goes; every call comes from the thread that called :func:`check_stores`."""

    def run_started(self, parts: int) -> None:
        """So many stores and runs were found."""

    def part_finished(self, path: str, findings: int) -> None:
        """One is checked."""


@dataclass
class _Found:
    """What lies in the folders, each path once."""

    stores: list[Place] = field(default_factory=list)
    runs: list[Place] = field(default_factory=list)
    leases: list[Place] = field(default_factory=list)
    drafts: list[Place] = field(default_factory=list)


def check_stores(
    folders: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, progress: CheckProgress | None = None
) -> CheckReport:
    """Verify the checksums of all chunks and the digests of every store and training run in some folders.

    Nothing is changed. A store that a process of this machine is writing is not looked into.

    Args:
        folders: folders of stores and runs, searched with their subfolders, or stores and runs themselves.
        progress: told how it goes.

    Returns:
        what is damaged, unfinished, being written, or left over.

    Raises:
        InputError: there is no such folder, or nothing of the engine is in it.

    Example:
        >>> report = check_stores("features")  # doctest: +SKIP
        >>> [finding.path for finding in report.damaged]  # doctest: +SKIP
        []
    """
    begun = time.perf_counter()
    named = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    found = _Found()
    for folder in dict.fromkeys(map(_resolve, named)):
        try:
            if not folder.is_dir():
                raise InputError(f"there is no folder {folder}: give a folder of stores or of a training run")
            _search(folder, found)
        except OSError as error:
            raise InputError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    found = _Found(*(list(dict.fromkeys(places)) for places in (found.stores, found.runs, found.leases, found.drafts)))
    parts = len(found.stores) + len(found.runs)
    if not (parts or found.leases or found.drafts):
        raise InputError(f"{', '.join(map(str, named))} holds neither stores nor training runs: give their folder")
    if progress:
        progress.run_started(parts)
    findings = [*_judge_leases(found.leases), *_judge_drafts(found.drafts)]
    written = {finding.path for finding in findings if finding.kind == "running"}
    files = size = 0
    with ThreadPoolExecutor(_WORKERS, "check") as pool:
        try:
            for path, part in _check_all(pool, found, written):
                files, size = files + part.files, size + part.bytes
                findings += part.findings
                if progress:
                    progress.part_finished(str(path), len(part.findings))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    findings.sort(key=lambda finding: finding.path)
    seconds = time.perf_counter() - begun
    return CheckReport(len(found.stores), len(found.runs), files, size, tuple(findings), seconds)


def _check_all(pool: ThreadPoolExecutor, found: _Found, written: set[str]) -> Iterator[tuple[Place, PartReport]]:
    """Each store and run with what was found in it, in order."""
    for check, paths in ((check_store, found.stores), (check_run, found.runs)):
        free = [path for path in paths if str(path) not in written]
        yield from zip(free, pool.map(check, free), strict=True)


def _search(folder: Place, found: _Found) -> None:
    """Stores, runs and hidden files of the engine, sorted by path; what lies in a store is the store's."""
    if _is_store(folder):
        found.stores += [folder]
        found.leases += [path for path in [folder.with_name(f".{folder.stem}.lease")] if path.exists()]
        return
    folders = list_folders(folder)
    names = sorted({*list_names(folder)} - {*folders})
    if "run.json" in names and isinstance(folder, Path):
        found.runs.append(folder)
    found.leases += [folder / name for name in names if name.startswith(".") and name.endswith(".lease")]
    found.drafts += [folder / name for name in names if _is_draft(name)]
    for inner in (folder / name for name in folders):
        if _is_store(inner):
            found.stores.append(inner)
        elif isinstance(inner, RemotePath) or not inner.is_symlink():
            _search(inner, found)


def _resolve(folder: str | os.PathLike[str]) -> Place:
    """A folder by one name, whichever it was given by."""
    place = as_place(folder)
    return place.resolve() if isinstance(place, Path) else place


def _is_store(folder: Place) -> bool:
    return folder.suffix == ".zarr" or (folder / "zarr.json").exists()


def _is_draft(name: str) -> bool:
    return any(pattern.match(name) for pattern in (_DRAFT, _CLAIM, _PROBE))


def _judge_leases(paths: Iterable[Place]) -> Iterator[Finding]:
    """What each lease says of its store or run; that of a living process names the store or run itself."""
    for path in paths:
        try:
            sight = lease_record(path).look()
        except OSError as error:
            yield Finding("damaged", str(path), f"cannot be read ({error.strerror or error})", "make it readable")
            continue
        if sight is None:  # given back since it was listed
            continue
        name = path.name.removeprefix(".").removesuffix(".lease")
        if not path.with_name(f"{name}.zarr").exists():
            name = _ROWS.sub("", name)
        if sight.state == "running":
            subject = path.parent if path.parent.name == name else path.with_name(f"{name}.zarr")
            cure = "check it again when that process has ended"
            yield Finding("running", str(subject), f"is being written by {sight.who}, and was not checked", cure)
        elif sight.state == "ended":
            yield Finding("leftover", str(path), f"is the lease of {sight.who}, which ended", "run again, or delete it")
        else:
            what = f"is the lease of {sight.who}, of which nothing can be told from here"
            yield Finding("leftover", str(path), what, "leave it while that process runs; the next run sees to it")


def _judge_drafts(paths: Iterable[Place]) -> Iterator[Finding]:
    for path in paths:
        yield Finding(
            "leftover", str(path), "is a draft of a killed process", "delete it when nothing runs in its folder"
        )
