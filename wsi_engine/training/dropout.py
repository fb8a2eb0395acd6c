"""Dropout with cheap random numbers, for training on a CPU.

torch draws a float from its Mersenne Twister for every unit and takes 40 % of a step of CLAM for it. Here a unit costs
as many random bits as its type has (16 or 32), drawn eight bytes at a time, and the comparison and the scaling run in
place on whole registers. The method is the same: each unit is dropped independently with the share asked for (to within
2⁻¹⁶) and the others are divided by the share kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

_WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""The whole number that lies in the same bytes, by the type of the units."""


def drop_units(units: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    """Set units to 0 at random and divide the others by the share kept.

    Args:
        units: of any shape, on the CPU, float32, bfloat16 or float16.
        share: the part to drop, 0 to below 1.
        generator: where randomness comes from.
    """
    if share == 0:
        return units
    word = _WORDS[units.dtype]
    per_draw = 8 // units.element_size()
    draws = generator.integers(0, 2**64 - 1, -(-units.numel() // per_draw), np.uint64, endpoint=True)
    bits = torch.from_numpy(draws.view(np.int64)).view(word)[: units.numel()]
    width = 8 * units.element_size()
    kept = bits.ge_(round(share * 2**width) - 2 ** (width - 1))  # 1 where a unit stays, else 0
    pattern = int(torch.tensor(1 / (1 - share), dtype=units.dtype).view(word))
    return units * kept.mul_(pattern).view(units.dtype).view(units.shape)  # the bytes of 0 are those of 0.0


class CheapDropout(nn.Module):
    """:func:`drop_units` as a layer, which takes the place of ``nn.Dropout``; keeps no tensors, as that keeps none."""

    def __init__(self, share: float, source: DropoutSource) -> None:
        super().__init__()
        self.share, self.source = share, source

    def forward(self, units: Tensor) -> Tensor:
        """Any shape to the same."""
        if not self.training or self.share == 0:
            return units
        if units.device.type != "cpu" or units.dtype not in _WORDS:
            return nn.functional.dropout(units, self.share)
        return drop_units(units, self.share, self.source.generator)


class DropoutSource:
    """Where the dropout layers of a head draw from; the generator is exchanged at every epoch."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng()


@contextmanager
def cheap_dropout(head: nn.Module) -> Iterator[DropoutSource]:
    """Exchange the dropout layers of a head for the ``with`` block; names of tensors do not change."""
    source = DropoutSource()
    places = [
        (parent, name, child)
        for parent in head.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout
    ]
    try:
        for parent, name, child in places:
            setattr(parent, name, CheapDropout(child.p, source).train(child.training))
        yield source
    finally:
        for parent, name, child in places:
            setattr(parent, name, child.train(parent.training))
