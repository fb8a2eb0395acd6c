"""``wsi encoders``: the table of encoders."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from wsi_engine.cli import console


def encoders(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """List the encoders that wsi extract knows by name."""
    from wsi_engine.encoders import list_encoders  # noqa: PLC0415

    cards = list_encoders()
    if as_json:
        console.print_json([card.to_json() for card in cards])
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    for heading in ("features", "px", "mpp"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    table.add_column("licence")
    for card in cards:
        weights = "built in" if card.builder == "texture" else "gated" if card.gated else "open"
        mpp = f"{card.mpp:g}" if card.mpp else "-"
        table.add_row(card.name, str(card.dim), str(card.input_px or "any"), mpp, weights, card.licence)
    console.out.print(table)
    console.out.print(
        "\nAny other timm model: --encoder timm:NAME. No network: --weights FILE, or --weights random:0 to try."
    )
