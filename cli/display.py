"""What the displays of long runs share: a bar that starts and stops with them, on a terminal alone."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

PLAIN_SECONDS = 10.0
"""Least time between two plain lines."""


class BarDisplay:
    """A context manager around a bar; ``bar`` is None where the console is no terminal, or until it is made."""

    def __init__(self, console: Console, bar: Progress | None) -> None:
        self._console = console
        self._bar = bar

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


def make_bar(console: Console, before: ProgressColumn, *after: ProgressColumn) -> Progress | None:
    """A bar with what is done of all and the time left, between columns of the caller's; None off a terminal."""
    if not console.is_terminal:
        return None
    columns = (before, BarColumn(), MofNCompleteColumn(), *after, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


class Rate(ProgressColumn):
    """Tiles per second of what the bar shows."""

    def render(self, task: Task) -> Text:
        """Nothing before there is a rate."""
        return Text(say_rate(task.speed) if task.speed else "", style="cyan")


def say_rate(rate: float) -> str:
    """Tiles per second in words."""
    return f"{rate:.0f} tiles/s" if rate >= 10 else f"{rate:.1f} tiles/s"
