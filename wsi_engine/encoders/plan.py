"""An encoder by what it is made from: small, so that it can be sent to other processes and made there."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_engine.encoders import create_encoder
from wsi_engine.encoders.base import Encoder


@dataclass(frozen=True)
class EncoderPlan:
    """What an encoder is made from.

    Attributes:
        name: of the encoder; with ``prompts`` it may be None, since they name theirs.
        weights: as in :func:`~wsi_engine.encoders.create_encoder`.
        prompts: file of the prompts, or of the tuned weights; None where there are none.
        device: where it runs.
        precision: what it computes in.
        tiles: how many tiles there are, about.
    """

    name: str | None
    weights: str | None = None
    prompts: str | None = None
    device: str = "auto"
    precision: str = "auto"
    tiles: int | None = None

    def create(self) -> Encoder:
        """Make it.

        Raises:
            EncoderError: the name is unknown, the device absent, or the prompts are of another backbone.
            WeightsError: the weights are missing, unreadable or of the wrong shape.
        """
        if self.prompts is None:
            assert self.name is not None
            return create_encoder(self.name, self.weights, self.device, self.precision, self.tiles)
        from wsi_engine.encoders.prompted import create_tuned_encoder  # noqa: PLC0415 - loads torch

        return create_tuned_encoder(self.prompts, self.name, self.weights, self.device, self.precision, self.tiles)
