"""One fold: a head trained on some bags, chosen on others, and asked about the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from wsi_engine.errors import ModelError, SettingsError
from wsi_engine.memory import explain_memory
from wsi_engine.models import Head, HeadError
from wsi_engine.training.dropout import DropoutSource, cheap_dropout
from wsi_engine.training.hardware import Hardware, choose_hardware
from wsi_engine.training.inference import LoweredBags, fit_standard, mean_bag_loss, predict_bags, to_tensor
from wsi_engine.training.keeping import KeptBags
from wsi_engine.training.loop import FoldLoop
from wsi_engine.training.optimisation import Standing
from wsi_engine.training.plan import EpochRecord, HeadPlan
from wsi_engine.training.sampling import Stream, draw_slides, draw_tiles, open_stream, torch_seed
from wsi_engine.training.settings import TrainSettings

if TYPE_CHECKING:
    from wsi_engine.bags import BagSource
    from wsi_engine.cohorts.splits import Fold
    from wsi_engine.training.prompt_memory import MemoryWatch

SAVE_SECONDS = 10.0
"""After this time the next end of an epoch is written to the state file."""

_LOADERS = 2
"""Threads that load features ahead where the settings do not say."""


@dataclass(frozen=True, eq=False)
class FittedFold:
    """What came out of a fold.

    Attributes:
        head: of the best epoch, on the CPU, in eval mode.
        standing: how many epochs it took, and which was best.
        history: every epoch.
        validation: float64 (n, C), probabilities of the validation slides in the fold's order, before calibration.
        test: the same of the test slides.
        warnings: what the user should know, a sentence each.
    """

    head: Head
    standing: Standing
    history: tuple[EpochRecord, ...]
    validation: NDArray[np.float64]
    test: NDArray[np.float64]
    warnings: tuple[str, ...] = ()


def fit_fold(
    bags: BagSource,
    labels: ArrayLike,
    fold: Fold,
    plan: HeadPlan,
    settings: TrainSettings | None = None,
    *,
    number: int = 0,
    names: Sequence[str] | None = None,
    hardware: Hardware | None = None,
    state_file: Path | None = None,
    told: Callable[[EpochRecord], None] | None = None,
    least_rate: float = 0.0,
    watch: MemoryWatch | None = None,
) -> FittedFold:
    """Train a head on the bags of a fold.

    The head of least mean bag loss on the validation slides is kept; without validation slides the last one, and a
    warning says so. The same arguments give the same head to the byte on the same machine.

    Args:
        bags: where features come from.
        labels: int (N,), the class of each bag.
        fold: which bags to train on, to choose by, and to predict.
        plan: the head to build.
        settings: how to train; None takes the defaults.
        number: of the fold; with the seed it decides everything random.
        names: of the bags, for messages.
        hardware: device and precision; None chooses by ``settings``.
        state_file: where to go on from, and to keep what is needed to go on; removing it when done is up to the caller.
        told: called after every epoch.
        least_rate: where a cosine schedule ends.
        watch: measures the memory of every epoch; None: nobody does.

    Raises:
        ModelError: the head cannot be built, a bag does not fit it, a loss is not finite, memory runs out, or the
            state file is damaged or of another training.
        SettingsError: there is nothing to train on, or a label is missing.
    """
    settings = settings or TrainSettings()
    known = np.asarray(labels, np.int64)
    if not fold.train:
        raise SettingsError(f"fold {number} has no slide to train on; give more slides, or fewer folds")
    if len(known) != len(bags):
        raise SettingsError(f"{len(known)} labels do not fit {len(bags)} bags; give one for each")
    titles = names or [f"bag {place}" for place in range(len(bags))]
    hardware = hardware or choose_hardware(settings, plan.name, typical_numbers(bags, fold.train))
    too_large = f"fold {number} does not fit in the memory of {hardware.device}: lower --max-tiles or --bags-per-step"
    with hardware.repeatable(), explain_memory(ModelError, too_large):
        training = FoldTraining(
            bags, known, fold, plan, settings, number, titles, hardware, least_rate=least_rate, watch=watch
        )
        training.run(state_file, told, SAVE_SECONDS)
        validation, test = (training.predict(places) for places in (fold.validation, fold.test))
        return FittedFold(
            training.head.cpu().eval(), training.standing, training.history, validation, test,
            fold_warnings(fold, number),
        )  # fmt: skip


def typical_numbers(bags: BagSource, places: Sequence[int]) -> float:
    """Tiles × dim of the median bag."""
    return float(np.median([bags.tiles(place) for place in places])) * bags.dim


def fold_warnings(fold: Fold, number: int) -> tuple[str, ...]:
    """What the user should know of a fold before it is trained, a sentence each."""
    if fold.validation:
        return ()
    return (f"fold {number} has no validation slides: the head of the last epoch is kept, and nothing is calibrated",)


class FoldTraining(FoldLoop):
    """A head on stored features.

    Arguments are those of :func:`fit_fold`; ``memory`` limits the bytes of features that are kept, None as
    :class:`~wsi_engine.training.keeping.KeptBags` has it.
    """

    def __init__(
        self,
        bags: BagSource,
        labels: NDArray[np.int64],
        fold: Fold,
        plan: HeadPlan,
        settings: TrainSettings,
        number: int,
        names: Sequence[str],
        hardware: Hardware,
        memory: int | None = None,
        least_rate: float = 0.0,
        watch: MemoryWatch | None = None,
    ) -> None:
        self.bags, self.labels, self.fold, self.plan, self.names = bags, labels, fold, plan, names
        self.head = plan.build(torch_seed(settings.seed, number, 0, Stream.WEIGHTS)).to(hardware.device)
        super().__init__(self.head, settings, number, hardware, least_rate, watch)
        lowered = hardware.precision.type == "bf16" and self.head.standard is None
        self.fast = KeptBags(LoweredBags(bags) if lowered else bags, memory)
        self._loaders = settings.workers or _LOADERS

    def prepare(self) -> None:
        """Fit what standardises features."""
        fit_standard(self.head, self.bags, self.fold.train, self._loaders)

    def predict(self, places: Sequence[int]) -> NDArray[np.float64]:
        """Probabilities float64 (n, C) of some slides."""
        return predict_bags(self.head, self.bags, places, self.hardware, self.names, self._loaders)

    def validate(self) -> float | None:
        """Mean bag loss of the validation slides."""
        if not self.fold.validation:
            return None
        return mean_bag_loss(
            self.head, self.fast, self.fold.validation, self.labels, self.hardware, self.names, self._loaders
        )

    def train_epoch(self, epoch: int) -> float:
        """One step after the other over the slides of an epoch; the mean of their losses."""
        with cheap_dropout(self.head) as source:
            return self._train(epoch, source)

    def _train(self, epoch: int, source: DropoutSource) -> float:
        """One step after the other over the slides of an epoch; the mean of their losses."""
        from wsi_engine.bags import prefetch  # noqa: PLC0415

        seed = self.settings.seed
        streams = {kind: open_stream(seed, self.number, epoch, kind) for kind in (Stream.SLIDES, Stream.TILES)}
        source.generator = open_stream(seed, self.number, epoch, Stream.DROPOUT)
        torch.manual_seed(torch_seed(seed, self.number, epoch, Stream.TORCH))
        self.head.train()
        order = draw_slides(self.fold.train, self.labels, self.settings.balanced, streams[Stream.SLIDES])
        losses: list[float] = []
        step: list[tuple[int, Tensor]] = []
        with closing(prefetch(self.fast, order, self._loaders)) as ahead:
            for place, features in ahead:
                tiles = draw_tiles(features, self.settings, streams[Stream.TILES])
                step.append((place, to_tensor(tiles, self.hardware.device)))
                if len(step) == self.settings.bags_per_step or len(losses) + len(step) == len(order):
                    losses += self._step(epoch, step)
                    step = []
        return float(np.mean(losses))

    def _step(self, epoch: int, bags: list[tuple[int, Tensor]]) -> list[float]:
        """One step of the optimiser on the mean loss of some bags; the loss of each."""
        lengths = [len(tiles) for _, tiles in bags]
        features = torch.cat([tiles for _, tiles in bags]) if len(bags) > 1 else bags[0][1]
        self.optimiser.zero_grad(set_to_none=True)
        try:
            with self.hardware.arithmetic():
                one = len(bags) == 1
                outputs = [self.head(features)] if one else self.head.forward_bags(features, lengths)
            losses = [
                self.head.loss(output, int(self.labels[place]))
                for (place, _), output in zip(bags, outputs, strict=True)
            ]
        except HeadError as error:
            raise ModelError(f"{', '.join(self.names[place] for place, _ in bags)}: {error}") from error
        values = [float(loss.detach()) for loss in losses]
        for (place, _), value in zip(bags, values, strict=True):
            self.check_loss(value, epoch, self.names[place])
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        return values

    def describe(self) -> dict[str, Any]:
        """What decides the result: plain values."""
        settings = {**asdict(self.settings), "device": str(self.hardware.device)}
        for name in ("workers", "keep_share"):  # of threads and memory alone; the second of prompts' settings only
            settings.pop(name, None)
        plan = {**asdict(self.plan), "options": self.plan.all_options()}
        values = {
            "settings": settings,
            "precision": str(self.hardware.precision),
            "plan": plan,
            "fold": asdict(self.fold),
            "number": self.number,
            "labels": self.labels.tolist(),
        }
        identity: dict[str, Any] = json.loads(json.dumps(values))
        return identity
