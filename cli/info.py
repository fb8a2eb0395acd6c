"""``wsi info``: what a slide is and which reader opens it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from wsi_engine.cli import console


def info(
    slide: Annotated[str, typer.Argument(help="Path or URL of a slide.", show_default=False)],
    slide_mpp: Annotated[
        float | None, typer.Option(help="Micrometres per level-0 pixel, instead of the header's.", show_default=False)
    ] = None,
    reader: Annotated[str, typer.Option(help="auto, turbo, openslide, tiffslide or image.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show a slide's size, levels, scale, and the reader that opens it."""
    from wsi_engine.slide import open_slide  # noqa: PLC0415 - readers load only when used

    with open_slide(slide, slide_mpp, reader) as opened:
        facts = _facts(opened)
    if as_json:
        console.print_json(facts)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(facts):
        table.add_row(name, value)
    console.out.print(table)


def _facts(slide: Any) -> dict[str, Any]:
    """What is known of an open slide as plain JSON values."""
    from wsi_engine.errors import ScaleError  # noqa: PLC0415

    try:
        mpp, problem = list(slide.mpp), None
    except ScaleError as error:
        mpp, problem = None, str(error)
    return {
        "path": slide.path,
        "name": slide.name,
        "reader": slide.reader,
        "vendor": slide.metadata.vendor,
        "dimensions": list(slide.dimensions),
        "levels": [{"width": v.width, "height": v.height, "downsample": v.downsample} for v in slide.levels],
        "mpp": mpp,
        "mpp_source": slide.mpp_source,
        "mpp_problem": problem,
        "objective": slide.metadata.objective,
        "fingerprint": slide.fingerprint,
    }


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    width, height = facts["dimensions"]
    mpp = facts["mpp"]
    if mpp:
        scale = f"{mpp[0]:.6g} × {mpp[1]:.6g} µm per pixel (from {facts['mpp_source']})"
        scale += f"; {width * mpp[0] / 1000:.2f} × {height * mpp[1] / 1000:.2f} mm"
    else:
        scale = f"[yellow]{facts['mpp_problem']}[/]"
    rows = [
        ("slide", facts["path"]),
        ("reader", facts["reader"]),
        ("vendor", facts["vendor"]),
        ("size", f"{width} × {height} px"),
        ("scale", scale),
    ]
    if facts["objective"]:
        rows.append(("objective", f"{facts['objective']:g}×"))
    for number, level in enumerate(facts["levels"]):
        rows.append((f"level {number}", f"{level['width']} × {level['height']} px, downsample {level['downsample']:g}"))
    return [*rows, ("fingerprint", facts["fingerprint"])]
