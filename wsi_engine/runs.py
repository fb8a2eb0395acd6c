"""A training run on disk: what was asked, what came out, and the heads of its folds.

Layout::

    RUN/
    ├── run.json             the RunRecord; ``complete`` is set last
    ├── splits.csv           slide_id, patient, label and for each fold train, val, test or nothing
    ├── log.jsonl            one line an epoch of a fold
    ├── validation.csv       predictions of each fold on its validation slides
    ├── predictions.csv      predictions of each fold on its test slides
    └── fold-0/ …
        ├── head.safetensors     the head of the best epoch, its card inside
        ├── prompts.safetensors  of a run of wsi train prompt: the prompts that the head's features are made with,
        │                        or encoder.safetensors, the fine-tuned encoder
        └── state.pt             where training stands; gone once the fold is done
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

from wsi_engine.arrays import storing
from wsi_engine.errors import ModelError
from wsi_engine.extents import read_json
from wsi_engine.store import FeatureStore

RUN_VERSION = 1

_MOST_FOLDS = 10_000

HEAD_NAME = "head.safetensors"
PROMPTS_NAME = "prompts.safetensors"
ENCODER_NAME = "encoder.safetensors"

DIGESTS = "digests"
"""Entry of a finished run's summary: the SHA-256 of its files, by their paths from its folder."""


@dataclass(frozen=True)
class FeatureOrigin:
    """Which features a model takes: nothing else may be given to it.

    Attributes:
        encoder: name of the encoder, as on its card.
        dim: numbers per tile.
        weights_digest: SHA-256 of the encoder's weights.
        precision: arithmetic they were computed in; recorded, differences are allowed.
        mpp: micrometres per tile pixel.
        tile_px: side of a tile.
        stride_px: step from tile to tile; recorded, differences are allowed.
    """

    encoder: str
    dim: int
    weights_digest: str
    precision: str
    mpp: float
    tile_px: int
    stride_px: int

    def __post_init__(self) -> None:
        kinds = {
            str: ("encoder", "weights_digest", "precision"),
            Integral: ("dim", "tile_px", "stride_px"),
            Real: ("mpp",),
        }
        for kind, names in kinds.items():
            for name in names:
                if not isinstance(getattr(self, name), kind):
                    raise TypeError(f"{name} of the features is a {type(getattr(self, name)).__name__}")

    @classmethod
    def of(cls, store: FeatureStore, encoder: str | None = None) -> Self:
        """Where a store's features come from.

        Raises:
            StoreError: they are not there, not complete, or several and none was named.
        """
        made = store.provenance(encoder)
        with storing(store.path):
            card = made["encoder"]
            scale = store.tile_scale(made["grid"])
            return cls(card["name"], int(card["dim"]), card["weights_digest"], made["precision"], *scale)

    def check(self, other: FeatureOrigin, where: str) -> None:
        """Refuse features that are not of this kind; ``where`` names the store.

        Raises:
            ModelError: another encoder, other weights, or another scale or tile size.
        """
        if (other.encoder, other.dim) != (self.encoder, self.dim):
            raise ModelError(
                f"{where} holds features of {other.encoder} ({other.dim} numbers per tile) and the model takes "
                f"those of {self.encoder} ({self.dim}): extract with that encoder"
            )
        if other.weights_digest != self.weights_digest:
            raise ModelError(
                f"the features in {where} were made with other weights of {self.encoder} (digest "
                f"{other.weights_digest[:12]}…) than those the model was trained on ({self.weights_digest[:12]}…): "
                "extract with the same weights"
            )
        if (other.mpp, other.tile_px) != (self.mpp, self.tile_px):
            raise ModelError(
                f"the tiles of {where} are {other.tile_px} px at {other.mpp:g} mpp and the model takes "
                f"{self.tile_px} px at {self.mpp:g} mpp: extract at that scale"
            )


