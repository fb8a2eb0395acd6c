"""Where the results of a cohort lie in its folder."""

from __future__ import annotations

import os
from pathlib import Path

from wsi_engine.errors import InputError

STORES = "wsi"
"""Folder of results beside a cohort's file."""

RUNS, PREDICTIONS = "runs", "predictions"
"""Folders of training runs, and of what they say of slides, beside the stores."""


def place_run(out: Path, run: str | os.PathLike[str]) -> Path:
    """A run's folder: a plain name stands for ``<out>/runs/<name>``, anything with a folder in it for itself."""
    name = os.fspath(run)
    plain = isinstance(run, str) and not {os.sep, os.altsep} & set(name) and name not in ("", ".", "..")
    return out / RUNS / name if plain else Path(run)


def find_run(out: Path, run: str | os.PathLike[str] | None) -> Path | None:
    """The folder of a training run; None for the only one there is, and None where there is none.

    Raises:
        InputError: there are several and none was named.
    """
    if run is not None:
        return place_run(out, run)
    there = sorted(path.parent for path in (out / RUNS).glob("*/run.json"))
    if len(there) > 1:
        raise InputError(f"{out / RUNS} holds several runs ({', '.join(path.name for path in there)}): name one")
    return there[0] if there else None


def place_predictions(out: Path, run: Path) -> Path:
    """Folder of what a run says of the cohort's slides."""
    return out / PREDICTIONS / run.resolve().name
