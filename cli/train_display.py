"""How training is shown: a bar over epochs on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text

from wsi_engine.cli.display import BarDisplay, make_bar

if TYPE_CHECKING:
    from wsi_engine.training.report import FoldSummary

_PLAIN_SECONDS = 10.0
"""Least time between two plain lines of one fold."""


class TrainDisplay(BarDisplay):
    """Shows a training on a console; a context manager and a :class:`~wsi_engine.training.report.TrainProgress`.

    It takes over from the display of what comes before training, where there is one: only one bar can be live.
    """

    def __init__(self, console: Console, before: BarDisplay | None = None) -> None:
        super().__init__(
            console, make_bar(console, TextColumn("{task.description}"), TextColumn("{task.fields[said]}"))
        )
        self._before = before
        self._folds = self._epochs = 0
        self._printed = 0.0
        self._all = self._bar.add_task("folds", total=None, said="") if self._bar else None
        self._one = self._bar.add_task("epochs", total=None, said="", visible=False) if self._bar else None

    def __enter__(self) -> Self:
        return self if self._before else super().__enter__()

    def run_started(self, folds: int, epochs: int) -> None:
        """So many folds there are, of so many epochs at most."""
        if self._before:
            self._before.__exit__(None, None, None)
            super().__enter__()
        self._folds, self._epochs = folds, epochs
        if self._bar and self._all is not None:
            self._bar.update(self._all, total=folds)

    def fold_started(self, fold: int, slides: int) -> None:
        """A fold begins or goes on; it trains on so many slides."""
        self._printed = time.monotonic()
        if self._bar and self._one is not None:
            self._bar.reset(self._one, total=self._epochs, said="", visible=True)
        else:
            self._line(fold, f"{slides} slides to train on")

    def epoch_finished(self, fold: int, epoch: int, train_loss: float, validation_loss: float | None) -> None:
        """An epoch (from 0) is done."""
        said = f"loss {train_loss:.3f}"
        if validation_loss is not None:
            said += f", validation {validation_loss:.3f}"
        if self._bar and self._one is not None:
            self._bar.update(self._one, completed=epoch + 1, said=said)
        elif time.monotonic() - self._printed >= _PLAIN_SECONDS:
            self._printed = time.monotonic()
            self._line(fold, f"epoch {epoch + 1}/{self._epochs}, {said}")

    def fold_finished(self, summary: FoldSummary, resumed: bool) -> None:
        """A fold is done; ``resumed`` where it was so before this call."""
        if self._bar and self._all is not None:
            self._bar.advance(self._all)
        said = "already complete" if resumed else f"done after {summary.epochs} epochs in {summary.seconds:.1f} s"
        if summary.auroc is not None:
            said += f", held-out AUROC {summary.auroc:.3f}"
        self._line(summary.fold, said)

    def _line(self, fold: int, text: str) -> None:
        self._console.print(Text(f"[fold {fold + 1}/{self._folds}] {text}"))
