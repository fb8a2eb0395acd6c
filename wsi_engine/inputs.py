"""From what a user names (files, folders, CSVs, URLs) to a checked list of slides."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from wsi_engine.errors import InputError
from wsi_engine.readers.base import is_url, local_path
from wsi_engine.slide import slide_name

SLIDE_SUFFIXES = frozenset(
    [
        ".svs",
        ".svslide",
        ".tif",
        ".tiff",
        ".ndpi",
        ".mrxs",
        ".scn",
        ".bif",
        ".vms",
        ".vmu",
        ".dcm",
        ".png",
        ".jpg",
        ".jpeg",
    ]
)
"""Endings that make a file in a folder count as a slide, in small letters."""

_FORBIDDEN = set('/\\\0<>:"|?*\n\r\t')


@dataclass(frozen=True)
class SlideSource:
    """A slide to work on: where it is, the name of its store, and its scale where the user gave one."""

    path: str
    slide_id: str
    mpp: float | None = None


SlideInput: TypeAlias = str | os.PathLike[str] | SlideSource
"""A slide, folder, CSV or URL, or a slide with its name and scale."""


def find_slides(inputs: Iterable[SlideInput], mpp: float | None = None) -> list[SlideSource]:
    """List the slides that files, folders, CSVs and URLs name, in the order given (folders by name).

    A folder is searched with its subfolders for :data:`SLIDE_SUFFIXES`; of a folder with DICOM files the first is
    taken, since OpenSlide finds the rest of a slide by itself. A CSV has a column ``slide`` (paths relative to the CSV)
    and, if wanted, ``slide_id`` and ``mpp``.

    Args:
        inputs: what the user named.
        mpp: micrometres per level-0 pixel for every slide that has no ``mpp`` of its own in a CSV.

    Raises:
        InputError: nothing was named, a folder holds no slide, a CSV lacks a column or has a bad row, two slides
            would share a store, or a name would leave the output folder.
    """
    sources: list[SlideSource] = []
    for item in inputs:
        if isinstance(item, SlideSource):
            scale = mpp if item.mpp is None else item.mpp
            sources.append(SlideSource(item.path, check_slide_id(item.slide_id, item.path), scale))
            continue
        path = local_path(os.fspath(item))
        if not is_url(path) and path.lower().endswith(".csv"):
            sources += _read_csv(Path(path), mpp)
        elif not is_url(path) and os.path.isdir(path):
            sources += [SlideSource(str(p), check_slide_id(p.stem, str(p)), mpp) for p in _search_folder(Path(path))]
        else:
            sources.append(SlideSource(path, check_slide_id(slide_name(path), path), mpp))
    if not sources:
        raise InputError("no slide was named: pass slides, folders or CSV files")
    _refuse_duplicates(sources)
    return sources


def check_slide_id(slide_id: str, where: str) -> str:
    """The id itself when it can name a store in the output folder.

    Raises:
        InputError: it is empty, names another folder, or has characters that file systems refuse.
    """
    if not slide_id or slide_id.startswith(".") or _FORBIDDEN & set(slide_id) or len(slide_id.encode()) > 200:
        raise InputError(
            f"{slide_id!r} ({where}) cannot name a store: use a name of at most 200 bytes that does not begin with "
            "a dot and has no slash or other special character"
        )
    return slide_id


def _search_folder(folder: Path) -> list[Path]:
    found = []
    dicom_folders = set()
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SLIDE_SUFFIXES and p.is_file()):
        if any(part.startswith(".") or part.endswith(".zarr") for part in path.relative_to(folder).parts):
            continue
        if path.suffix.lower() == ".dcm":
            if path.parent in dicom_folders:
                continue
            dicom_folders.add(path.parent)
        if path.suffix.lower() in {".jpg", ".jpeg"} and path.parent.with_suffix(".vms").exists():
            continue
        found.append(path)
    if not found:
        raise InputError(f"{folder} holds no slide (looked for {', '.join(sorted(SLIDE_SUFFIXES))})")
    return found


def _read_csv(path: Path, mpp: float | None) -> list[SlideSource]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            columns = rows.fieldnames or []
            if "slide" not in columns:
                raise InputError(f'{path} has no column "slide" (its columns: {", ".join(columns) or "none"}): add one')
            sources = [_from_row(path, number, row, mpp) for number, row in enumerate(rows, start=2)]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if not sources:
        raise InputError(f"{path} lists no slide")
    return sources


def _from_row(path: Path, number: int, row: dict[str, str], mpp: float | None) -> SlideSource:
    where = f"{path}, line {number}"
    slide = (row["slide"] or "").strip()
    if not slide:
        raise InputError(f'{where}: the column "slide" is empty')
    if not is_url(slide):
        slide = str(path.parent / slide)  # an absolute path stays as it is
    given = (row.get("mpp") or "").strip()
    try:
        scale = float(given) if given else mpp
    except ValueError:
        raise InputError(f'{where}: mpp must be a number of micrometres per pixel, not "{given}"') from None
    slide_id = (row.get("slide_id") or "").strip() or slide_name(slide)
    return SlideSource(slide, check_slide_id(slide_id, where), scale)


def _refuse_duplicates(sources: Sequence[SlideSource]) -> None:
    """Two slides of one id would write one store; compared without case, as some file systems do."""
    seen: dict[str, SlideSource] = {}
    for source in sources:
        other = seen.setdefault(source.slide_id.lower(), source)
        if other is not source:
            raise InputError(
                f'{source.path} and {other.path} would both be kept as "{source.slide_id}": rename one, or give each a '
                'slide_id in a CSV with the columns "slide" and "slide_id"'
            )
