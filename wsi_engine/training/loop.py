"""The epochs of one fold, whatever is trained: when they end, which was best, and how a kill is survived."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wsi_engine.errors import ModelError
from wsi_engine.training.hardware import Hardware
from wsi_engine.training.optimisation import Standing, build_optimiser, learning_rate
from wsi_engine.training.plan import EpochRecord
from wsi_engine.training.settings import TrainSettings
from wsi_engine.training.state import FoldState, read_state, write_state

if TYPE_CHECKING:
    from wsi_engine.training.prompt_memory import MemoryWatch


class FoldLoop(ABC):
    """What is trained, its optimiser, and how far they have come.

    Attributes:
        trained: everything that learns.
        settings: how it is trained.
        number: of the fold.
        watch: measures the memory of every epoch; None: nobody does.
    """

    def __init__(
        self,
        trained: nn.Module,
        settings: TrainSettings,
        number: int,
        hardware: Hardware,
        least_rate: float = 0.0,
        watch: MemoryWatch | None = None,
    ) -> None:
        self.trained, self.settings, self.number, self.hardware = trained, settings, number, hardware
        self.optimiser = build_optimiser(trained, settings)
        self.standing = Standing()
        self.history: tuple[EpochRecord, ...] = ()
        self.best: dict[str, Tensor] = {}
        self.watch = watch
        self._least_rate = least_rate

    @abstractmethod
    def train_epoch(self, epoch: int) -> float:
        """Take the steps of an epoch; the mean of their losses."""

    @abstractmethod
    def validate(self) -> float | None:
        """Mean bag loss of the validation slides; None where there are none."""

    @abstractmethod
    def describe(self) -> Mapping[str, Any]:
        """What decides the result beside where the learning rate ends: plain values."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to get ready
        """Get ready before the first epoch; not where a state file is gone on from."""

    def run(self, state_file: Path | None, told: Callable[[EpochRecord], None] | None, save_seconds: float) -> None:
        """All epochs that are still to do; then what is trained holds the weights of the best one.

        Args:
            state_file: where to go on from, and to keep what is needed to go on.
            told: called after every epoch.
            save_seconds: after this time the next end of an epoch is written to the state file.
        """
        if not (state_file and self._restore(state_file)):
            self.prepare()
        saved = time.monotonic()
        while not self.standing.stopped:
            record = self.epoch()
            if told:
                told(record)
            if state_file and (self.standing.stopped or time.monotonic() - saved >= save_seconds):
                write_state(state_file, self._state(), self._identity)
                saved = time.monotonic()
        self.trained.load_state_dict(self.best)

    def epoch(self) -> EpochRecord:
        """One pass, the bag loss afterwards, and what follows from it."""
        start = time.perf_counter()
        epoch = self.standing.epochs
        rate = learning_rate(self.settings, epoch, self._least_rate)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if self.watch:
            self.watch.reset()
        train_loss = self.train_epoch(epoch)
        self._check_weights(epoch)
        loss = self.validate()
        if loss is not None:
            self.check_loss(loss, epoch, "the validation slides")
        self.standing = self.standing.after(loss, self.settings)
        if self.standing.best_epoch == epoch:
            self.best = _copy(self.trained.state_dict())
        memory = self.watch.read() if self.watch else None
        record = EpochRecord(epoch, rate, train_loss, loss, time.perf_counter() - start, memory)
        self.history = (*self.history, record)
        return record

    def check_loss(self, loss: float, epoch: int, where: str) -> None:
        """Refuse a loss that is not finite.

        Raises:
            ModelError: it is not; the message names the slide.
        """
        if not math.isfinite(loss):
            raise ModelError(
                f"the loss became {loss} in epoch {epoch} of fold {self.number} at {where}: look at those features, or "
                "train with a lower learning rate"
            )

    def _check_weights(self, epoch: int) -> None:
        if not all(bool(weight.isfinite().all()) for weight in self.trained.parameters()):
            raise ModelError(
                f"the weights are no longer finite after epoch {epoch} of fold {self.number}: train with a lower "
                "learning rate"
            )

    def _state(self) -> FoldState:
        return FoldState(
            self.standing, self.history, self.trained.state_dict(), self.optimiser.state_dict(), self.best
        )  # fmt: skip

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {**self.describe(), "least_rate": self._least_rate}

    def _restore(self, state_file: Path) -> bool:
        """Go on from a state file; False where there is none."""
        state = read_state(state_file, self._identity)
        if state is None:
            return False
        self.trained.load_state_dict(state.head)
        self.optimiser.load_state_dict(state.optimiser)
        self.standing, self.history = state.standing, state.history
        self.best = {name: tensor.to(self.hardware.device) for name, tensor in state.best.items()}
        return True


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.clone(tensor.detach()) for name, tensor in tensors.items()}
