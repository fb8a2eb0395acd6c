"""One fold of prompts, or of a fine-tuned encoder, trained together with a head from the tiles of whole slides.

Source: J. Zhang et al., "Prompt-MIL" (arXiv 2303.12214), sections 2 and 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsi_engine.cohorts.splits import Fold
from wsi_engine.encoders.deep import DeepEncoder
from wsi_engine.encoders.precision import TYPES
from wsi_engine.encoders.prompted import tune_backbone
from wsi_engine.errors import EncoderError, ModelError
from wsi_engine.memory import explain_memory
from wsi_engine.models import HeadError
from wsi_engine.models.prompt import PromptedViT, PromptError
from wsi_engine.models.prompt_gradients import bag_backward
from wsi_engine.training import fold as heads
from wsi_engine.training.fold import FittedFold, fold_warnings
from wsi_engine.training.hardware import Hardware
from wsi_engine.training.inference import fit_standard, mean_bag_loss, predict_bags
from wsi_engine.training.loop import FoldLoop
from wsi_engine.training.plan import EpochRecord, HeadPlan
from wsi_engine.training.prompt_memory import MemoryWatch
from wsi_engine.training.prompt_settings import PromptSettings, Tuning
from wsi_engine.training.prompt_tiles import EncodedBags, SlideTiles, read_ahead, turn_tiles
from wsi_engine.training.sampling import Stream, draw_rows, draw_slides, open_stream, torch_seed


@dataclass(frozen=True, eq=False)
class PromptTask:
    """What all folds of a run have in common.

    Attributes:
        tiles: of the slides.
        labels: int64 (N,), the class of each slide.
        names: of the slides, for messages.
        encoder: what is tuned; it is not changed.
        tuning: how.
        plan: the head.
        settings: how both are trained.
        hardware: where, and in which precision.
    """

    tiles: SlideTiles
    labels: NDArray[np.int64]
    names: Sequence[str]
    encoder: DeepEncoder
    tuning: Tuning
    plan: HeadPlan
    settings: PromptSettings
    hardware: Hardware

    def build_encoder(self, number: int) -> nn.Module:
        """What learns of the encoder, as a fold begins with it."""
        return build_tuned(self.encoder, self.tuning, torch_seed(self.settings.seed, number, 0, Stream.PROMPTS))


def build_tuned(encoder: DeepEncoder, tuning: Tuning, seed: int) -> nn.Module:
    """Prompts in an encoder's backbone, or a copy of the backbone that learns, on its device: tiles to features.

    The same seed gives the same prompts; torch's own random state is kept.

    Raises:
        EncoderError: the encoder is no transformer that this can be done to.
        SettingsError: it has fewer blocks than are to learn.
    """
    backbone: Any = encoder.backbone
    if tuning.mode == "finetune":
        return tune_backbone(backbone, tuning.tune_blocks)
    pooling: Any = encoder.card.pooling
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            return PromptedViT(backbone.network, tuning.prompts, tuning.deep, pooling)
        except PromptError as error:
            raise EncoderError(f"{encoder.card.name} cannot be prompted: {error}") from error


@dataclass(frozen=True, eq=False)
class FittedPrompts(FittedFold):
    """What came out of a fold, with what was learned beside the head: a ``PromptedViT`` or a backbone."""

    encoder: nn.Module | None = None


def fit_prompts(
    task: PromptTask,
    fold: Fold,
    number: int = 0,
    state_file: Path | None = None,
    told: Callable[[EpochRecord], None] | None = None,
) -> FittedPrompts:
    """Train prompts (or the encoder) and a head on the slides of a fold.

    What had the least mean bag loss on the validation slides is kept. The same arguments give the same to the byte on
    the same machine, also after a kill.

    Args:
        task: what is trained.
        fold: which slides to train on, to choose by, and to predict.
        number: of the fold; with the seed it decides everything random.
        state_file: where to go on from, and to keep what is needed to go on; removing it when done is up to the caller.
        told: called after every epoch.

    Raises:
        ModelError: a loss is not finite, memory runs out, or the state file is damaged or of another training.
        SlideError: a slide cannot be read.
    """
    too_large = f"fold {number} does not fit in the memory of {task.hardware.device}: lower --chunk or --max-tiles"
    with task.hardware.repeatable(), explain_memory(ModelError, too_large):
        training = PromptTraining(task, fold, number)
        training.run(state_file, told, heads.SAVE_SECONDS)
        validation, test = (training.predict(places) for places in (fold.validation, fold.test))
        return FittedPrompts(
            training.head.cpu().eval(), training.standing, training.history, validation, test,
            fold_warnings(fold, number), training.encoder.eval(),
        )  # fmt: skip


class PromptTraining(FoldLoop):
    """Prompts or an encoder, and a head; arguments are those of :func:`fit_prompts`."""

    def __init__(self, task: PromptTask, fold: Fold, number: int) -> None:
        self.task, self.fold = task, fold
        hardware, settings = task.hardware, task.settings
        self.encoder = task.build_encoder(number)
        self.head = task.plan.build(torch_seed(settings.seed, number, 0, Stream.WEIGHTS)).to(hardware.device)
        watch = MemoryWatch(hardware.device)
        both = nn.ModuleDict({"encoder": self.encoder, "head": self.head})
        super().__init__(both, settings, number, hardware, settings.least_rate, watch)
        kind = hardware.precision.type
        self.autocast = None if kind == "fp32" else TYPES[kind]
        self.bags = EncodedBags(
            task.tiles, self.encoder, task.encoder.prepare, task.plan.in_dim, hardware.device, settings.chunk,
            self.autocast,
        )  # fmt: skip

    def prepare(self) -> None:
        """Fit what standardises features, on those of the encoder as it is at the start."""
        self.encoder.eval()
        fit_standard(self.head, self.bags, self.fold.train)

    def predict(self, places: Sequence[int]) -> NDArray[np.float64]:
        """Probabilities float64 (n, C) of some slides."""
        self.encoder.eval()
        return predict_bags(self.head, self.bags, places, self.hardware, self.task.names)

    def validate(self) -> float | None:
        """Mean bag loss of the validation slides."""
        if not self.fold.validation:
            return None
        self.encoder.eval()
        return mean_bag_loss(
            self.head, self.bags, self.fold.validation, self.task.labels, self.hardware, self.task.names
        )

    def train_epoch(self, epoch: int) -> float:
        """One step after the other over the slides of an epoch; the mean of their losses."""
        task, settings = self.task, self.task.settings
        streams = {kind: open_stream(settings.seed, self.number, epoch, kind) for kind in (Stream.SLIDES, Stream.TILES)}
        torch.manual_seed(torch_seed(settings.seed, self.number, epoch, Stream.TORCH))
        self.encoder.train()
        self.head.train()
        order = draw_slides(self.fold.train, task.labels, settings.balanced, streams[Stream.SLIDES])
        wanted = [(place, draw_rows(task.tiles.tiles(place), settings, streams[Stream.TILES])) for place in order]
        losses: list[float] = []
        with closing(read_ahead(task.tiles, wanted)) as ahead:
            for place, pixels in ahead:
                begun = len(losses) - len(losses) % settings.bags_per_step
                together = min(settings.bags_per_step, len(order) - begun)
                if len(losses) == begun:
                    self.optimiser.zero_grad(set_to_none=True)
                losses.append(self._pass_slide(epoch, place, pixels, 1 / together))
                del pixels
                if len(losses) == begun + together:
                    self.optimiser.step()
        return float(np.mean(losses))

    def _pass_slide(self, epoch: int, place: int, pixels: NDArray[np.uint8], scale: float) -> float:
        """The gradients of one slide, added to those that are there; its loss."""
        task = self.task
        try:
            step = bag_backward(
                self.encoder, self.head, pixels, int(task.labels[place]), prepare=self._prepare_tiles,
                chunk=task.settings.chunk, scale=scale, autocast=self.autocast,
            )  # fmt: skip
        except (HeadError, PromptError) as error:
            raise ModelError(f"{task.names[place]}: {error}") from error
        self.check_loss(step.loss, epoch, task.names[place])
        return step.loss

    def _prepare_tiles(self, pixels: Tensor) -> Tensor:
        turned = turn_tiles(pixels) if self.task.settings.augment else pixels
        return self.task.encoder.prepare(turned)

    def describe(self) -> dict[str, Any]:
        """What decides the result: plain values."""
        task = self.task
        # how much is kept, and by how many threads it is read, changes no pixel
        settings = {**asdict(task.settings), "workers": None, "keep_share": None, "device": str(self.hardware.device)}
        values = {
            "settings": settings,
            "tuning": asdict(task.tuning),
            "encoder": task.encoder.card.weights_digest,
            "precision": str(self.hardware.precision),
            "plan": {**asdict(task.plan), "options": task.plan.all_options()},
            "fold": asdict(self.fold),
            "number": self.number,
            "labels": task.labels.tolist(),
            "slides": list(task.names),
        }
        identity: dict[str, Any] = json.loads(json.dumps(values))
        return identity
