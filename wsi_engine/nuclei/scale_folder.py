"""A training of scale attention on disk: what was asked, how far it is, and what came out.

Layout::

    OUT/
    ├── run.json                what was asked; ``complete`` is set last
    ├── log.jsonl               one line an epoch
    ├── attention.safetensors   the network after the last whole epoch, its card inside
    ├── sheet-0001.png …        attention on the same crops after each epoch
    └── state.pt                where training stands; gone once it is done
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wsi_engine.errors import ModelError, first_line
from wsi_engine.runs import write_text

FOLDER_VERSION = 1


@dataclass
class Standing:
    """How far a training has come.

    Attributes:
        step: batches done.
        sums: sums over the batches of the epoch in progress, by name.
        history: whole epochs, a mapping each.
    """

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ScaleFolder:
    """The files of a training, and the identity that they belong to."""

    path: Path
    identity: dict[str, Any]

    @property
    def model_file(self) -> Path:
        """The network."""
        return self.path / "attention.safetensors"

    @property
    def state_file(self) -> Path:
        """Where training stands."""
        return self.path / "state.pt"

    @property
    def log_file(self) -> Path:
        """JSON lines, one an epoch."""
        return self.path / "log.jsonl"

    @property
    def record_file(self) -> Path:
        """What was asked."""
        return self.path / "run.json"

    def sheet_file(self, epoch: int) -> Path:
        """The sheet after an epoch, counted from 1."""
        return self.path / f"sheet-{epoch:04d}.png"

    def open(self) -> bool:
        """Take the folder for this training; returns whether it is complete already.

        Raises:
            ModelError: the folder belongs to another training or holds other files, or cannot be written.
        """
        try:
            others = self.path.exists() and any(self.path.iterdir())
            if others and not self.record_file.exists():
                raise ModelError(f"{self.path} holds files that no training wrote: choose another folder with --out")
            if others:
                return self._check_record()
        except OSError as error:
            raise ModelError(f"cannot use {self.path}: {error.strerror or error}") from error
        self._write_record(complete=False)
        return False

    def finish(self) -> None:
        """Mark the training as complete and drop its state."""
        self._write_record(complete=True)
        with self.explain():
            self.state_file.unlink(missing_ok=True)

    @contextmanager
    def explain(self) -> Iterator[None]:
        """Says which folder could not be written where something in it is.

        Raises:
            ModelError: in place of an OSError.
        """
        try:
            yield
        except OSError as error:
            raise ModelError(
                f"cannot write to {self.path}: {_reason(error)}; make room or see to its rights, and train on"
            ) from error

    def write_log(self, history: list[dict[str, Any]]) -> None:
        """Replace the log."""
        write_text(self.log_file, "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in history))

    def read_log(self) -> list[dict[str, Any]]:
        """What the log says, a mapping an epoch.

        Raises:
            ModelError: it is missing or damaged.
        """
        try:
            return [json.loads(line) for line in self.log_file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.log_file} cannot be read ({error}): train again in another folder") from error

    def write_state(self, standing: Standing, tensors: dict[str, Any]) -> None:
        """Replace the state: plain values and state dicts.

        Raises:
            ModelError: it cannot be written.
        """
        value = {
            "version": FOLDER_VERSION,
            "identity": json.dumps(self.identity, sort_keys=True),
            "standing": json.dumps(vars(standing)),
            **tensors,
        }
        draft = self.path / f".{self.state_file.name}.{os.getpid()}"
        try:
            torch.save(value, draft)
            os.replace(draft, self.state_file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise ModelError(f"cannot write {self.state_file}: {_reason(error)}") from error
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)

    def read_state(self) -> tuple[Standing, dict[str, Any]] | None:
        """Standing and state dicts, on the CPU; None where training has not begun.

        Raises:
            ModelError: the file is damaged or of another training.
        """
        if not self.state_file.exists():
            return None
        try:
            value = torch.load(self.state_file, map_location="cpu", weights_only=True)
            same = value["version"] == FOLDER_VERSION
            same = same and value["identity"] == json.dumps(self.identity, sort_keys=True)
            standing = Standing(**json.loads(value["standing"]))
        except Exception as error:  # a damaged pickle raises almost anything
            raise ModelError(f"{self.state_file} cannot be read ({_reason(error)}): delete it to start anew") from error
        if not same:
            raise ModelError(f"{self.state_file} belongs to another training: delete it to start anew")
        return standing, value

    def _check_record(self) -> bool:
        try:
            record = json.loads(self.record_file.read_text(encoding="utf-8"))
            known, complete = record["training"], bool(record["complete"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{self.record_file} cannot be read ({error}): choose another folder") from error
        mine = json.loads(json.dumps(self.identity))
        if known != mine:
            raise ModelError(
                f"{self.path} belongs to another training ({_difference(known, mine)}): "
                "choose another folder with --out"
            )
        return complete

    def _write_record(self, complete: bool) -> None:
        record = {"version": FOLDER_VERSION, "complete": complete, "training": self.identity}
        write_text(self.record_file, json.dumps(record, indent=2) + "\n")


def _reason(error: Exception) -> str:
    """Why, in one line, without the path that an OSError names."""
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


def _difference(known: Any, mine: dict[str, Any]) -> str:
    """What first differs between two recipes, in words."""
    if not isinstance(known, dict):
        return "its record is of another kind"
    for name in sorted({*known, *mine}):
        there, here = known.get(name), mine.get(name)
        if there != here:
            if isinstance(there, dict) and isinstance(here, dict):
                return _difference(there, here)
            long = max(len(str(there)), len(str(here))) > 60
            return f"other {name}" if long else f"{name} was {there!r} and is {here!r}"
    return "its record differs"
