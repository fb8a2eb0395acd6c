"""Tiles of a bag that is gone through twice: blocks of uint8 pixels, cut into chunks and normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_engine.models.prompt import PromptError

Pixels: TypeAlias = Tensor | NDArray[np.uint8]
Tiles: TypeAlias = Pixels | Iterable[Pixels] | Callable[[], Iterable[Pixels]]
"""uint8 (N, H, W, 3), or blocks of such tiles in the bag's order. A sequence is gone through twice, so it may hold the
tiles compressed; a callable is called for each pass; what can be read only once, such as a stream, is kept as it comes.
"""


@dataclass(frozen=True)
class Normalise:
    """uint8 tiles to what a network takes: values of 0 to 1, less ``mean``, over ``std``; ImageNet's by default."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(n, H, W, 3) uint8 to (n, 3, H, W) float32, channels last in memory, on the same device."""
        mean = 255 * torch.tensor(self.mean, device=pixels.device).view(1, 3, 1, 1)
        gain = 1 / (255 * torch.tensor(self.std, device=pixels.device).view(1, 3, 1, 1))
        return pixels.permute(0, 3, 1, 2).float().sub_(mean).mul_(gain)


class _Kept:
    """Blocks that can be read once, kept for the next time as they come."""

    def __init__(self, blocks: Iterable[Pixels]) -> None:
        self._rest = iter(blocks)
        self._kept: list[Pixels] = []

    def __iter__(self) -> Iterator[Pixels]:
        yield from self._kept
        for block in self._rest:
            self._kept.append(block)
            yield block


@dataclass(frozen=True)
class _Called:
    """Blocks that a callable gives anew."""

    call: Callable[[], Iterable[Pixels]]

    def __iter__(self) -> Iterator[Pixels]:
        return iter(self.call())


def hold_blocks(tiles: Tiles) -> Iterable[Pixels]:
    """The blocks of a bag, to be gone through twice."""
    if isinstance(tiles, Tensor | np.ndarray):
        return [tiles]
    if isinstance(tiles, Sequence):
        return tiles
    return _Called(tiles) if callable(tiles) else _Kept(tiles)


def cut_blocks(blocks: Iterable[Pixels], chunk: int) -> Iterator[Tensor]:
    """Chunks of at most so many tiles: (n, H, W, 3) uint8, not copied."""
    for block in blocks:
        kind, shape = getattr(block, "dtype", type(block).__name__), tuple(getattr(block, "shape", ()))
        if kind not in {torch.uint8, np.dtype(np.uint8)} or len(shape) != 4 or shape[3] != 3:
            raise PromptError(f"tiles are uint8 of shape (n, H, W, 3), not {kind} of shape {shape}")
        for start in range(0, len(block), chunk):
            pixels = block[start : start + chunk]
            yield pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.require(pixels, requirements=["W"]))
