"""Readers of slides, one module each, and the choice among them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from wsi_engine.clock import StageClock
from wsi_engine.errors import SettingsError, SlideError
from wsi_engine.places import is_url, local_path
from wsi_engine.readers import magic
from wsi_engine.readers.base import DamagedError, Reader

__all__ = ["READERS", "is_url", "open_reader"]

READERS = ("turbo", "openslide", "tiffslide", "image")
"""Names of the readers, the fastest first."""

Source: TypeAlias = str | os.PathLike[str] | NDArray[np.uint8]

_CLASSES = {
    "turbo": "TurboReader",
    "openslide": "OpenSlideReader",
    "tiffslide": "TiffSlideReader",
    "image": "ImageReader",
}

_SLIDE_SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".dcm", ".svslide", ".vms", ".vmu"}
"""Names that promise another content than a PNG or JPEG. (An .mrxs file is a JPEG.)"""

# tifffile logs what it forgives in broken files; without a handler that would be printed beside our own sentence.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def open_reader(source: Source, reader: str = "auto", clock: StageClock | None = None) -> Reader:
    """Open a slide with the reader named, or with the fastest that can read it.

    ``auto`` gives arrays to ``image`` and URLs to ``tiffslide``. Local files are judged by their content:
    TIFFs go to ``turbo``, then to ``openslide``, ``image`` and ``tiffslide``, in an order that depends on how
    they are laid out; pictures to ``image``; all else to ``openslide``. A TIFF whose tile tables reach past the
    end of the file is refused, whatever could open it.

    Args:
        source: path, URL (also ``file://``), or array, uint8, (H, W, 3), (H, W) or (H, W, 4).
        reader: ``auto`` or one of :data:`READERS`.
        clock: where the seconds of reading go.

    Raises:
        SlideError: the source is absent, damaged, or nothing can read it; the message names what was tried.
        SettingsError: there is no such reader, or it cannot read this kind of source.
    """
    clock = StageClock() if clock is None else clock
    if reader not in ("auto", *READERS):
        raise SettingsError(f"there is no reader {reader!r}; choose auto, {', '.join(READERS)}")
    if isinstance(source, np.ndarray):
        if reader not in {"auto", "image"}:
            raise SettingsError(f"reader {reader} reads files, not arrays; use image or auto")
        return _build("image", source, clock)
    path = _as_text(source)
    if is_url(path):
        if reader not in {"auto", "tiffslide"}:
            raise SettingsError(f"reader {reader} reads local files only; use tiffslide or auto for {path}")
        return _build("tiffslide", path, clock)
    path = local_path(path)
    head = _read_head(path)
    if head.startswith(magic.TIFF):
        from wsi_engine.readers.tables import check_tables  # noqa: PLC0415 - needs tifffile

        check_tables(path)
    if reader != "auto":
        return _build(reader, path, clock)
    return _try_readers(path, _candidates(path, head), clock)


def _as_text(source: object) -> str:
    if not isinstance(source, str | os.PathLike):
        raise SettingsError(f"a slide is named by a path, a URL or a uint8 array, not by a {type(source).__name__}")
    path = os.fspath(source)
    return os.fsdecode(path)


def _build(name: str, source: Source, clock: StageClock) -> Reader:
    # Each reader imports its own library, so a reader that is not used costs nothing.
    module = import_module(f"wsi_engine.readers.{name}")
    reader = cast(Callable[[Source, StageClock], Reader], getattr(module, _CLASSES[name]))(source, clock)
    for number, level in enumerate(reader.levels):
        if level.width < 1 or level.height < 1 or not 0 < level.downsample < math.inf:
            reader.close()
            where = "the array" if isinstance(source, np.ndarray) else os.fspath(source)
            raise SlideError(
                f"cannot read {where}: level {number} is {level.width} x {level.height} pixels by its header"
            )
    return reader


def _try_readers(path: str, names: tuple[str, ...], clock: StageClock) -> Reader:
    refusals = []
    for name in names:
        try:
            return _build(name, path, clock)
        except DamagedError:
            raise
        except (SlideError, ImportError) as error:
            refusals.append(f"{name} ({_reason(str(error), path)})")
    raise SlideError(f"cannot read {path}: tried {', '.join(refusals)}; check that the file is a complete slide")


def _reason(message: str, path: str) -> str:
    """What a reader's message says beyond the path and the fact that it cannot read it."""
    text = " ".join(message.split()).rstrip(".")
    for opening in (
        f"cannot read {path}: ",
        f"{path} cannot be read by the turbo reader: ",
        f"{path} cannot be read: ",
    ):
        text = text.removeprefix(opening)
    return text


def _candidates(path: str, head: bytes) -> tuple[str, ...]:
    """Names of the readers to try on a local file, in order."""
    suffix = Path(path).suffix.lower()
    if suffix == ".mrxs":
        folder = Path(path).with_suffix("")
        if not folder.is_dir():
            raise SlideError(f"cannot read {path}: its data folder {folder} is missing; copy it beside the file")
        return ("openslide",)
    if head.startswith((magic.PNG, magic.JPEG)):
        if suffix in _SLIDE_SUFFIXES:
            kind = "PNG" if head.startswith(magic.PNG) else "JPEG"
            raise SlideError(f'{path} is a {kind} picture named {suffix}; rename it or open it with reader "image"')
        return ("image",)
    if head.startswith(magic.TIFF):
        from wsi_engine.readers.tables import order_readers  # noqa: PLC0415 - needs tifffile

        return order_readers(path)
    return ("turbo", "openslide", "tiffslide", "image")


def _read_head(path: str) -> bytes:
    """First bytes of a local file; a SlideError that says so if there is no file that can be read."""
    try:
        mode = os.stat(path).st_mode
        if S_ISDIR(mode):
            raise SlideError(_describe_folder(path))
        if not S_ISREG(mode):  # opening a pipe would wait for ever
            raise SlideError(f"cannot read {path}: it is no regular file")
        with open(path, "rb") as file:
            head = file.read(32)
    except FileNotFoundError as error:
        raise SlideError(f"there is no file {path}; check the path") from error
    except PermissionError as error:
        raise SlideError(f"cannot read {path}: permission denied; check the file's access rights") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SlideError(f"cannot read {path!r}: {reason}") from error
    if not head:
        raise SlideError(f"cannot read {path}: the file is empty (0 bytes); copy it again")
    return head


def _describe_folder(path: str) -> str:
    if os.access(path, os.R_OK):
        inside = next(
            (name for name in sorted(os.listdir(path)) if name.lower().endswith((".dcm", ".mrxs", ".vms"))), None
        )
        if inside:
            return f"{path} is a folder; name a slide file in it, for example {os.path.join(path, inside)}"
    beside = Path(path).with_name(Path(path).name + ".mrxs")
    if beside.is_file():
        return f"{path} is the data folder of a slide; open {beside} instead"
    return f"{path} is a folder, not a slide; name a slide file in it"
