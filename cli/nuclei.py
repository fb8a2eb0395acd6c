"""``wsi nuclei``: slides and pictures in, every nucleus out."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from wsi_engine.cli import console
from wsi_engine.cli.cluster import ClusterDisplay, ClusterOption
from wsi_engine.cli.progress import RunDisplay

if TYPE_CHECKING:
    from wsi_engine.nuclei.slides import NucleiReport, NucleiResult

_STYLES = {"done": "green", "already complete": "dim", "no tissue": "yellow", "busy": "yellow", "failed": "bold red"}


class Where(StrEnum):
    """Where nuclei are looked for."""

    auto = "auto"
    otsu = "otsu"
    none = "none"


class TableKind(StrEnum):
    """How the table is written."""

    csv = "csv"
    parquet = "parquet"
    none = "none"


_WHERE: dict[Where, Literal["auto", "otsu"] | None] = {Where.auto: "auto", Where.otsu: "otsu", Where.none: None}
_TABLES: dict[TableKind, Literal["csv", "parquet"] | None] = {
    TableKind.csv: "csv",
    TableKind.parquet: "parquet",
    TableKind.none: None,
}


def nuclei(
    slides: Annotated[
        list[str],
        typer.Argument(metavar="SLIDE|IMAGE|DIR|CSV...", help="Slides, pictures, folders, CSV files or URLs.",
                       show_default=False),
    ],
    out: Annotated[
        str, typer.Option("-o", "--out", metavar="DIR|URL", help="Folder of the results.", show_default=False)
    ],
    method: Annotated[
        str, typer.Option(help="student, stain, scale-attention, or builtin: the student, or what --model is of.")
    ] = "builtin",
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights in place of the built-in ones, as of wsi train nuclei.",
                     show_default=False),
    ] = None,
    slide_mpp: Annotated[
        float | None,
        typer.Option(help="Micrometres per level-0 pixel, for pictures and where headers have none.",
                     show_default=False),
    ] = None,
    tissue: Annotated[
        Where, typer.Option(help="Look at tissue (otsu), at everything (none), or what suits the size (auto).")
    ] = Where.auto,
    tile_px: Annotated[int, typer.Option(help="Side of a tile in pixels; changes memory, not nuclei.")] = 1024,
    device: Annotated[str, typer.Option(help="Where a network runs: auto, cpu, cuda, cuda:1.")] = "auto",
    workers: Annotated[int, typer.Option(help="Reading threads.")] = 2,
    geojson: Annotated[bool, typer.Option("--geojson/--no-geojson", help="Write nuclei for QuPath.")] = True,
    table: Annotated[TableKind, typer.Option(help="Write measurements as csv, parquet, or none.")] = TableKind.csv,
    overlay: Annotated[bool, typer.Option("--overlay/--no-overlay", help="Draw nuclei over the slide.")] = True,
    allow_dark: Annotated[
        bool, typer.Option("--allow-dark", help="Take slides that are dark like fluorescence.")
    ] = False,
    reader: Annotated[str, typer.Option(help="auto, turbo, openslide, tiffslide or image.")] = "auto",
    cluster: ClusterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document at the end.")] = False,
) -> None:  # fmt: skip
    """Find and measure every nucleus: OUT/<slide_id>.zarr, GeoJSON for QuPath, a table, a summary and a picture.

    The nuclei do not depend on the tiles. Safe to kill and to run again: finished slides are skipped.
    A CSV has a column "slide" and, if wanted, "slide_id" and "mpp".
    """
    from wsi_engine.nuclei.segmentation import NucleiSettings  # noqa: PLC0415 - Numba loads only when it is needed
    from wsi_engine.nuclei.slides import NucleiOutputs, segment_slides  # noqa: PLC0415

    settings = NucleiSettings(tile_px, _WHERE[tissue], allow_dark, workers)
    outputs = NucleiOutputs(geojson, _TABLES[table], overlay)
    with NucleiDisplay(console.err) if cluster is None else ClusterDisplay(console.err, _describe) as display:
        report = segment_slides(
            slides,
            out,
            method,
            weights=model,
            device=device,
            slide_mpp=slide_mpp,
            settings=settings,
            outputs=outputs,
            reader=reader,
            progress=display,
            cluster=cluster,
        )
    if as_json:
        console.print_json(report.to_json())
    else:
        _print_report(report, out)
    if report.failed:
        raise typer.Exit(console.EXIT_FAILED)


class NucleiDisplay(RunDisplay):
    """Shows a run on a console; a context manager and a :class:`~wsi_engine.nuclei.slides.NucleiProgress`."""

    def __init__(self, to: Console) -> None:
        super().__init__(to, _describe)


def _describe(result: NucleiResult) -> Text:
    """How a slide ended, in words."""
    words = f": {result.message}" if result.message else f", {result.nuclei} nuclei in {result.seconds:.1f} s"
    return Text.assemble((result.status, _STYLES[result.status]), words)


def _print_report(report: NucleiReport, out: str) -> None:
    """A table of the slides that have nuclei, one of those that failed, and where the files are."""
    found = [result for result in report.results if result.status not in ("failed", "busy")]
    if found:
        table = console.make_table("slide", "nuclei", "per mm²", "seconds")
        for column in table.columns[1:]:
            column.justify = "right"
        for result in found:
            density = "–" if result.per_mm2 is None else f"{result.per_mm2:.0f}"
            table.add_row(Text(result.slide_id), str(result.nuclei), density, f"{result.seconds:.1f}")
        console.out.print(table)
    others = [result for result in report.results if result.status in ("failed", "busy")]
    if others:
        table = console.make_table("failed", "why")
        for result in others:
            table.add_row(Text(result.slide_id), Text(result.message))
        console.out.print(table)
    counts = Counter(result.status for result in report.results)
    words = ", ".join(f"{count} {status}" for status, count in counts.items())
    console.out.print(f"{words} by {report.method} in {report.wall_seconds:.1f} s; {out}", markup=False)
