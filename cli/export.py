"""``wsi export``: features in another tool's layout."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from wsi_engine.cli import console


class Format(StrEnum):
    """Layouts of other tools."""

    trident = "trident"
    clam = "clam"


def export(
    layout: Annotated[Format, typer.Argument(metavar="trident|clam", help="Whose layout.", show_default=False)],
    stores: Annotated[
        list[Path],
        typer.Argument(metavar="STORE|DIR...", help="Stores (.zarr) or folders of stores.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write to.", show_default=False)],
    encoder: Annotated[
        str | None, typer.Option(help="Whose features; the only ones if not given.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Write features and coordinates as TRIDENT or CLAM lay them out."""
    from wsi_engine.errors import InputError  # noqa: PLC0415
    from wsi_engine.formats.clam import export_clam  # noqa: PLC0415
    from wsi_engine.formats.trident import export_trident  # noqa: PLC0415
    from wsi_engine.store import FeatureStore  # noqa: PLC0415

    paths = [
        path for given in stores for path in ([given] if given.suffix == ".zarr" else sorted(given.glob("*.zarr")))
    ]
    if not paths:
        raise InputError(f"no store (.zarr) in {', '.join(map(str, stores))}")
    write = export_trident if layout is Format.trident else export_clam
    for path in paths:
        files = write(FeatureStore.open(path), out, encoder, overwrite=overwrite)
        console.out.print(f"{path.stem}: {files.features}", markup=False)
