"""``wsi evaluate nuclei``: predicted label images against true ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from wsi_engine.cli import console

if TYPE_CHECKING:
    from wsi_engine.nuclei.scoring import NucleiComparison

_TITLES = {
    "aji": "AJI",
    "aji_plus": "AJI+",
    "dq": "DQ",
    "sq": "SQ",
    "pq": "PQ",
    "dice": "Dice",
    "dice2": "Dice2",
    "directed_hausdorff": "AHD",
    "hausdorff_95": "HD95",
}
_DISTANCES = ("directed_hausdorff", "hausdorff_95")


def evaluate_nuclei(
    predicted: Annotated[
        Path,
        typer.Argument(metavar="PREDICTED", help="Label image, or folder of them (of wsi nuclei too).",
                       show_default=False),
    ],
    truth: Annotated[
        Path, typer.Argument(metavar="TRUTH", help="True label image, or folder of them.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:  # fmt: skip
    """Measure predicted nuclei against true ones, image by image: AJI, panoptic quality, Dice, Hausdorff.

    Label images are PNG, TIFF or NPY with a number for each nucleus, matched by name (NAME.png, NAME_label.png,
    NAME.student.labels.tif). AHD and HD95 are distances in pixels; the last row is the mean over images.
    """
    from wsi_engine.nuclei.scoring import compare_nuclei  # noqa: PLC0415 - a light command line starts fast

    found = compare_nuclei(predicted, truth)
    if as_json:
        console.print_json(found.to_json())
    else:
        _print_comparison(found)
    if found.failed:
        raise typer.Exit(console.EXIT_FAILED)


def _print_comparison(found: NucleiComparison) -> None:
    table = Table("image", *_TITLES.values(), "true", "found", box=None, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    scored = [(image.name, vars(image.scores)) for image in found.images if image.scores is not None]
    mean = [(f"mean of {len(scored)}", found.means())] if scored else []
    for name, values in scored + mean:
        figures = [_format(values[key], 1 if key in _DISTANCES else 3) for key in _TITLES]
        counts = [f"{values[key]:.0f}" for key in ("true_count", "predicted_count")]
        table.add_row(Text(name), *figures, *counts)
    if scored:
        console.out.print(table)
    for image in found.failed:
        console.print_error(f"{image.name}: {image.problem}")
    if found.unused:
        console.err.print(Text(f"without truth, passed over: {', '.join(found.unused)}", style="yellow"))


def _format(value: float, digits: int) -> str:
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"
