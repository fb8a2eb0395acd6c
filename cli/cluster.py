"""What the commands share that can be spread over a cluster: the option, and one bar for slides done side by side."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text

from wsi_engine.cli.display import PLAIN_SECONDS, BarDisplay, Rate, make_bar, say_rate

if TYPE_CHECKING:
    from collections.abc import Callable

ClusterOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS|local:N|slurm:N",
        help="Spread slides over a Dask cluster: a scheduler's address or file, N processes here, or N Slurm jobs.",
        show_default=False,
    ),
]
"""The option ``--cluster`` of a command."""


class ClusterDisplay(BarDisplay):
    """Shows a run whose slides are done side by side; a context manager and a progress of extraction or nuclei.

    The bar counts tiles of all slides. Those of slides that have not begun are guessed from the others.
    """

    def __init__(self, console: Console, describe: Callable[[Any], Text]) -> None:
        """Show on a console; ``describe`` makes the words of a slide's end from its result."""
        super().__init__(console, make_bar(console, TextColumn("{task.fields[slides]}"), Rate()))
        self._task = self._bar.add_task("", total=None, slides="waiting for workers") if self._bar else None
        self._describe = describe
        self._slides = self._finished = self._skipped = 0
        self._begun: dict[str, int] = {}
        self._at_work: set[str] = set()
        self._done = 0
        self._since: tuple[float, int] | None = None
        self._printed = time.monotonic()

    def run_started(self, slides: int) -> None:
        """So many slides there are."""
        self._slides = slides

    def slide_started(self, slide_id: str, tiles: int, done: int) -> None:
        """A slide begins, beside others."""
        self._begun[slide_id] = tiles
        self._at_work.add(slide_id)
        self._done += done
        self._update()

    def tiles_done(self, tiles: int) -> None:
        """So many more tiles are done, of any slide."""
        self._done += tiles
        self._since = self._since or (time.monotonic(), self._done)
        self._update()
        if not self._bar and time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            rate = (self._done - self._since[1]) / max(self._printed - self._since[0], 1e-9)
            pace = f", {say_rate(rate)}, {(self._total - self._done) / rate:.0f} s left" if rate else ""
            self._console.print(Text(f"{self._count()}: {self._done}/{self._total} tiles{pace}"))

    def slide_finished(self, result: Any) -> None:
        """A slide ended, well or not."""
        self._finished += 1
        self._at_work.discard(result.slide_id)
        self._skipped += result.slide_id not in self._begun  # complete already, or refused: nothing to guess from
        line = Text.assemble(f"[{self._finished}/{self._slides}] {result.slide_id}: ", self._describe(result))
        self._console.print(line)
        self._update()

    @property
    def _total(self) -> int:
        """Tiles of all slides, as far as is known; at least those that are done."""
        known, begun = sum(self._begun.values()), len(self._begun)
        ahead = self._slides - begun - self._skipped
        return max(self._done, known + round(known * ahead / max(1, begun)))

    def _count(self) -> str:
        return f"[{self._finished}/{self._slides}] {len(self._at_work)} at work"

    def _update(self) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, total=self._total, completed=self._done, slides=self._count())
