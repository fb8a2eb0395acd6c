"""``wsi bench``: how fast this machine reads and encodes, and how near each stage comes to its limit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from wsi_engine.cli import console

if TYPE_CHECKING:
    from wsi_engine.bench import BenchReport

_SIDE = 8192


def bench(
    slide: Annotated[
        str | None, typer.Argument(help="A slide of your own; else one is drawn.", show_default=False)
    ] = None,
    encoder: Annotated[str, typer.Option(help="Name of an encoder; wsi encoders lists them.")] = "resnet50",
    weights: Annotated[str, typer.Option(help="File or random:SEED; speed does not depend on them.")] = "random:0",
    mpp: Annotated[float, typer.Option(help="Micrometres per tile pixel.")] = 0.5,
    tile_px: Annotated[int, typer.Option(help="Side of a tile in pixels.")] = 256,
    slide_mpp: Annotated[
        float | None,
        typer.Option(help="Micrometres per level-0 pixel, where the header has none.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16; also with +compile.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Tiles encoded at a time.")] = 64,
    tiles: Annotated[int, typer.Option(help="Tiles read and encoded in each repeat.")] = 256,
    repeats: Annotated[int, typer.Option(help="Times each is measured; medians count.")] = 3,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File for the figures as JSON.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure the decoder, each reader, the encoder and both together on this machine."""
    from wsi_engine.bench import run_bench  # noqa: PLC0415 - torch loads only when it is needed
    from wsi_engine.encoders import create_encoder  # noqa: PLC0415
    from wsi_engine.encoders.cards import TEXTURE  # noqa: PLC0415

    loaded = create_encoder(encoder, None if encoder == TEXTURE else weights, device, precision)
    with tempfile.TemporaryDirectory() as folder:
        report = run_bench(
            slide or _draw_slide(Path(folder)),
            loaded,
            slide_mpp=slide_mpp,
            mpp=mpp,
            tile_px=tile_px,
            tiles=tiles,
            batch_size=batch_size,
            repeats=repeats,
            told=lambda name: console.err.print(f"measuring: {name}", style="dim"),
        )
    if out:
        out.write_text(json.dumps(report.to_json(), indent=2), encoding="utf-8")
    if as_json:
        console.print_json(report.to_json())
    else:
        _print(report)


def _draw_slide(folder: Path) -> str:
    """A slide at 0.25 mpp as a scanner writes it, of real texture."""
    from wsi_engine.synthetic import write_ihc_slide  # noqa: PLC0415
    from wsi_engine.tiffwriter import TiffLayout  # noqa: PLC0415

    console.err.print(f"drawing a slide of {_SIDE} × {_SIDE} px", style="dim")
    path = folder / "synthetic.svs"
    write_ihc_slide(path, _SIDE, _SIDE, layout=TiffLayout(level_step=4))
    return str(path)


def _print(report: BenchReport) -> None:
    console.out.print(
        f"{report.tiles} tiles of {report.tile_px} px at {report.mpp:g} mpp by reader {report.reader}; "
        f"{report.encoder} ({report.precision}), batches of {report.batch_size}; {report.cores} cores"
    )
    table = Table("measured", "tiles/s", "least", "most", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for one in report.measurements:
        table.add_row(one.name, f"{one.rate:.1f}", f"{min(one.runs):.1f}", f"{max(one.runs):.1f}")
    console.out.print(table)
    for ratio in report.ratios:
        console.out.print(f"{ratio.name}: {ratio.value:.2f}")
