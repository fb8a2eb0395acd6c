"""What training says of itself, while it runs and at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from wsi_engine.runs import RunRecord


@dataclass(frozen=True)
class FoldSummary:
    """One fold in numbers.

    Attributes:
        fold: its number, from 0.
        epochs: it was trained for.
        best_epoch: the one, from 0, whose head was kept.
        validation_loss: bag loss of that head on the validation slides; None where there are none.
        auroc: on the held-out slides (macro one-vs-rest for several classes); None where they are of one class.
        temperature: fitted on the validation slides, 1 without them.
        threshold: of the calibrated probability of class 1 of two, by Youden on the validation slides, else None.
        train: slides trained on.
        validation: slides validated on.
        test: slides held out.
        seconds: its epochs took.
    """

    fold: int
    epochs: int
    best_epoch: int
    validation_loss: float | None
    auroc: float | None
    temperature: float
    threshold: float | None
    train: int
    validation: int
    test: int
    seconds: float


@dataclass(frozen=True)
class TrainReport:
    """A finished run.

    Attributes:
        path: its folder.
        record: what ``run.json`` says.
        folds: every fold.
        warnings: what the user should know, a sentence each.
    """

    path: Path
    record: RunRecord
    folds: tuple[FoldSummary, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for one JSON document."""
        return {
            "run": str(self.path),
            "label": self.record.label,
            "classes": list(self.record.classes),
            "head": self.record.head,
            "folds": [asdict(fold) for fold in self.folds],
            "warnings": list(self.warnings),
        }


class TrainProgress(Protocol):
    """Told how training goes, from the thread that trains."""

    def run_started(self, folds: int, epochs: int) -> None:
        """So many folds there are, of so many epochs at most."""

    def fold_started(self, fold: int, slides: int) -> None:
        """A fold begins or goes on; it trains on so many slides."""

    def epoch_finished(self, fold: int, epoch: int, train_loss: float, validation_loss: float | None) -> None:
        """An epoch (from 0) is done."""

    def fold_finished(self, summary: FoldSummary, resumed: bool) -> None:
        """A fold is done; ``resumed`` where it was so before this call."""
