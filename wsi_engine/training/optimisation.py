"""Steps of the optimiser: the learning rate of an epoch, and when to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from wsi_engine.training.settings import TrainSettings


def build_optimiser(network: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba, ICLR 2015) or AdamW (Loshchilov & Hutter, ICLR 2019) over the weights that learn."""
    build = torch.optim.Adam if settings.optimiser == "adam" else torch.optim.AdamW
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    fused = weights[0].device.type in ("cpu", "cuda")  # one pass over the memory instead of ten
    return build(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused)


def learning_rate(settings: TrainSettings, epoch: int, least: float = 0.0) -> float:
    """The learning rate of an epoch, counted from 0.

    ``cosine``: from the first rate down to ``least``, which it would reach after the last epoch: half of what lies
    between them times 1 + cos(π·epoch / epochs) (Loshchilov & Hutter, "SGDR", ICLR 2017, equation 5, without restarts).
    """
    if settings.schedule == "constant":
        return settings.learning_rate
    above = max(0.0, settings.learning_rate - least)
    return settings.learning_rate - above + above * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2


@dataclass(frozen=True)
class Standing:
    """How far a fold has come.

    Attributes:
        epochs: epochs done.
        best_epoch: the one, counted from 0, whose head is kept; None before the first.
        best_loss: its bag loss on the validation slides; None where there are none.
        waited: epochs since then.
        stopped: nothing is left to do.
    """

    epochs: int = 0
    best_epoch: int | None = None
    best_loss: float | None = None
    waited: int = 0
    stopped: bool = False

    def after(self, loss: float | None, settings: TrainSettings) -> Standing:
        """The standing after one more epoch with this validation loss (None: no validation slides).

        The head of least loss counts, of equal ones the first; without validation the last. A fold stops after
        ``epochs``, or once ``patience`` epochs in a row were no better and ``least_epochs`` are done.
        """
        better = loss is None or self.best_loss is None or loss < self.best_loss
        waited = 0 if better else self.waited + 1
        done = self.epochs + 1
        tired = waited >= settings.patience and done >= settings.least_epochs
        return Standing(
            epochs=done,
            best_epoch=self.epochs if better else self.best_epoch,
            best_loss=loss if better else self.best_loss,
            waited=waited,
            stopped=tired or done >= settings.epochs,
        )
