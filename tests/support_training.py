"""Small bags and runs of training, and what is kept of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from wsi_engine.bags import ArrayBags
from wsi_engine.cohorts.splits import Fold, SplitSettings
from wsi_engine.training import FittedFold, HeadPlan, TrainReport, TrainSettings, train_head

DIM = 12
SMALL: dict[str, dict[str, Any]] = {
    "clam_sb": {"size": (24, 12)},
    "clam_mb": {"size": (24, 12), "subtyping": True},
    "abmil": {"hidden": (24,), "attention": 12},
    "dsmil": {"query": 12},
    "transmil": {"dim": 24, "heads": 2},
    "mean": {},
}
QUICK = TrainSettings(epochs=8, learning_rate=5e-3, precision="fp32", device="cpu")
RUN = replace(QUICK, epochs=4, learning_rate=1e-2)
CLAM = HeadPlan("clam_sb", DIM, 2, SMALL["clam_sb"])


def make_bags(slides: int = 60, seed: int = 0, signal: float = 2.5) -> tuple[ArrayBags, np.ndarray]:
    """Bags in whose class 1 a few tiles stand out; every second is of it."""
    generator = np.random.default_rng(seed)
    labels = np.arange(slides) % 2
    bags = []
    for label in labels:
        bag = generator.normal(size=(int(generator.integers(9, 40)), DIM)).astype(np.float16)
        bag[:4, :3] += signal * label
        bags.append(bag)
    return ArrayBags(bags), labels


FOLD = Fold(tuple(range(36)), tuple(range(36, 46)), tuple(range(46, 60)))


def weights(fitted: FittedFold) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in fitted.head.state_dict().items()}


def train(cohort: Path, out: Path, **changes: Any) -> TrainReport:
    arguments: dict[str, Any] = {
        "head": "clam_sb",
        "options": SMALL["clam_sb"],
        "splits": SplitSettings(folds=2, validation=0.25),
        "settings": RUN,
    }
    return train_head(cohort / "cohort.csv", cohort / "features", "subtype", out, **(arguments | changes))


def kept_bytes(run: Path) -> dict[str, bytes]:
    """Every file of a finished run that has no times in it."""
    paths = [*run.glob("fold-*/*"), *(run / name for name in ("predictions.csv", "validation.csv", "splits.csv"))]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


class StopsAt:
    """A progress that raises after some epochs, and counts what it is told."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs
        self.told: list[tuple[Any, ...]] = []

    def run_started(self, folds: int, epochs: int) -> None:
        self.told.append(("run", folds, epochs))

    def fold_started(self, fold: int, slides: int) -> None:
        self.told.append(("fold", fold))

    def epoch_finished(self, fold: int, epoch: int, train_loss: float, validation_loss: float | None) -> None:
        self.told.append((fold, epoch))
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def fold_finished(self, summary: Any, resumed: bool) -> None:
        self.told.append(("resumed" if resumed else "done", summary.fold))

    @property
    def epochs(self) -> int:
        """How many it was told of."""
        return sum(isinstance(entry[0], int) for entry in self.told)
