"""What is printed of a training: its folds, where it is, and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from wsi_engine.cli import console

if TYPE_CHECKING:
    from wsi_engine.training.report import TrainReport


def print_report(report: TrainReport, said: str = "") -> None:
    """A table of the folds, what else is ``said`` of the run, and what to do next."""
    names = ("fold", "epochs", "validation loss", "held-out AUROC", "held-out slides", "seconds")
    table = Table(*names, box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.justify = "right"
    for fold in report.folds:
        table.add_row(
            str(fold.fold), str(fold.epochs), _number(fold.validation_loss), _number(fold.auroc), str(fold.test),
            f"{fold.seconds:.1f}",
        )  # fmt: skip
    console.out.print(table)
    if said:
        console.out.print(Text(said))
    classes = ", ".join(report.record.classes)
    console.out.print(Text(f"{report.record.head} for {report.record.label} ({classes}) in {report.path}"))
    console.out.print(Text(f"next: wsi evaluate {report.path}; wsi classify SLIDE... --model {report.path} -o OUT"))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
