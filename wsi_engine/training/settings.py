"""The settings of training a head, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wsi_engine.checks import check_choice, check_count, check_number
from wsi_engine.errors import SettingsError

OPTIMISERS = ("adam", "adamw")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class TrainSettings:
    """How a head is trained; the defaults are those of CLAM (Lu et al. 2021, Methods), and a cosine schedule.

    Attributes:
        epochs: most epochs of a fold.
        patience: epochs without a lower bag loss on the validation slides after which a fold ends.
        least_epochs: epochs before which it does not.
        learning_rate: of the first epoch.
        weight_decay: L2 penalty of ``adam``, decoupled decay of ``adamw``.
        optimiser: ``adam`` or ``adamw``.
        schedule: ``cosine`` (to 0 over ``epochs``) or ``constant``.
        balanced: draw slides with replacement so that every class is as likely; else each slide once an epoch.
        bags_per_step: slides in one step of the optimiser; their losses are averaged.
        max_tiles: most tiles of a slide in one step, drawn anew each time; None takes all.
        tile_dropout: share of the tiles of a slide left out at random each time, 0 to below 1.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the device computes in it natively and bags are large
            enough to gain from it.
        device: ``auto`` (a CUDA device where there is one), or a device by torch's name.
        seed: everything random follows from it and the number of the fold.
        workers: threads that load features ahead, None for two; results do not depend on them.
    """

    epochs: int = 200
    patience: int = 20
    least_epochs: int = 50
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    optimiser: Literal["adam", "adamw"] = "adam"
    schedule: Literal["cosine", "constant"] = "cosine"
    balanced: bool = True
    bags_per_step: int = 1
    max_tiles: int | None = None
    tile_dropout: float = 0.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    seed: int = 0
    workers: int | None = 2

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1), ("patience", 1), ("least_epochs", 0), ("bags_per_step", 1), ("seed", 0),
        ):  # fmt: skip
            check_count(name, getattr(self, name), least)
        for name in ("max_tiles", "workers"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        check_number("learning_rate", self.learning_rate, above=True)
        check_number("weight_decay", self.weight_decay)
        check_number("tile_dropout", self.tile_dropout)
        if self.tile_dropout >= 1:
            raise SettingsError(f"tile_dropout must be below 1, so that tiles remain, not {self.tile_dropout}")
        check_choice("optimiser", self.optimiser, OPTIMISERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("precision", self.precision, PRECISIONS)
        if not isinstance(self.balanced, bool):
            raise SettingsError(f"balanced must be True or False, not {self.balanced!r}")
        if not isinstance(self.device, str) or not self.device:
            raise SettingsError(f"device must be auto, cpu, cuda or a device by torch's name, not {self.device!r}")
