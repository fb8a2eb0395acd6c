"""How a classification ended, slide by slide: as a report, and as a table on disk."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from wsi_engine.errors import BusyError, InputError, StoreError
from wsi_engine.lease import hold_lease
from wsi_engine.places import write_file

_FLUSH_SECONDS = 10.0

WAIT_SECONDS = 300.0
"""For which another process may write the same table; it takes milliseconds, unless that process stands still."""

_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class SlideClass:
    """How one slide ended.

    Attributes:
        slide_id: its name.
        status: ``done`` or ``failed``; then everything below ``message`` is empty.
        message: why it failed, or what was left out.
        prediction: the most probable class.
        probabilities: of each class, calibrated, mean over folds.
        entropy: 0 certain to 1 no idea; see :class:`~wsi_engine.classification.prediction.Prediction`.
        disagreement: the part of it in which folds contradict each other.
        tiles: how many tiles it has.
        store: where its features are, and its attention:
            ``FeatureStore.open(store).attention(run)``.
        files: what was written, by kind: ``heatmap``, ``geojson``, ``tiles``.
    """

    slide_id: str
    status: Literal["done", "failed"]
    message: str = ""
    prediction: str = ""
    probabilities: dict[str, float] = field(default_factory=dict)
    entropy: float | None = None
    disagreement: float | None = None
    tiles: int = 0
    store: str = ""
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassifyReport:
    """How a run ended, slide by slide in the order given; ``wall_seconds`` without extraction."""

    run: str
    model_digest: str
    classes: tuple[str, ...]
    folds: int
    precision: str
    results: tuple[SlideClass, ...]
    wall_seconds: float

    @property
    def failed(self) -> tuple[SlideClass, ...]:
        """The slides that have no prediction."""
        return tuple(result for result in self.results if result.status == "failed")

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        named = {key: value for key, value in asdict(self).items() if key != "results"}
        return named | {"classes": list(self.classes), "slides": [asdict(result) for result in self.results]}


class PredictionsFile:
    """``predictions.csv``: slide_id, prediction, prob_<class> …, entropy, disagreement, tiles, model.

    Probabilities are written to the last digit. Replaced in one step, now and then and at the end, so that a kill
    loses little and a reader never sees half of it. Several processes may add to one table: each puts its own rows
    into what the others have written by then.
    """

    def __init__(self, path: Path, classes: Sequence[str], model_digest: str) -> None:
        """Look at the rows that are there, which stay.

        Raises:
            InputError: they are of another model, or the file cannot be read.
        """
        self._path = path
        self._digest = model_digest
        shares = [f"prob_{name}" for name in classes]
        self._columns = ["slide_id", "prediction", *shares, "entropy", "disagreement", "tiles", "model"]
        self._own: dict[str, dict[str, str]] = {}
        self._read()
        self._written = time.monotonic()

    def add(self, result: SlideClass) -> None:
        """Take in a slide that is done, in place of an earlier row of it."""
        if result.status != "done":
            return
        numbers = {f"prob_{name}": repr(value) for name, value in result.probabilities.items()}
        self._own[result.slide_id] = numbers | {
            "slide_id": result.slide_id,
            "prediction": result.prediction,
            "entropy": repr(result.entropy),
            "disagreement": repr(result.disagreement),
            "tiles": str(result.tiles),
            "model": self._digest,
        }
        if time.monotonic() - self._written >= _FLUSH_SECONDS:
            self.write()

    def write(self) -> None:
        """Put this process's rows into the file, slides in the order in which they first came.

        Raises:
            InputError: it cannot be written, or holds predictions of another model by now.
        """
        try:
            with ExitStack() as stack:
                self._hold(stack)
                text = io.StringIO(newline="")
                writer = csv.DictWriter(text, self._columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows((self._read() | self._own).values())
                write_file(self._path, text.getvalue().encode())
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from error
        except StoreError as error:
            raise InputError(f"cannot write {self._path}: {error}") from error
        self._written = time.monotonic()

    def _hold(self, stack: ExitStack) -> None:
        """Keep other processes from writing for as long as the stack lives; waits for the one that does."""
        last = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                stack.enter_context(hold_lease(self._path.with_name(f".{self._path.stem}.lease"), "predictions"))
                return
            except BusyError:
                if time.monotonic() > last:
                    raise
                time.sleep(_LOOK_SECONDS)

    def _read(self) -> dict[str, dict[str, str]]:
        """The rows that are there, by slide."""
        try:
            with open(self._path, newline="", encoding="utf-8") as stream:
                reader = csv.DictReader(stream)
                rows = list(reader)
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"cannot read {self._path} ({error}): delete it, or choose another folder") from error
        if reader.fieldnames != self._columns or any(row["model"] != self._digest for row in rows):
            raise InputError(
                f"{self._path} holds predictions of another model: choose another output folder, or delete that file"
            )
        return {row["slide_id"]: row for row in rows}