@dataclass(frozen=True)
class RunRecord:
    """What ``run.json`` says.

    Attributes:
        label: the cohort's column that was learned.
        classes: its values in the order of the logits.
        head: name of the head.
        options: what the head was built with beside sizes.
        folds: how many folds, each with a head.
        features: what the heads take.
        settings: training settings as plain values.
        engine_version: version that trained it.
        complete: all folds are done.
        summary: filled in at the end: seconds, epochs, held-out figures, anything plain.
    """

    label: str
    classes: tuple[str, ...]
    head: str
    options: dict[str, Any]
    folds: int
    features: FeatureOrigin
    settings: dict[str, Any]
    engine_version: str
    complete: bool = False
    summary: dict[str, Any] = field(default_factory=dict)
    version: int = RUN_VERSION


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    path: Path

    @property
    def record_file(self) -> Path:
        """What was asked and came out."""
        return self.path / "run.json"

    @property
    def log_file(self) -> Path:
        """JSON lines, one an epoch."""
        return self.path / "log.jsonl"

    @property
    def splits_file(self) -> Path:
        """Who was in which part of which fold."""
        return self.path / "splits.csv"

    @property
    def predictions_file(self) -> Path:
        """Held-out predictions of all folds."""
        return self.path / "predictions.csv"

    @property
    def validation_file(self) -> Path:
        """Predictions on the validation slides of all folds."""
        return self.path / "validation.csv"

    def fold(self, number: int) -> Path:
        """The folder of one fold."""
        return self.path / f"fold-{number}"

    def head_file(self, number: int) -> Path:
        """The head of one fold."""
        return self.fold(number) / HEAD_NAME

    def state_file(self, number: int) -> Path:
        """Where the training of one fold stands."""
        return self.fold(number) / "state.pt"

    def digests(self) -> dict[str, str]:
        """SHA-256 of what a finished run keeps, by paths from its folder: models, predictions and splits.

        Raises:
            ModelError: a file cannot be read.
        """
        tables = (self.splits_file, self.validation_file, self.predictions_file)
        files = [*sorted(self.path.glob("fold-*/*.safetensors")), *(path for path in tables if path.exists())]
        try:
            return {path.relative_to(self.path).as_posix(): file_digest(path) for path in files}
        except OSError as error:
            raise ModelError(f"cannot read {error.filename}: {error.strerror or error}") from error

    def model_digest(self, folds: int) -> str:
        """What predictions of the run's heads name as their model; see :func:`digest_heads`."""
        return digest_heads([self.head_file(number) for number in range(folds)])

    def write_record(self, record: RunRecord) -> None:
        """Replace ``run.json`` in one step.

        Raises:
            ModelError: it cannot be written.
        """
        try:
            text = json.dumps(asdict(record), indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ModelError(f"cannot write {self.record_file}: it holds what JSON cannot ({error})") from error
        write_text(self.record_file, text + "\n")

    def read_record(self) -> RunRecord:
        """Read ``run.json``.

        Raises:
            ModelError: there is none, it is damaged, or another version wrote it.
        """
        try:
            value = read_json(self.record_file)
            if value["version"] != RUN_VERSION:
                raise ModelError(
                    f"{self.record_file} has version {value['version']} and this engine reads {RUN_VERSION}: "
                    "use the engine that wrote it"
                )
            record = RunRecord(**value)
            origin = FeatureOrigin(**value["features"])
            if not isinstance(record.folds, int) or not 0 <= record.folds <= _MOST_FOLDS:
                raise ValueError(f"{str(record.folds)[:40]} folds")
            if not isinstance(record.classes, list) or not all(isinstance(name, str) for name in record.classes):
                raise ValueError("its classes are no names")
            for name in ("options", "settings", "summary"):
                if not isinstance(getattr(record, name), dict):
                    raise ValueError(f"its {name} are no mapping")
            return replace(record, classes=tuple(record.classes), features=origin)
        except FileNotFoundError:
            raise ModelError(
                f"{self.path} is not a training run: it has no run.json; give a folder of wsi train"
            ) from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{self.record_file} cannot be read ({reason}): train again") from error


def digest_heads(files: Sequence[Path]) -> str:
    """SHA-256, as digits, over those of some head files in their order: it changes with any of them.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(bytes.fromhex(file_digest(file)))
        except OSError as error:
            raise ModelError(f"cannot read {file}: {error.strerror or error}") from error
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, with its folder made where there is none.

    Raises:
        ModelError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
