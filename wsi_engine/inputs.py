"""From what a user names (files, folders, CSVs, URLs) to a checked list of slides."""

from __future__ import annotations

import math
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias
from urllib.parse import urlsplit

from wsi_engine.errors import InputError
from wsi_engine.places import Place, as_place, is_url, local_path
from wsi_engine.slide import MPP_RANGE, slide_name
from wsi_engine.spreadsheet import read_csv

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

MOST_ID_BYTES = 150
"""Longest id of a slide in UTF-8: names of files are made of it, and file systems take 255 bytes."""

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
    taken, since OpenSlide finds the rest of a slide by itself. A URL without such an ending is searched where there is
    no object of that name and some are below it. A CSV, on disk or by URL, has a column ``slide`` (paths relative to
    the CSV) and, if wanted, ``slide_id`` and ``mpp``.

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
        place = as_place(path)
        if _suffix(path) == ".csv":
            sources += _read_list(place, mpp)
        elif _is_folder(place):
            found = map(os.fspath, _search_folder(place))
            sources += [SlideSource(one, check_slide_id(slide_name(one), one), mpp) for one in found]
        else:
            sources.append(SlideSource(path, check_slide_id(slide_name(path), path), mpp))
    if not sources:
        raise InputError("no slide was named: pass slides, folders or CSV files")
    _refuse_duplicates(sources)
    return sources


def check_slide_id(slide_id: str, where: str) -> str:
    """The id itself when it can name a store in the output folder.

    Raises:
        InputError: it is empty or too long, names another folder, or has characters that file systems refuse.
    """
    size = len(slide_id.encode("utf-8", "surrogatepass"))
    if not slide_id or slide_id.startswith(".") or _FORBIDDEN & set(slide_id) or size > MOST_ID_BYTES:
        raise InputError(
            f"{slide_id!r} ({printable(where)}) cannot name a store: use a name of at most {MOST_ID_BYTES} bytes that "
            "does not begin with a dot and has no slash or other special character"
        )
    if printable(slide_id) != slide_id:
        raise InputError(
            f"{slide_id!r} ({printable(where)}) cannot name a store, for it is not in UTF-8: rename the file"
        )
    return slide_id


def printable(text: str) -> str:
    r"""A text with bytes that are no UTF-8, as names of files may have, as ``\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode()


def place_slide(slide: str, folder: Place) -> str:
    """Path or URL of a slide that a list names; relative ones start from a folder."""
    slide = local_path(slide)
    if is_url(slide) or os.path.isabs(slide):
        return slide
    if isinstance(folder, Path):
        return str(folder / slide)
    scheme, _, within = folder.url.partition("://")
    return f"{scheme}://{posixpath.normpath(f'{within}/{slide}')}"


def parse_mpp(text: str, where: str) -> float | None:
    """Micrometres per level-0 pixel that a cell gives a slide; None where it is empty.

    Raises:
        InputError: it is no believable number.
    """
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    low, high = MPP_RANGE
    if value is not None and not low <= value <= high:
        raise InputError(f'{where}: mpp must be micrometres per pixel within {low}–{high}, not "{text}"')
    return value


def _suffix(path: str) -> str:
    """What the name of a path or URL ends in, in small letters, with its dot."""
    return PurePosixPath(urlsplit(path).path if is_url(path) else path).suffix.lower()


def _is_folder(place: Place) -> bool:
    """Whether slides lie below. Of a URL that cannot be looked at, the reader of slides will say so."""
    if isinstance(place, Path):
        return place.is_dir()
    if _suffix(place.url) in SLIDE_SUFFIXES:
        return False
    try:
        return not place.is_file() and place.is_dir()
    except OSError:
        return False


def _search_folder(folder: Place) -> list[Place]:
    """The slides in a folder and those below it, by name.

    Raises:
        InputError: there is none, or it cannot be listed.
    """
    found = []
    dicom_folders = set()
    try:
        for within, place in sorted(_list_files(folder)):
            suffix = place.suffix.lower()
            if any(part.startswith(".") or part.endswith(".zarr") for part in within):
                continue
            if suffix == ".dcm":
                if within[:-1] in dicom_folders:
                    continue
                dicom_folders.add(within[:-1])
            if suffix in {".jpg", ".jpeg"} and _belongs_to_vms(place):
                continue
            found.append(place)
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror or error}") from error
    if not found:
        raise InputError(f"{folder} holds no slide (looked for {', '.join(sorted(SLIDE_SUFFIXES))})")
    return found


def _list_files(folder: Place) -> Iterator[tuple[tuple[str, ...], Place]]:
    """The files below a folder that count as slides by their names: the parts of the way there, and the file."""
    if isinstance(folder, Path):
        for path in folder.rglob("*"):
            if path.suffix.lower() in SLIDE_SUFFIXES and path.is_file():
                yield path.relative_to(folder).parts, path
        return
    for name in folder.files():
        if PurePosixPath(name).suffix.lower() in SLIDE_SUFFIXES:
            yield PurePosixPath(name).parts, folder / name


def _belongs_to_vms(picture: Place) -> bool:
    """Whether a JPEG is a part of the Hamamatsu slide that lies beside its folder."""
    folder = picture.absolute().parent if isinstance(picture, Path) else picture.parent
    return bool(folder.name) and folder.with_name(f"{folder.stem}.vms").exists()


def _read_list(place: Place, mpp: float | None) -> list[SlideSource]:
    columns, records = read_csv(place)
    if "slide" not in columns:
        raise InputError(f'{place} has no column "slide" (its columns: {", ".join(columns) or "none"}): add one')
    if not records:
        raise InputError(f"{place} lists no slide")
    return [_from_record(where, record, place.parent, mpp) for where, record in records]


def _from_record(where: str, record: dict[str, str], folder: Place, mpp: float | None) -> SlideSource:
    if not record["slide"]:
        raise InputError(f'{where}: the column "slide" is empty')
    slide = place_slide(record["slide"], folder)
    scale = parse_mpp(record.get("mpp", ""), where)
    slide_id = record.get("slide_id", "") or slide_name(slide)
    return SlideSource(slide, check_slide_id(slide_id, where), mpp if scale is None else scale)


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
