"""The end of ``wsi demo``: every nucleus of a small field of its slide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import typer

from wsi_engine.cli import console
from wsi_engine.kernels import summed_area
from wsi_engine.tissue import TissueMask

FIELD_UM = 640.0
"""Side of the field in µm: a few seconds without a GPU."""


def demo_nuclei(path: str, out: Path, slide_mpp: float | None, tissue: TissueMask | None) -> None:
    """Find the nuclei of the part of a slide with the most tissue, and say where the files are."""
    from wsi_engine.cli.nuclei import NucleiDisplay  # noqa: PLC0415
    from wsi_engine.nuclei.segmentation import NucleiSettings  # noqa: PLC0415
    from wsi_engine.nuclei.slides import segment_slides  # noqa: PLC0415

    settings = NucleiSettings(tissue="auto" if tissue is None else replace(tissue, mask=choose_field(tissue)))
    with NucleiDisplay(console.err) as display:
        report = segment_slides(path, out / "nuclei", slide_mpp=slide_mpp, settings=settings, progress=display)
    if report.failed:
        raise typer.Exit(console.EXIT_FAILED)
    (result,) = report.results
    if not result.files:  # another process is at the slide
        console.print_error(result.message)
        raise typer.Exit(console.EXIT_FAILED)
    density = "" if result.per_mm2 is None else f", {result.per_mm2:.0f} per mm²"
    console.out.print(
        f"{result.nuclei} nuclei on {result.tissue_mm2:.2f} mm² of tissue{density}, in {result.seconds:.0f} s",
        markup=False,
    )
    console.out.print(f"picture: {result.files['overlay']}; for QuPath: {result.files['geojson']}", markup=False)


def choose_field(tissue: TissueMask) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """The mask within the square of :data:`FIELD_UM` that holds the most tissue, the first such in raster order."""
    side = max(1, round(FIELD_UM / tissue.mpp))
    height, width = tissue.mask.shape
    side_y, side_x = min(side, height), min(side, width)
    sums = summed_area(tissue.mask)
    inside = sums[side_y:, side_x:] - sums[:-side_y, side_x:] - sums[side_y:, :-side_x] + sums[:-side_y, :-side_x]
    top, left = np.unravel_index(int(inside.argmax()), inside.shape)
    field = np.zeros_like(tissue.mask)
    part = slice(int(top), int(top) + side_y), slice(int(left), int(left) + side_x)
    field[part] = tissue.mask[part]
    return field
