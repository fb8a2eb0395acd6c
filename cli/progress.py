"""How a run is shown: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text

from wsi_engine.cli.cluster import ClusterDisplay
from wsi_engine.cli.display import PLAIN_SECONDS, BarDisplay, Rate, make_bar, say_rate

if TYPE_CHECKING:
    from wsi_engine.jobs import SlideResult

_STYLES = {"done": "green", "already complete": "dim", "no tissue": "yellow", "busy": "yellow", "failed": "bold red"}


def show_run(console: Console, cluster: str | None) -> RunDisplay | ClusterDisplay:
    """The display of an extraction: of one slide after another, or of slides side by side on a cluster."""
    return RunDisplay(console) if cluster is None else ClusterDisplay(console, _describe)


class RunDisplay(BarDisplay):
    """Shows slide after slide on a console; a context manager and a progress of extraction or nuclei."""

    def __init__(self, console: Console, describe: Callable[[Any], Text] | None = None) -> None:
        """Show on a console; ``describe`` makes the words of a slide's end from its result."""
        self._describe = describe or _describe
        super().__init__(console, make_bar(console, TextColumn("{task.fields[slide]}"), Rate()))
        self._slides = 0
        self._finished = 0
        self._task = self._bar.add_task("", total=None, slide="opening") if self._bar else None
        self._slide, self._tiles, self._done, self._begun = "", 0, 0, 0
        self._started = self._printed = 0.0

    def run_started(self, slides: int) -> None:
        """So many slides there are."""
        self._slides = slides

    def slide_started(self, slide_id: str, tiles: int, done: int) -> None:
        """Encoding of a slide begins."""
        self._slide, self._tiles, self._done, self._begun = slide_id, tiles, done, done
        self._started = self._printed = time.monotonic()
        if self._bar and self._task is not None:
            self._bar.reset(self._task, total=tiles, completed=done, slide=f"{self._count()} {slide_id}")
        else:
            resumed = f", {done} already stored" if done else ""
            self._line(f"{slide_id}: {tiles} tiles{resumed}")

    def tiles_done(self, tiles: int) -> None:
        """So many more tiles are encoded."""
        self._done += tiles
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=tiles)
        elif time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            rate = (self._done - self._begun) / max(self._printed - self._started, 1e-9)
            left = (self._tiles - self._done) / max(rate, 1e-9)
            self._line(f"{self._slide}: {self._done}/{self._tiles} tiles, {say_rate(rate)}, {left:.0f} s left")

    def slide_finished(self, result: Any) -> None:
        """A slide ended, well or not."""
        self._console.print(Text.assemble(f"{self._count()} {result.slide_id}: ", self._describe(result)))
        self._finished += 1

    def _count(self) -> str:
        return f"[{self._finished + 1}/{self._slides}]"

    def _line(self, text: str) -> None:
        self._console.print(Text(f"{self._count()} {text}"))


def _describe(result: SlideResult) -> Text:
    """How a slide ended, in words."""
    return Text.assemble((result.status, _STYLES[result.status]), _details(result))


def _details(result: SlideResult) -> str:
    if result.message:
        return f": {result.message}"
    if result.status != "done":
        return ""
    rate = result.tiles / max(result.wall_seconds, 1e-9)
    return f", {result.tiles} tiles in {result.wall_seconds:.1f} s ({rate:.0f} tiles/s) by reader {result.reader}"
