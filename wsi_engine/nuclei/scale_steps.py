"""One step of training scale attention, and all that it changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


@dataclass(frozen=True, eq=False)
class ScaleTrainer:
    """F, G and the optimiser, on one device."""

    network: ScaleAttention
    classifier: ScaleClassifier
    optimiser: torch.optim.Adam
    hardware: Hardware
    scale_equivariance: bool

    @classmethod
    def create(cls, classifier: ScaleClassifier, settings: ScaleTrainingSettings, hardware: Hardware) -> ScaleTrainer:
        """Fresh F beside a classifier, moved to the device."""
        place = {"device": hardware.device, "memory_format": torch.channels_last}
        network = ScaleAttention(settings.network, seed=settings.seed).to(**place)  # type: ignore[call-overload]
        classifier = classifier.to(**place)  # type: ignore[call-overload]
        optimiser = torch.optim.Adam(
            [*network.parameters(), *classifier.parameters()],
            lr=settings.learning_rate,
            betas=(settings.beta1, 0.999),
            weight_decay=settings.weight_decay,
        )
        return cls(network, classifier, optimiser, hardware, settings.scale_equivariance)

    def step(self, batch: CropBatch) -> dict[str, float]:
        """Learn from a batch; returns the terms of the loss, their sum, the accuracy and τ.

        Raises:
            ModelError: the loss is not finite.
        """
        device = self.hardware.device
        images = normalise_pixels(torch.from_numpy(batch.pixels).to(device))
        scales = torch.from_numpy(batch.scales).to(device)
        self.network.train()
        self.classifier.train()
        with self.hardware.arithmetic():
            maps = self.network(images)
            scale_logits = self.classifier(images, maps.attention)
            terms = self._terms(images, scales, batch.symmetries, maps, scale_logits)
        loss = torch.stack(list(terms.values())).sum()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        right = (scale_logits.detach().argmax(dim=1) == scales).float().mean()
        names = [*terms, "loss", "accuracy", "tau"]
        values = torch.stack([*terms.values(), loss, right, maps.tau]).detach().tolist()
        if not all(map(math.isfinite, values)):
            raise ModelError("the training of scale attention diverged (its loss is not finite): lower --learning-rate")
        return dict(zip(names, values, strict=True))

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
        }

    def restore(self, tensors: dict[str, Any]) -> None:
        """Go on from :meth:`tensors`."""
        self.network.load_state_dict(tensors["network"])
        self.classifier.load_state_dict(tensors["classifier"])
        self.optimiser.load_state_dict(tensors["optimiser"])
