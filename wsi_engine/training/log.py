"""The log of a run: a line of JSON for every epoch of every fold, also after a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from wsi_engine.errors import ModelError
from wsi_engine.runs import write_text


class TrainLog:
    """Lines of ``log.jsonl``. What a kill tore off is dropped, and an epoch done again replaces what was said of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: list[dict[str, Any]] = _read(path)
        """What the log says, a mapping an epoch."""
        if path.exists():
            self._rewrite()

    def add(self, entry: dict[str, Any]) -> None:
        """Append an epoch; what was logged of it or of later ones of its fold before a kill is removed.

        Raises:
            ModelError: the log cannot be written.
        """
        fold, epoch = entry["fold"], entry["epoch"]
        kept = [one for one in self.entries if one["fold"] != fold or one["epoch"] < epoch]
        again = len(kept) < len(self.entries)
        self.entries = [*kept, entry]
        if again:
            self._rewrite()
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write(_line(entry))
        except OSError as error:
            raise ModelError(f"cannot write {self._path}: {os.strerror(error.errno or 0)}") from error

    def seconds(self, fold: int) -> float:
        """Seconds that the epochs of a fold took, those before a kill included."""
        return float(sum(entry.get("seconds", 0.0) for entry in self.entries if entry["fold"] == fold))

    def _rewrite(self) -> None:
        write_text(self._path, "".join(map(_line, self.entries)))


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a torn one is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
            if isinstance(entry, dict) and {"fold", "epoch"} <= entry.keys():
                entries.append(entry)
        except ValueError:
            continue
    return entries
