"""Where the training of a fold stands, on disk: read without running anything in it, replaced in one step."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsi_engine.errors import ModelError, first_line
from wsi_engine.training.optimisation import Standing
from wsi_engine.training.plan import EpochRecord

STATE_VERSION = 2


@dataclass(frozen=True, eq=False)
class FoldState:
    """A fold between two epochs. Random numbers need no place: each epoch opens its own streams.

    Attributes:
        standing: how far it has come.
        history: its epochs so far.
        head: tensors of what is trained by name.
        optimiser: the optimiser's state dict.
        best: the same tensors after the best epoch so far.
    """

    standing: Standing
    history: tuple[EpochRecord, ...]
    head: dict[str, Tensor]
    optimiser: dict[str, Any]
    best: dict[str, Tensor]


def write_state(path: Path, state: FoldState, identity: dict[str, Any]) -> None:
    """Replace a state file; ``identity`` says what is trained, so that nothing else goes on from it.

    Raises:
        ModelError: it cannot be written.
    """
    value = {
        "version": STATE_VERSION,
        "identity": json.dumps(identity, sort_keys=True),
        "standing": asdict(state.standing),
        "history": [asdict(record) for record in state.history],
        "head": state.head,
        "optimiser": state.optimiser,
        "best": state.best,
    }
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise ModelError(f"cannot write {path}: {error}") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def read_state(path: Path, identity: dict[str, Any]) -> FoldState | None:
    """The state in a file, tensors on the CPU; None where there is no file.

    Raises:
        ModelError: it is damaged, of another version, or of another training.
    """
    if not path.exists():
        return None
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        if value["version"] == STATE_VERSION and value["identity"] != json.dumps(identity, sort_keys=True):
            raise ModelError(f"{path} belongs to a training with other settings or slides: delete it to start anew")
        if value["version"] != STATE_VERSION:
            raise ModelError(f"{path} was written by another version of the engine: delete it to start the fold anew")
        return FoldState(
            Standing(**value["standing"]),
            tuple(EpochRecord(**record) for record in value["history"]),
            value["head"],
            value["optimiser"],
            value["best"],
        )
    except ModelError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        reason = first_line(error)
        raise ModelError(f"{path} cannot be read ({reason}): delete it to start the fold anew") from error
