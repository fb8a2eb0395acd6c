"""What all heads share: sizes, checks of a bag, chunks of tiles, losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wsi_engine.models.heads.checks import check_count, check_flag
from wsi_engine.models.heads.errors import HeadError
from wsi_engine.models.heads.output import HeadOutput
from wsi_engine.models.heads.standard import Standard

CHUNK_TILES = 8192
"""Tiles in one step of inference: with CLAM's widths and 1,024 features about 100 MB of intermediate values."""


@dataclass(frozen=True)
class HeadSettings:
    """Base of the settings of a head: plain values that go to JSON and back.

    Attributes:
        standardise: features are turned into standard scores first, by mean and spread kept in the head.
    """

    standardise: bool = field(default=False, kw_only=True)


class Head(nn.Module):
    """A bag of tile features in, a :class:`HeadOutput` out.

    Attributes:
        name: the name that ``create_head`` knows it by.
        lowers: whether ``auto`` may compute its wide layers in a type of 16 bits: where rounding cannot turn what the
            head looks at, and speed is gained.
        in_dim: numbers per tile.
        n_classes: classes, the length of the logits.
        settings: the rest of what is needed to build it again.
        standard: what standardises features, None without ``standardise``.
        chunk_tiles: tiles taken at once in inference, so that memory stays bounded in large bags.
    """

    name: ClassVar[str]
    least_classes: ClassVar[int] = 2
    lowers: ClassVar[bool] = False

    def __init__(self, in_dim: int, n_classes: int, settings: HeadSettings) -> None:
        super().__init__()
        check_count("in_dim", in_dim)
        check_count(f"n_classes of {self.name}", n_classes, self.least_classes)
        self.in_dim = in_dim
        self.n_classes = n_classes
        check_flag("standardise", settings.standardise)
        self.settings = settings
        self.standard = Standard(in_dim) if settings.standardise else None
        self.chunk_tiles = CHUNK_TILES

    if TYPE_CHECKING:

        def __call__(self, features: Tensor) -> HeadOutput:  # noqa: D102 - nn.Module's, typed
            ...

    @property
    def options(self) -> dict[str, Any]:
        """The settings as ``create_head`` takes them."""
        return asdict(self.settings)

    def forward_bags(self, features: Tensor, lengths: Sequence[int]) -> list[HeadOutput]:
        """Several bags laid end to end.

        Args:
            features: (ΣN, D) floating.
            lengths: tiles in each bag, all at least 1, in the order of ``features``.

        Returns:
            An output per bag, the same as from a call per bag up to rounding (and up to dropout, in training).

        Raises:
            HeadError: a bag is empty, or the lengths do not add up.
        """
        self.check_features(features)
        self.check_lengths(features, lengths)
        return [self(bag) for bag in torch.split(features, list(lengths))]

    def bag_loss(self, output: HeadOutput, label: int | Tensor) -> Tensor:
        """Loss of the bag's logits alone, which early stopping watches: a scalar; cross-entropy, except for DSMIL.

        Args:
            output: what the head returned for the bag.
            label: the bag's class, 0 … C-1.
        """
        target = torch.tensor([self.check_label(label)], device=output.logits.device)
        return cross_entropy(output.logits.float()[None], target)

    def loss(self, output: HeadOutput, label: int | Tensor) -> Tensor:
        """Loss to train by: a scalar; ``bag_loss``, plus what CLAM and DSMIL add for single tiles."""
        return self.bag_loss(output, label)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(…, C) logits to probabilities: softmax, except for DSMIL."""
        return logits.float().softmax(dim=-1)

    def check_features(self, features: Tensor) -> None:
        """Refuse what is not a bag of this head.

        Raises:
            HeadError: not a floating tensor (N, D), no tiles, or D is not ``in_dim``.
        """
        if not isinstance(features, Tensor) or not features.is_floating_point():
            kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise HeadError(f"{self.name} takes a floating torch tensor of shape (tiles, {self.in_dim}), not {kind}")
        if features.ndim != 2:
            raise HeadError(
                f"{self.name} takes one bag of shape (tiles, {self.in_dim}), not a tensor of shape "
                f"{tuple(features.shape)}; give one slide at a time"
            )
        if features.shape[1] != self.in_dim:
            raise HeadError(
                f"{self.name} was built for features of {self.in_dim} numbers per tile and got {features.shape[1]}; "
                "give features of the encoder it was trained with"
            )
        if features.shape[0] == 0:
            raise HeadError(f"{self.name} got a bag of 0 tiles; leave out slides on which no tissue was found")

    def check_lengths(self, features: Tensor, lengths: Sequence[int]) -> None:
        """Refuse lengths of bags that do not divide ``features``."""
        for place, length in enumerate(lengths):
            check_count(f"the number of tiles of bag {place}", length)
        if sum(lengths) != len(features):
            raise HeadError(f"the bags are said to hold {sum(lengths)} tiles together and {len(features)} were given")

    def check_label(self, label: int | Tensor) -> int:
        """The class as a whole number.

        Raises:
            HeadError: not one number, or not one of this head's classes.
        """
        if isinstance(label, Tensor):
            if label.numel() != 1 or label.is_floating_point():
                raise HeadError(f"{self.name} takes the number of one class as label, not {tuple(label.shape)} values")
            label = int(label)
        top = max(self.n_classes, 2) - 1
        check_count("a label", label, 0)
        if label > top:
            raise HeadError(f"label {label} is not one of the {top + 1} classes (0 to {top}) of this {self.name} head")
        return label

    def chunks(self, features: Tensor) -> list[Tensor]:
        """The bag in pieces of ``chunk_tiles`` in inference; in one piece where gradients or dropout need it whole."""
        if self.training or torch.is_grad_enabled():
            return [features]
        check_count("chunk_tiles", self.chunk_tiles)
        return list(torch.split(features, self.chunk_tiles))

    def cast(self, features: Tensor) -> Tensor:
        """Features, standardised where asked, in the precision of the weights; autocast casts for each layer itself."""
        if self.standard is not None:
            features = self.standard(features)
        if torch.is_autocast_enabled(features.device.type):
            return features
        return features.to(next(self.parameters()).dtype)
