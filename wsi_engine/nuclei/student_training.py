"""Training of the student: first on painted tissue alone, then rounds in which it labels unlabelled images itself.

No label that a person drew is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_engine.encoders.precision import Precision, arithmetic, choose_precision
from wsi_engine.errors import InputError, ModelError, SettingsError
from wsi_engine.memory import keep_freed_memory
from wsi_engine.models.nuclei_net import NucleiNet, NucleiNetSettings
from wsi_engine.nuclei.images import resample_image
from wsi_engine.nuclei.student_batches import Batcher, Field, make_field
from wsi_engine.nuclei.student_collages import cut_nuclei, lay_collage
from wsi_engine.nuclei.student_colours import recompress, stain_scene
from wsi_engine.nuclei.student_inference import StudentPredictor, enlarge_maps
from wsi_engine.nuclei.student_labels import TrustSettings, agree_on_labels, label_by_stain
from wsi_engine.nuclei.student_losses import student_loss
from wsi_engine.nuclei.student_scenes import SCENE_MPP, paint_scene

Log = Callable[[str], None]
Marked = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Labels of an image and how far each pixel's is trusted."""

LOG_STEPS = 50
"""Steps between two lines of progress."""

LEAST_CUTOUTS = 3
"""Isolated nuclei from which collages of an image are laid."""

SCENE_PX = 192
"""Side of a painted scene in pixels."""


@dataclass(frozen=True)
class Round:
    """A round of self-training.

    Attributes:
        steps: of the optimiser.
        rate: greatest learning rate.
        trust: what of the teacher's labels is believed.
        collages: of each image, drawn as often as the image itself, all together.
    """

    steps: int
    rate: float
    trust: TrustSettings
    collages: int = 0


