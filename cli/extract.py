"""``wsi extract``: slides in, features out."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from wsi_engine.bottleneck import find_bottleneck
from wsi_engine.cli import console
from wsi_engine.cli.cluster import ClusterOption
from wsi_engine.clock import STAGES

if TYPE_CHECKING:
    from wsi_engine.extraction import ExtractReport


class Tissue(StrEnum):
    """Which tiles are kept."""

    otsu = "otsu"
    none = "none"


class DType(StrEnum):
    """How features are stored."""

    float16 = "float16"
    float32 = "float32"


def extract(
    slides: Annotated[
        list[str],
        typer.Argument(metavar="SLIDE|DIR|CSV...", help="Slides, folders, CSV files or URLs.", show_default=False),
    ],
    out: Annotated[
        str, typer.Option("-o", "--out", metavar="DIR|URL", help="Folder of the feature stores.", show_default=False)
    ],
    encoder: Annotated[str, typer.Option(help="Name of an encoder; wsi encoders lists them.")] = "resnet50",
    weights: Annotated[
        str | None,
        typer.Option(help="File (.safetensors, .pt) or random:SEED; else the published ones.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts of a fold of wsi train prompt (.safetensors); they name their encoder.", show_default=False
        ),
    ] = None,
    mpp: Annotated[float, typer.Option(help="Micrometres per tile pixel.")] = 0.5,
    tile_px: Annotated[int, typer.Option(help="Side of a tile in pixels.")] = 256,
    stride_px: Annotated[
        int | None, typer.Option(help="Step from tile to tile; a tile's side if not given.", show_default=False)
    ] = None,
    slide_mpp: Annotated[
        float | None,
        typer.Option(help="Micrometres per level-0 pixel, where headers have none.", show_default=False),
    ] = None,
    tissue: Annotated[Tissue, typer.Option(help="Keep tiles with tissue (otsu), or all (none).")] = Tissue.otsu,
    min_tissue: Annotated[float, typer.Option(help="Least part of a tile that must be tissue, 0-1.")] = 0.25,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, fp32, bf16 or fp16; with +compile, torch compiles the network.")
    ] = "auto",
    dtype: Annotated[DType, typer.Option(help="How features are stored.")] = DType.float16,
    batch_size: Annotated[int, typer.Option(help="Tiles encoded at a time.")] = 64,
    workers: Annotated[
        int | None, typer.Option(help="Reading threads; the usable cores if not given.", show_default=False)
    ] = None,
    reader: Annotated[str, typer.Option(help="auto, turbo, openslide, tiffslide or image.")] = "auto",
    exact_resample: Annotated[
        bool, typer.Option("--exact-resample", help="Resample by the area filter alone; JPEGs are decoded whole.")
    ] = False,
    cluster: ClusterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document at the end.")] = False,
) -> None:
    """Extract features of slides into one store each: OUT/<slide_id>.zarr.

    Safe to kill and to run again: finished slides are skipped, one in progress goes on where it stopped.
    A CSV has a column "slide" and, if wanted, "slide_id" and "mpp".
    """
    from wsi_engine import extraction  # noqa: PLC0415 - torch loads only when it is needed
    from wsi_engine.cli.progress import show_run  # noqa: PLC0415

    with show_run(console.err, cluster) as display:
        report = extraction.extract(
            slides,
            out,
            encoder,
            weights,
            prompts=prompts,
            mpp=mpp,
            tile_px=tile_px,
            stride_px=stride_px,
            tissue=None if tissue is Tissue.none else "otsu",
            min_tissue=min_tissue,
            slide_mpp=slide_mpp,
            device=device,
            precision=precision,
            dtype=dtype.value,
            batch_size=batch_size,
            workers=workers,
            reader=reader,
            exact_resample=exact_resample,
            progress=display,
            cluster=cluster,
        )
    if as_json:
        console.print_json(report.to_json())
    else:
        _print_summary(report, out)
    if report.failed:
        raise typer.Exit(console.EXIT_FAILED)


def _print_summary(report: ExtractReport, out: str) -> None:
    """What was done, where the time went, and a table of what failed."""
    counts = Counter(result.status for result in report.results)
    console.out.print(", ".join(f"{count} {status}" for status, count in counts.items()) + f" in {out}")
    if report.tiles:
        wall = max(report.wall_seconds, 1e-9)
        made = f"{report.tiles} tiles by {report.encoder} ({report.precision})"
        console.out.print(f"{made} in {wall:.1f} s: {report.tiles / wall:.1f} tiles/s")
        _print_stages(report)
    if report.failed:
        table = console.make_table("failed", "why")
        for result in report.failed:
            table.add_row(Text(result.slide_id), Text(result.message))
        console.out.print(table)


def _print_stages(report: ExtractReport) -> None:
    """Seconds and rate of each stage, and which one the run waited for."""
    table = console.make_table("stage", "thread-seconds", "tiles/s of one thread")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in STAGES:
        seconds = report.seconds[stage]
        table.add_row(stage, f"{seconds:.1f}", f"{report.tiles / seconds:.0f}" if seconds > 0.001 else "–")
    console.out.print(table)
    stage, advice = find_bottleneck(report.seconds, report.wall_seconds, report.workers)
    console.out.print(f"bottleneck: {stage or 'none'} ({advice})")
