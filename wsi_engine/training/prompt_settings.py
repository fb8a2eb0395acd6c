"""The settings of training prompts, and of what they are compared with, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from wsi_engine.checks import check_choice, check_count, check_number
from wsi_engine.errors import SettingsError
from wsi_engine.training.settings import TrainSettings

Mode: TypeAlias = Literal["prompt", "conventional", "finetune"]


@dataclass(frozen=True)
class Tuning:
    """What learns beside the head.

    Attributes:
        mode: ``prompt`` (tokens in a frozen transformer), ``conventional`` (nothing: the features are extracted once)
            or ``finetune`` (the transformer itself).
        prompts: tokens at a layer, for ``prompt``.
        deep: every layer has its own, for ``prompt``.
        tune_blocks: how many of the last blocks learn, for ``finetune``; None for the whole network.
    """

    mode: Mode = "prompt"
    prompts: int = 1
    deep: bool = False
    tune_blocks: int | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_count("prompts", self.prompts, 1)
        if not isinstance(self.deep, bool):
            raise SettingsError(f"deep must be True or False, not {self.deep!r}")
        if self.deep and self.mode != "prompt":
            raise SettingsError(f"deep is about prompts, and the mode is {self.mode}: leave one of them out")
        if self.tune_blocks is not None:
            check_count("tune_blocks", self.tune_blocks, 1)
            if self.mode != "finetune":
                raise SettingsError(
                    f"tune_blocks is for the mode finetune, and the mode is {self.mode}: leave one of them out"
                )


@dataclass(frozen=True)
class PromptSettings(TrainSettings):
    """How prompts and head are trained; the defaults are those of Zhang et al. 2023, section 3.

    Attributes beside those of :class:`~wsi_engine.training.settings.TrainSettings`:
        least_rate: learning rate that the cosine ends at.
        chunk: tiles that go through the encoder at a time.
        augment: turn and mirror each tile at random in every training step.
        keep_share: share of the available memory that pixels may take from one epoch to the next, 0 to 1.
        workers: threads that decode slides, None for the usable cores; in the conventional mode they load features
            ahead too, None for two then.
    """

    epochs: int = 40
    least_epochs: int = 20
    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    optimiser: Literal["adam", "adamw"] = "adamw"
    bags_per_step: int = 8
    least_rate: float = 5e-6
    chunk: int = 32
    augment: bool = False
    keep_share: float = 0.25
    workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("chunk", self.chunk, 1)
        for name, most in (("least_rate", self.learning_rate), ("keep_share", 1.0)):
            value = getattr(self, name)
            check_number(name, value)
            if value > most:
                raise SettingsError(f"{name} must be at most {most:g}, not {value!r}")
        if not isinstance(self.augment, bool):
            raise SettingsError(f"augment must be True or False, not {self.augment!r}")
