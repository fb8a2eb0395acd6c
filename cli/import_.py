"""``wsi import``: another tool's features into stores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from wsi_engine.cli import console
from wsi_engine.cli.export import NAMES, Format


def import_(
    layout: Annotated[Format, typer.Argument(metavar=NAMES, help="Whose layout.", show_default=False)],
    folder: Annotated[
        Path,
        typer.Argument(
            help="trident: a job folder (20x_256px_0px_overlap); clam: the folder with patches and h5_files; stamp: "
            "the folder with <slide>.h5; anndata, spatialdata: a .zarr folder, or a folder of them."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the feature stores.", show_default=False)],
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Whose features; needed for clam, which does not record it; not for anndata.", show_default=False
        ),
    ] = None,
    slide_mpp: Annotated[
        float | None,
        typer.Option(
            help="Micrometres per level-0 pixel; needed for clam and stamp, which do not record it; for trident the "
            "true one, and for LazySlide's folders where it did not know.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Read features and coordinates of TRIDENT, CLAM, STAMP, AnnData or SpatialData (LazySlide) into stores."""
    from wsi_engine.errors import PartialImportError  # noqa: PLC0415

    try:
        _print(_import(layout, folder, out, encoder, slide_mpp))
    except PartialImportError as error:
        _print(error.done)
        raise


def _print(stores: Sequence[Path]) -> None:
    for path in stores:
        console.out.print(str(path), markup=False)


def _import(layout: Format, folder: Path, out: Path, encoder: str | None, slide_mpp: float | None) -> list[Path]:
    from wsi_engine.errors import InputError, SettingsError  # noqa: PLC0415

    if layout is Format.trident:
        from wsi_engine.formats.trident import import_trident  # noqa: PLC0415

        return import_trident(folder, out, encoder, slide_mpp)
    if layout is Format.clam:
        from wsi_engine.formats.clam import import_clam  # noqa: PLC0415

        if encoder is None:
            raise InputError("CLAM's files do not say which encoder made them: pass --encoder")
        return import_clam(folder, out, encoder, slide_mpp)
    if layout is Format.stamp:
        from wsi_engine.formats.stamp import import_stamp  # noqa: PLC0415

        return import_stamp(folder, out, encoder, slide_mpp)
    if layout is Format.anndata:
        from wsi_engine.formats.anndata import import_anndata  # noqa: PLC0415

        if encoder is not None or slide_mpp is not None:
            given = "--encoder" if encoder is not None else "--slide-mpp"
            raise SettingsError(f"AnnData folders name encoder and scale themselves: leave out {given}")
        return import_anndata(folder, out)
    from wsi_engine.formats.spatialdata import import_spatialdata  # noqa: PLC0415

    return import_spatialdata(folder, out, encoder, slide_mpp)
