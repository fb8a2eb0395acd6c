"""The settings of training scale attention, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from wsi_engine.checks import check_choice, check_count, check_number
from wsi_engine.errors import SettingsError
from wsi_engine.models.scale_attention import ScaleAttentionSettings
from wsi_engine.nuclei.scale_stains import NORMALISATIONS

PRECISIONS = ("auto", "fp32", "bf16")

_BESIDE = ("device", "workers", "checkpoint_batches", "views", "sheet_crops")
"""Settings that leave the network as it is, or nearly: where it is computed, and what is reported of it."""


@dataclass(frozen=True)
class ScaleTrainingSettings:
    """How scale attention is trained; the defaults are the paper's (Sahasrabudhe et al. 2020, section 3).

    Attributes:
        epochs: of ``batches`` each.
        stain_epochs: the first of them, fewer than all, in which F learns where the stain sees nuclei
            (:mod:`~wsi_engine.nuclei.scale_targets`) and G to tell scales through that. 0 is the paper's. F from random
            weights needs more steps to find nuclei than a processor makes in an hour. With the paper's ``share`` of
            0.07, less than nuclei cover, τ then lies among the logits of nuclei and not below them: give 0.2.
        batches: steps of the optimiser in an epoch.
        batch_size: crops in a step, as many at each scale, give or take one.
        crop_px: side of a crop, even, at least 32.
        min_tissue: least part of a crop that is tissue.
        learning_rate: of Adam, constant.
        beta1: of Adam.
        weight_decay: L2 penalty.
        normalisation: ``none``, ``reinhard`` or ``macenko``: every picture is brought to the mean look of all. What
            the network is used on later must be brought to it as well; the reference is in the card.
        stain_jitter: standard deviation of the factors, around 1, of haematoxylin, eosin and the residual of a crop.
        scale_equivariance: whether the loss has that term.
        classifier_weights: ``hub`` (ImageNet), ``random``, ``random:SEED`` or the path of a file of ResNet34 weights.
        image_mpp: micrometres per pixel of plain pictures that do not say; None: they must.
        slide_mpp: the same for slides and pictures alike, in place of what they say.
        network: how F is built.
        views: passes over a labelled picture whose attention is averaged, for reports; 8 are the paper's.
        sheet_crops: crops at each scale on the sheet that is drawn after each epoch.
        checkpoint_batches: batches between two checkpoints.
        device: ``auto`` (a CUDA device where there is one), or a device by torch's name.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the device computes in it natively.
        seed: everything random follows from it.
        workers: threads that read and colour crops; results do not depend on them.
    """

    epochs: int = 200
    stain_epochs: int = 0
    batches: int = 100
    batch_size: int = 32
    crop_px: int = 160
    min_tissue: float = 0.9
    learning_rate: float = 2e-4
    beta1: float = 0.9
    weight_decay: float = 1e-4
    normalisation: Literal["none", "reinhard", "macenko"] = "none"
    stain_jitter: float = 0.03
    scale_equivariance: bool = True
    classifier_weights: str = "hub"
    image_mpp: float | None = 0.25
    slide_mpp: float | None = None
    network: ScaleAttentionSettings = field(default_factory=ScaleAttentionSettings)
    views: int = 1
    sheet_crops: int = 4
    checkpoint_batches: int = 25
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        for name, least, most in (
            ("epochs", 1, None), ("stain_epochs", 0, None), ("batches", 1, None), ("batch_size", 3, None),
            ("crop_px", 32, None), ("views", 1, 8), ("sheet_crops", 1, 64), ("checkpoint_batches", 1, None),
            ("seed", 0, 2**63 - 1), ("workers", 1, None),
        ):  # fmt: skip
            check_count(name, getattr(self, name), least, most)
        if self.stain_epochs >= self.epochs:
            raise SettingsError(
                f"stain_epochs must be below epochs, or no scale is learnt, not {self.stain_epochs} of {self.epochs}"
            )
        if self.crop_px % 2:
            raise SettingsError(f"crop_px must be even, so that crops can be halved, not {self.crop_px}")
        check_number("learning_rate", self.learning_rate, above=True)
        for name in ("weight_decay", "stain_jitter"):
            check_number(name, getattr(self, name))
        for name in ("beta1", "min_tissue"):
            check_number(name, getattr(self, name))
            if getattr(self, name) >= 1:
                raise SettingsError(f"{name} must be below 1, not {getattr(self, name)}")
        for name in ("image_mpp", "slide_mpp"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=True)
        check_choice("normalisation", self.normalisation, NORMALISATIONS)
        check_choice("precision", self.precision, PRECISIONS)
        if not isinstance(self.classifier_weights, str) or not self.classifier_weights:
            raise SettingsError(f"classifier_weights must be hub, random or a file, not {self.classifier_weights!r}")

    @property
    def steps(self) -> int:
        """Batches of the whole training."""
        return self.epochs * self.batches

    @property
    def stain_steps(self) -> int:
        """Batches of the stain epochs."""
        return self.stain_epochs * self.batches

    def recipe(self) -> dict[str, Any]:
        """What the network follows from, as plain JSON values: all but where it is computed and what is reported."""
        plain = asdict(self)
        plain["network"]["dilations"] = list(self.network.dilations)
        return {name: value for name, value in plain.items() if name not in _BESIDE}
