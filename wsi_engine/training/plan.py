"""Which head is trained, as plain values, and what its training says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from wsi_engine.errors import ModelError
from wsi_engine.models import Head, HeadError, create_head


@dataclass(frozen=True)
class HeadPlan:
    """A head to be built: its name as ``create_head`` knows it, its sizes, and its options."""

    name: str
    in_dim: int
    n_classes: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, seed: int) -> Head:
        """The head with fresh weights, on the CPU; the same seed gives the same, and torch's own state is kept.

        Raises:
            ModelError: there is no such head or option, or a value is out of range.
        """
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            try:
                return create_head(self.name, self.in_dim, self.n_classes, **self.options)
            except HeadError as error:
                raise ModelError(str(error)) from error

    def all_options(self) -> dict[str, Any]:
        """Every option of the head, defaults included, as JSON gives them back."""
        with torch.device("meta"):
            plain: dict[str, Any] = json.loads(json.dumps(self.build(0).options))
        return plain


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of a fold.

    Attributes:
        epoch: its number, from 0.
        learning_rate: it was trained at.
        train_loss: mean loss of its steps.
        validation_loss: mean bag loss of the validation slides afterwards; None where there are none.
        seconds: it took, validation included.
        memory_mb: MiB that were held at its peak beyond what was held before the fold; None where nobody measured.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    validation_loss: float | None
    seconds: float
    memory_mb: float | None = None
