"""``wsi export``: features in another tool's layout."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from wsi_engine.cli import console


class Format(StrEnum):
    """Layouts of other tools."""

    trident = "trident"
    clam = "clam"
    stamp = "stamp"
    anndata = "anndata"
    spatialdata = "spatialdata"


NAMES = "|".join(Format)
_WITH_PREDICTIONS = (Format.anndata, Format.spatialdata)


def export(
    layout: Annotated[Format, typer.Argument(metavar=NAMES, help="Whose layout.", show_default=False)],
    stores: Annotated[
        list[Path],
        typer.Argument(metavar="STORE|DIR...", help="Stores (.zarr) or folders of stores.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write to.", show_default=False)],
    encoder: Annotated[
        str | None, typer.Option(help="Whose features; the only ones if not given.", show_default=False)
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="anndata, spatialdata: predictions.csv of wsi classify; each slide's row becomes columns.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Write features and coordinates as TRIDENT, CLAM, STAMP, AnnData or SpatialData lay them out."""
    from wsi_engine.errors import InputError, SettingsError, WsiError  # noqa: PLC0415
    from wsi_engine.store import FeatureStore  # noqa: PLC0415

    paths = [
        path for given in stores for path in ([given] if given.suffix == ".zarr" else sorted(given.glob("*.zarr")))
    ]
    if not paths:
        raise InputError(f"no store (.zarr) in {', '.join(map(str, stores))}")
    write: Callable[..., Any] = getattr(import_module(f"wsi_engine.formats.{layout}"), f"export_{layout}")
    if layout in _WITH_PREDICTIONS:
        write = partial(write, predictions=predictions)
    elif predictions:
        raise SettingsError(f"{layout} has no place for predictions: leave out --predictions")
    failed = False
    for path in paths:
        try:
            files = write(FeatureStore.open(path), out, encoder, overwrite=overwrite)
        except (SettingsError, InputError):
            raise
        except WsiError as error:
            if len(paths) == 1:
                raise
            console.print_error(str(error))
            failed = True
        else:
            console.out.print(f"{path.stem}: {files.features}", markup=False)
    if failed:
        raise typer.Exit(console.EXIT_FAILED)
