"""The contract of an encoder: a card that says what it is, and tiles in, features out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Pooling: TypeAlias = Literal["mean", "cls", "cls+mean", "token", "none"]
"""How one vector is made of a network's output.

``mean``: average over positions or tile tokens; ``cls``: the class token; ``cls+mean``: class token joined to the mean
of the tile tokens (register tokens left out); ``token``: the backbone's own pooled output; ``none``: already a vector.
"""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderCard:
    """What an encoder is, so that features can be told apart and made again.

    ``input_px`` is the side of the square the network sees (0: any size). ``resize_px`` is the side
    that a tile is resized to before the centre ``input_px`` are cut out (0: straight to ``input_px``).
    ``mpp`` is the scale it was trained at, None where its authors do not say or mixed several.
    ``weights`` says where the weights came from (``hub:…``, ``file:…``, ``random:0``, ``none``) and
    ``weights_digest`` is the SHA-256 of their values; both are empty on a card that is not loaded.
    """

    name: str
    builder: Literal["timm", "texture", "imported"]
    architecture: str
    input_px: int
    dim: int
    pooling: Pooling
    licence: str
    mpp: float | None = None
    resize_px: int = 0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    options: tuple[tuple[str, Any], ...] = ()
    gated: bool = False
    source: str = ""
    feature_names: tuple[str, ...] = field(default=(), repr=False)
    weights: str = ""
    weights_digest: str = ""

    def to_json(self) -> dict[str, Any]:
        """The card as plain JSON values; tuples become lists."""
        return asdict(self)


class Encoder(Protocol):
    """Turns batches of tiles into features. Not thread-safe: one caller at a time."""

    @property
    def card(self) -> EncoderCard:
        """What this encoder is, with the digest of its weights."""
        ...

    @property
    def precision(self) -> str:
        """Arithmetic that the features are computed in, such as ``fp32``."""
        ...

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features of a batch of RGB tiles.

        Args:
            pixels: uint8, (B, H, W, 3).

        Returns:
            float32, (B, dim); row b depends on tile b alone.
        """
        ...
