"""``wsi import``: another tool's features into stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wsi_engine.cli import console
from wsi_engine.cli.export import Format


def import_(
    layout: Annotated[Format, typer.Argument(metavar="trident|clam", help="Whose layout.", show_default=False)],
    folder: Annotated[
        Path,
        typer.Argument(
            help="trident: a job folder (20x_256px_0px_overlap); clam: the folder with patches and h5_files."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the feature stores.", show_default=False)],
    encoder: Annotated[
        str | None, typer.Option(help="Whose features; needed for clam, which does not record it.", show_default=False)
    ] = None,
    slide_mpp: Annotated[
        float | None,
        typer.Option(
            help="Micrometres per level-0 pixel; needed for clam, which does not record it.", show_default=False
        ),
    ] = None,
) -> None:
    """Read features and coordinates of TRIDENT or CLAM into stores."""
    from wsi_engine.errors import InputError  # noqa: PLC0415
    from wsi_engine.formats.clam import import_clam  # noqa: PLC0415
    from wsi_engine.formats.trident import import_trident  # noqa: PLC0415

    if layout is Format.trident:
        paths = import_trident(folder, out, encoder, slide_mpp)
    elif encoder is None:
        raise InputError("CLAM's files do not say which encoder made them: pass --encoder")
    else:
        paths = import_clam(folder, out, encoder, slide_mpp)
    for path in paths:
        console.out.print(str(path), markup=False)
