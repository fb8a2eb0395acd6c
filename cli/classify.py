"""``wsi classify``: slides in, classes out, with where the model looked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import TextColumn
from rich.text import Text

from wsi_engine.cli import console
from wsi_engine.cli.cluster import ClusterOption
from wsi_engine.cli.display import BarDisplay, make_bar

if TYPE_CHECKING:
    from rich.console import Console

    from wsi_engine.classification.outcomes import ClassifyReport, SlideClass


def classify(
    slides: Annotated[
        list[str],
        typer.Argument(
            metavar="SLIDE|STORE|DIR|CSV...",
            help="Slides, stores (.zarr), folders of either, CSV files or URLs.",
            show_default=False,
        ),
    ],
    model: Annotated[
        Path, typer.Option(help="Folder of wsi train, or one head of it (.safetensors).", show_default=False)
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results.", show_default=False)],
    features: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URL", help="Folder of the slides' stores; OUT/features if not given.", show_default=False
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="The encoder's weights, where features are missing; else the published ones.", show_default=False
        ),
    ] = None,
    slide_mpp: Annotated[
        float | None,
        typer.Option(help="Micrometres per level-0 pixel, where headers have none.", show_default=False),
    ] = None,
    heatmaps: Annotated[
        bool, typer.Option("--heatmaps/--no-heatmaps", help="Draw heatmaps, and write them as tiles for QuPath.")
    ] = True,
    tiles: Annotated[bool, typer.Option("--tiles/--no-tiles", help="Draw the most and least attended tiles.")] = True,
    attention: Annotated[
        bool, typer.Option("--attention/--no-attention", help="Keep the attention in the stores.")
    ] = True,
    top: Annotated[int, typer.Option(help="Most and least attended tiles to draw, of each.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the heads: auto, fp32, bf16 or fp16.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Tiles encoded at a time, where features are missing.")] = 64,
    workers: Annotated[
        int | None,
        typer.Option(help="Reading threads of the extraction; the usable cores if not given.", show_default=False),
    ] = None,
    reader: Annotated[str, typer.Option(help="auto, turbo, openslide, tiffslide or image.")] = "auto",
    cluster: ClusterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document at the end.")] = False,
) -> None:
    """Classify slides with a trained run: OUT/predictions.csv, heatmaps and the tiles that mattered.

    Features that are missing are extracted first. A CSV has a column "slide", or "slide_id" for slides whose features
    are there. Predictions of other slides by the same model stay in OUT.
    """
    from wsi_engine.classification.explanation import ExplainSettings  # noqa: PLC0415
    from wsi_engine.classification.slides import classify as classify_slides  # noqa: PLC0415 - loads torch
    from wsi_engine.cli.progress import show_run  # noqa: PLC0415

    settings = ExplainSettings(attention, heatmaps, heatmaps, tiles, top)
    with show_run(console.err, cluster) as extracting, ClassifyDisplay(console.err, extracting) as classifying:
        report = classify_slides(
            slides,
            model,
            out,
            features=features,
            weights=weights,
            slide_mpp=slide_mpp,
            settings=settings,
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            reader=reader,
            progress=classifying,
            extract_progress=extracting,
            cluster=cluster,
        )
    if as_json:
        console.print_json(report.to_json())
    else:
        _print_report(report, out)
    if report.failed:
        raise typer.Exit(console.EXIT_FAILED)


class ClassifyDisplay(BarDisplay):
    """Shows a classification: a bar with the time left on a terminal, a line a slide elsewhere.

    A :class:`~wsi_engine.classification.slides.ClassifyProgress`. On a terminal it takes over from the display of the
    extraction, since only one bar can be live.
    """

    def __init__(self, target: Console, before: BarDisplay) -> None:
        super().__init__(target, None)
        self._before = before
        self._slides = self._finished = 0

    def run_started(self, slides: int) -> None:
        """So many slides are classified."""
        self._before.__exit__(None, None, None)
        self._slides = slides
        self._bar = make_bar(self._console, TextColumn("classifying"), TextColumn("slides"))
        if self._bar:
            self._bar.add_task("", total=slides)
            self._bar.start()

    def slide_finished(self, result: SlideClass) -> None:
        """A slide ended, well or not."""
        self._finished += 1
        if self._bar:
            self._bar.advance(self._bar.task_ids[0])
            if result.status == "done":
                return
        words = result.message if result.status == "failed" else _certainty(result)
        style = "bold red" if result.status == "failed" else "green"
        said = "failed" if result.status == "failed" else result.prediction
        head = f"[{self._finished}/{self._slides}] {result.slide_id}: "
        self._console.print(Text.assemble(head, (said, style), f", {words}"))


def _certainty(result: SlideClass) -> str:
    return f"probability {max(result.probabilities.values()):.3f}, {result.tiles} tiles"


def _print_report(report: ClassifyReport, out: Path) -> None:
    """A table of the predictions, one of what failed, and where the files are."""
    done = [result for result in report.results if result.status == "done"]
    if done:
        table = console.make_table("slide", "prediction", "probability", "entropy", "disagreement")
        for column in table.columns[2:]:
            column.justify = "right"
        for result in done:
            numbers = (max(result.probabilities.values()), result.entropy or 0.0, result.disagreement or 0.0)
            texts = [f"{number:.3f}" for number in numbers]
            table.add_row(Text(result.slide_id), Text(result.prediction), *texts)
        console.out.print(table)
    if report.failed:
        table = console.make_table("failed", "why")
        for result in report.failed:
            table.add_row(Text(result.slide_id), Text(result.message))
        console.out.print(table)
    for note in dict.fromkeys(result.message for result in done if result.message):
        count = sum(result.message == note for result in done)
        console.out.print(f"{count} of {len(done)}: {note}", markup=False)
    folds = "1 head" if report.folds == 1 else f"{report.folds} folds"
    rate = len(done) / max(report.wall_seconds, 1e-9)
    console.out.print(
        f"{len(done)} classified, {len(report.failed)} failed by {folds} of {report.run} ({report.precision}) "
        f"in {report.wall_seconds:.1f} s: {rate:.1f} slides/s; {out / 'predictions.csv'}",
        markup=False,
    )
