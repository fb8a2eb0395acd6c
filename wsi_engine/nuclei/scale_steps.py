"""One step of training scale attention, and all that it changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from wsi_engine.errors import ModelError
from wsi_engine.models.scale_attention import AttentionMaps, ScaleAttention, ScaleClassifier, normalise_pixels
from wsi_engine.models.scale_losses import (
    apply_symmetries,
    halve,
    rigid_loss,
    scale_equivariance_loss,
    scale_loss,
    smoothness_loss,
    still_statistics,
    undo_symmetries,
)
from wsi_engine.nuclei.scale_batches import CropBatch
from wsi_engine.nuclei.scale_settings import ScaleTrainingSettings
from wsi_engine.training.hardware import Hardware

_STAIN_RATE = 1e-3
"""Learning rate of F in stain epochs: regression bears more than attention does."""


@dataclass(frozen=True, eq=False)
class ScaleTrainer:
    """F, G and the optimiser, on one device.

    ``primer`` is the optimiser of F in stain epochs: one of its own, so that what Adam remembers of that loss does not
    scale the first steps by the paper's.
    """

    network: ScaleAttention
    classifier: ScaleClassifier
    optimiser: torch.optim.Adam
    primer: torch.optim.Adam | None
    hardware: Hardware
    scale_equivariance: bool

    @classmethod
    def create(cls, classifier: ScaleClassifier, settings: ScaleTrainingSettings, hardware: Hardware) -> ScaleTrainer:
        """Fresh F beside a classifier, moved to the device."""
        place = {"device": hardware.device, "memory_format": torch.channels_last}
        network = ScaleAttention(settings.network, seed=settings.seed).to(**place)  # type: ignore[call-overload]
        classifier = classifier.to(**place)  # type: ignore[call-overload]
        adam = partial(torch.optim.Adam, betas=(settings.beta1, 0.999), weight_decay=settings.weight_decay)
        optimiser = adam([*network.parameters(), *classifier.parameters()], lr=settings.learning_rate)
        primer = adam(network.parameters(), lr=_STAIN_RATE) if settings.stain_epochs else None
        return cls(network, classifier, optimiser, primer, hardware, settings.scale_equivariance)

    def step(self, batch: CropBatch) -> dict[str, float]:
        """Learn from a batch: where the stain sees nuclei if it says so, else by the paper's losses.

        Returns:
            The terms of the loss, their sum, the accuracy and τ.

        Raises:
            ModelError: the loss is not finite.
        """
        images = normalise_pixels(torch.from_numpy(batch.pixels).to(self.hardware.device))
        self.network.train()
        self.classifier.train()
        scales = torch.from_numpy(batch.scales).to(images.device)
        if self.primer is None or batch.target is None:
            return self._learn_scales(images, scales, batch.symmetries)
        return self._learn_stain(self.primer, images, scales, torch.from_numpy(batch.target).to(images.device))

    def _learn_stain(
        self, primer: torch.optim.Adam, images: Tensor, scales: Tensor, target: Tensor
    ) -> dict[str, float]:
        """A step of each by itself: F's logits are to be the target, and G tells scales through the target.

        So that F, once it follows G, is led by one that knows something.
        """
        target = target[:, None]  # (B, 1, S, S)
        with self.hardware.arithmetic():
            maps = self.network(images)
            scale_logits = self.classifier(images, target)
        terms = {"stain": mse_loss(maps.logits, target), "scale": scale_loss(scale_logits, scales)}
        _descend(self.optimiser, terms["scale"])
        _descend(primer, terms["stain"])
        return _summarise(terms, scale_logits, scales, maps)

    def _learn_scales(self, images: Tensor, scales: Tensor, symmetries: tuple[int, ...]) -> dict[str, float]:
        """A step of F and G by the paper's losses."""
        with self.hardware.arithmetic():
            maps = self.network(images)
            scale_logits = self.classifier(images, maps.attention)
            terms = self._terms(images, scales, symmetries, maps, scale_logits)
        _descend(self.optimiser, torch.stack(list(terms.values())).sum())
        return _summarise(terms, scale_logits, scales, maps)

    def _terms(
        self, images: Tensor, scales: Tensor, symmetries: tuple[int, ...], maps: AttentionMaps, scale_logits: Tensor
    ) -> dict[str, Tensor]:
        """The terms of the loss by name; every target is judged by the same τ as the crops themselves."""
        with torch.no_grad(), still_statistics(self.network):
            turned = self.network.attend(apply_symmetries(images, symmetries), maps.tau)
            returned = undo_symmetries(turned, symmetries)
            finer = scales < 2  # halves of the coarsest scale would be of none
            of_halved = self.network.attend(halve(images[finer]), maps.tau) if self.scale_equivariance else None
        terms = {
            "scale": scale_loss(scale_logits, scales),
            "smoothness": smoothness_loss(maps.attention),
            "rigid": rigid_loss(maps.attention, returned),
        }
        if of_halved is not None:
            terms["scaled"] = scale_equivariance_loss(maps.attention[finer], of_halved, scales[finer])
        return terms

    def tensors(self) -> dict[str, Any]:
        """State dicts of all parts."""
        return {
            "network": self.network.state_dict(),
            "classifier": self.classifier.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        } | ({} if self.primer is None else {"primer": self.primer.state_dict()})

    def restore(self, tensors: dict[str, Any]) -> None:
        """Go on from :meth:`tensors`."""
        self.network.load_state_dict(tensors["network"])
        self.classifier.load_state_dict(tensors["classifier"])
        self.optimiser.load_state_dict(tensors["optimiser"])
        if self.primer is not None:
            self.primer.load_state_dict(tensors["primer"])


def _summarise(terms: dict[str, Tensor], scale_logits: Tensor, scales: Tensor, maps: AttentionMaps) -> dict[str, float]:
    """What a step came to, off the device at once: terms, ``loss``, ``accuracy`` and ``tau``.

    Raises:
        ModelError: one of them is not finite.
    """
    right = (scale_logits.detach().argmax(dim=1) == scales).float().mean()
    numbers = terms | {"loss": torch.stack(list(terms.values())).sum(), "accuracy": right, "tau": maps.tau}
    values = torch.stack(list(numbers.values())).detach().tolist()
    if not all(map(math.isfinite, values)):
        raise ModelError("the training of scale attention diverged (its loss is not finite): lower --learning-rate")
    return dict(zip(numbers, values, strict=True))


def _descend(optimiser: torch.optim.Adam, loss: Tensor) -> None:
    """A step of an optimiser; parameters that the loss does not hang on stay as they are."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