@dataclass(frozen=True)
class StudentTrainingSettings:
    """How a student is trained.

    Attributes:
        widths: of the network.
        scenes: painted scenes to draw from.
        side: of a tile in pixels of 0.5 µm.
        batch: tiles in a batch of the first stage, all of scenes.
        painted, real: tiles of scenes and of images in a batch of a round.
        steps: of the optimiser in the first stage.
        rate: greatest learning rate of the first stage; it rises over 50 steps and falls along a cosine.
        rounds: of self-training.
        keep: share of the old in the running mean of the weights, which is what is kept.
        views, scales: of an image when the student labels it; scales are multiples of 0.5 µm per pixel.
        seed: of all chance.
        device: "cpu" or "cuda".
    """

    widths: tuple[int, ...] = (16, 32, 64, 128, 128)
    scenes: int = 1000
    side: int = 128
    batch: int = 10
    painted: int = 2
    real: int = 4
    steps: int = 2000
    rate: float = 2e-3
    rounds: tuple[Round, ...] = (
        Round(1200, 1.5e-3, TrustSettings(sure=1.1, unsure=0.6, doubtful=0.1), collages=3),
        Round(1800, 1.5e-3, TrustSettings(sure=0.75, unsure=0.5, least_seen=0.3), collages=4),
        Round(1400, 1.2e-3, TrustSettings(sure=0.75, unsure=0.5, least_seen=0.4, least_contrast=0.4), collages=4),
        Round(1500, 1.2e-3, TrustSettings(sure=0.75, unsure=0.5, least_seen=0.4, least_contrast=0.4), collages=4),
    )
    keep: float = 0.995
    views: int = 2
    scales: tuple[float, ...] = (0.8, 1.0, 1.4)
    seed: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (
            ("scenes", 1),
            ("side", 32),
            ("batch", 1),
            ("painted", 1),
            ("real", 1),
            ("steps", 1),
            ("views", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SettingsError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if not self.scales or not all(0.25 <= scale <= 4 for scale in self.scales):
            raise SettingsError(f"scales must be one or more numbers within 0.25–4, not {self.scales!r}")
        if not 0 < self.rate < 1 or not 0 <= self.keep < 1:
            raise SettingsError(f"rate and keep must be within 0–1, not {self.rate!r} and {self.keep!r}")
        try:
            stride = NucleiNet(NucleiNetSettings(self.widths)).stride
        except ValueError as error:
            raise SettingsError(str(error)) from error
        if self.side % stride:
            raise SettingsError(f"side must be a multiple of {stride} pixels, not {self.side}")


@dataclass(frozen=True, eq=False)
class TrainingImage:
    """An unlabelled image: uint8 (H, W, 3), its mpp, and how often it is drawn beside the others."""

    pixels: NDArray[np.uint8]
    mpp: float
    weight: float = 1.0
    name: str = field(default="image")


def train_student(
    images: Sequence[TrainingImage],
    settings: StudentTrainingSettings = StudentTrainingSettings(),
    log: Log | None = None,
    after_stage: Callable[[int, NucleiNet], None] | None = None,
    done: tuple[int, NucleiNet] | None = None,
) -> NucleiNet:
    """Train a student from nothing.

    Args:
        images: unlabelled tissue; may be empty, and then there are no rounds.
        settings: the recipe.
        log: called with a line of progress every :data:`LOG_STEPS` steps.
        after_stage: called with 0 after the painted stage, then with the number of each round, and the network.
        done: the last stage that was finished before and its network, to go on from there to the same weights.

    Returns:
        the network, in eval mode, on the CPU. The same settings, images and number of threads give the same weights.

    Raises:
        ModelError: the training diverged.
        InputError: the images hold nothing that looks like a nucleus.
    """
    say = log or (lambda line: None)
    keep_freed_memory()
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    network = NucleiNet(NucleiNetSettings(settings.widths)).to(device)
    network.to(memory_format=torch.channels_last)
    scenes = [paint_field(settings.seed, number) for number in range(settings.scenes)]
    say(f"painted {len(scenes)} scenes")
    if done is None:
        batchers = [Batcher(scenes, settings.side, settings.seed)]
        optimise(network, batchers, (settings.batch,), settings.steps, settings.rate, settings, say)
        if after_stage:
            after_stage(0, network)
    else:
        network.load_state_dict(done[1].state_dict())
    tissue = [resample_image(image.pixels, image.mpp, SCENE_MPP) for image in images]
    stained = [label_by_stain(pixels, SCENE_MPP) for pixels in tissue] if settings.rounds else []
    for number, turn in enumerate(settings.rounds if images else (), start=1):
        if done is not None and number <= done[0]:
            continue
        predictor = StudentPredictor(network, device, views=settings.views)
        marked = [_label(predictor, *pair, settings.scales, turn.trust) for pair in zip(tissue, stained, strict=True)]
        weights = _draw_weights([labels for labels, _ in marked], images)
        say(f"round {number}: labelled {int((weights > 0).sum())} of {len(marked)} images")
        seed = settings.seed + 1000 * number
        fields, weights = _lay_fields(np.random.default_rng(seed), tissue, marked, weights, turn.collages)
        batchers = [Batcher(scenes, settings.side, seed), Batcher(fields, settings.side, seed + 500, weights=weights)]
        optimise(network, batchers, (settings.painted, settings.real), turn.steps, turn.rate, settings, say)
        if after_stage:
            after_stage(number, network)
    network.cpu().eval()
    return network


def paint_field(seed: int, number: int) -> Field:
    """The ``number``-th scene of a seed, stained and ready to be drawn from."""
    rng = np.random.default_rng((seed, number))
    scene = paint_scene(rng, SCENE_PX)
    image = stain_scene(rng, scene.density)
    if rng.random() < 0.3:
        image = recompress(image, int(rng.integers(40, 95)))
    return make_field(image, scene.labels)


def _label(
    predictor: StudentPredictor,
    pixels: NDArray[np.uint8],
    stained: NDArray[np.int32],
    scales: Sequence[float],
    trust: TrustSettings,
) -> Marked:
    """Labels of an image on which its stain and the student, at several scales, agree, and how far to trust them."""
    maps = np.zeros((2, *stained.shape), np.float32)
    for scale in scales:
        seen = predictor.predict_maps(resample_image(pixels, SCENE_MPP, SCENE_MPP * scale))
        maps += enlarge_maps(seen, *stained.shape) / np.float32(len(scales))
    return agree_on_labels(pixels, stained, maps, SCENE_MPP, trust)


def _draw_weights(found: Sequence[NDArray[np.int32]], images: Sequence[TrainingImage]) -> NDArray[np.float64]:
    """How often each image is drawn: none without nuclei, else its weight; they sum to 1."""
    filled = np.array([labels.any() for labels in found])
    weights = np.where(filled, [image.weight for image in images], 0.0)
    if not weights.sum() > 0:
        raise InputError("the images hold nothing that looks like a nucleus; give H&E tissue and its true mpp")
    return np.asarray(weights / weights.sum())


def _lay_fields(
    rng: np.random.Generator,
    tissue: Sequence[NDArray[np.uint8]],
    marked: Sequence[Marked],
    weights: NDArray[np.float64],
    collages: int,
) -> tuple[list[Field], NDArray[np.float64]]:
    """Fields of the images and of their collages, with weights: half of each image's falls to its collages."""
    fields, shares = [], []
    for pixels, (labels, trust), weight in zip(tissue, marked, weights, strict=True):
        cutouts = cut_nuclei(pixels, labels, trust) if collages else []
        cutouts = cutouts if len(cutouts) >= LEAST_CUTOUTS else []
        number = collages if labels.any() else 0
        fields.append(make_field(pixels, labels, trust))
        shares.append(weight / 2 if number else weight)
        for _ in range(number):
            count = 1 + int(len(np.unique(labels)) * rng.uniform(0.2, 0.8))
            fields.append(make_field(*lay_collage(rng, pixels, labels, trust, cutouts, count)))
            shares.append(weight / 2 / number)
    return fields, np.array(shares) / sum(shares)


def optimise(
    network: NucleiNet,
    batchers: Sequence[Batcher],
    counts: Sequence[int],
    steps: int,
    rate: float,
    settings: StudentTrainingSettings,
    say: Log,
) -> None:
    """AdamW for some steps; ``network`` ends as the running mean of its weights, in eval mode.

    Args:
        network: changed in place.
        batchers: of scenes, pictures, …
        counts: tiles of each in a batch.
        steps: of the optimiser.
        rate: greatest learning rate.
        settings: for the running mean.
        say: called with a line of progress every :data:`LOG_STEPS` steps.

    Raises:
        ModelError: the training diverged.
    """
    device = next(network.parameters()).device
    precision = choose_precision("auto", device)
    network.train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    mean = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    recent: list[float] = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * max(0.01, (1 + math.cos(math.pi * step / steps)) / 2)
        drawn = [batcher.draw(count) for batcher, count in zip(batchers, counts, strict=True)]
        batch = [torch.cat(parts).to(device) for parts in zip(*drawn, strict=True)]
        recent.append(_step(network, optimiser, batch, precision))
        if not math.isfinite(recent[-1]):
            raise ModelError(f"the training diverged at step {step + 1}; lower the rate of {rate:g}")
        _update_mean(mean, network, min(settings.keep, (step + 1) / (step + 20)))
        if (step + 1) % LOG_STEPS == 0 or step + 1 == steps:
            say(f"step {step + 1} of {steps}, mean loss {sum(recent) / len(recent):.4f}")
            recent.clear()
    rounded = {name: one.half().float() if one.is_floating_point() else one for name, one in mean.items()}
    network.load_state_dict(rounded)  # as they are kept in files, so that a stage can go on from its file
    network.eval()


def _step(network: NucleiNet, optimiser: torch.optim.Optimizer, batch: Sequence[Tensor], precision: Precision) -> float:
    pixels, mask, depth, trust = batch
    with arithmetic(precision, pixels.device):
        out = network(pixels.contiguous(memory_format=torch.channels_last))
    loss = student_loss(out, mask, depth, trust)
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimiser.step()
    return loss.item()


@torch.no_grad()
def _update_mean(mean: dict[str, Tensor], network: NucleiNet, keep: float) -> None:
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            mean[name].lerp_(tensor, 1 - keep)
        else:
            mean[name].copy_(tensor)
