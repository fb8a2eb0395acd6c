"""Batches for the student: random views of fields, restained and degraded; all in torch, all chance from one seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from wsi_engine.kernels import distance_transform
from wsi_engine.kernels.stains import EOSIN, HAEMATOXYLIN


@dataclass(frozen=True, eq=False)
class Field:
    """A picture to learn from.

    ``planes`` uint8 (6, H, W): R, G, B, foreground (0 or 255), depth (0 … 255), trust (0 … 255).
    """

    planes: NDArray[np.uint8]


def make_field(
    image: NDArray[np.uint8],
    labels: NDArray[np.int32],
    trust: NDArray[np.float32] | None = None,
) -> Field:
    """The field of an image (H, W, 3), its labels (H, W) and how far each pixel's label is trusted, 0 … 1."""
    planes = np.full((6, *labels.shape), 255, np.uint8)
    planes[:3] = image.transpose(2, 0, 1)
    planes[3] = (labels > 0) * np.uint8(255)
    planes[4] = np.clip(depth_of(labels) * 255 + 0.5, 0, 255).astype(np.uint8)
    if trust is not None:
        planes[5] = np.clip(trust * 255 + 0.5, 0, 255).astype(np.uint8)
    return Field(planes)


def depth_of(labels: NDArray[np.int32]) -> NDArray[np.float32]:
    """Distance of each pixel to the outside of its own nucleus over the greatest within it: float32 (H, W), 0 … 1."""
    inner = labels > 0
    for axis in (0, 1):
        step = np.diff(labels, axis=axis) != 0
        after = [(0, 0), (0, 0)]
        after[axis] = (0, 1)
        inner &= ~np.pad(step, after)
        after[axis] = (1, 0)
        inner &= ~np.pad(step, after)
    distance = np.asarray(distance_transform(inner), dtype=np.float32) + inner
    distance[(labels > 0) & ~inner] = 0.5
    greatest = np.zeros(int(labels.max(initial=0)) + 1, np.float32)
    np.maximum.at(greatest, labels.ravel(), distance.ravel())
    greatest[0] = 1
    return np.asarray(distance / np.maximum(greatest, 0.5)[labels], dtype=np.float32) * (labels > 0)


class Batcher:
    """Draws batches of square tiles from fields.

    Args:
        fields: at least one.
        side: of a tile in pixels.
        seed: of all chance.
        weights: how often each field is drawn, summing to 1; None: all alike.
        colour: strength of the changes of colour, 1 as in training.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        side: int,
        seed: int,
        *,
        weights: NDArray[np.float64] | None = None,
        colour: float = 1.0,
    ) -> None:
        self.fields, self.side, self.weights, self.colour = fields, side, weights, colour
        self.rng = np.random.default_rng(seed)
        self.torch_rng = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels (B, 3, S, S) 0 … 255, foreground, depth and trust (B, S, S), float32."""
        chosen = self.rng.choice(len(self.fields), count, p=self.weights)
        planes = torch.stack([self._view(self.fields[i]) for i in chosen])
        pixels = self._degrade(self._restain(planes[:, :3]))
        return pixels, (planes[:, 3] > 127).float(), planes[:, 4] / 255, planes[:, 5] / 255

    def _view(self, field: Field) -> Tensor:
        """A turned, scaled and mirrored square of a field: float32 (6, S, S)."""
        height, width = field.planes.shape[1:]
        scale = float(np.exp(self.rng.normal(0, 0.28)))
        angle = float(self.rng.uniform(0, 2 * math.pi)) if self.rng.random() < 0.5 else 0.0
        reach = int(self.side * scale * (1.5 if angle else 1.05) / 2) + 2
        cy, cx = self.rng.uniform(0, height), self.rng.uniform(0, width)
        top, left = max(0, int(cy) - reach), max(0, int(cx) - reach)
        part = torch.from_numpy(field.planes[:, top : top + 2 * reach, left : left + 2 * reach]).float()
        flip = -1.0 if self.rng.random() < 0.5 else 1.0
        turn = int(self.rng.integers(0, 4)) * math.pi / 2 + angle
        cos, sin = math.cos(turn) * self.side * scale, math.sin(turn) * self.side * scale
        high, wide = part.shape[1:]
        theta = torch.tensor(
            [
                [cos * flip / wide, -sin / wide, 2 * (cx - left) / wide - 1],
                [sin * flip / high, cos / high, 2 * (cy - top) / high - 1],
            ],
            dtype=torch.float32,
        )
        grid = functional.affine_grid(theta[None], [1, 6, self.side, self.side], align_corners=False)
        return functional.grid_sample(part[None], grid, padding_mode="reflection", align_corners=False)[0]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.torch_rng)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.torch_rng)

    def _restain(self, pixels: Tensor) -> Tensor:
        """Both stains scaled and turned in optical density, picture by picture."""
        count, amount = len(pixels), self.colour
        rows = torch.tensor(np.array([HAEMATOXYLIN, EOSIN, np.cross(HAEMATOXYLIN, EOSIN)]), dtype=torch.float32)
        rows = rows / rows.norm(dim=1, keepdim=True)
        scale = torch.exp(0.22 * amount * self._normal(count, 3, 1) + 0.15 * amount * self._normal(count, 1, 1))
        turned = rows + 0.1 * amount * self._normal(count, 3, 3)
        mix = torch.linalg.inv(rows) @ (scale * turned)  # (B, 3, 3)
        optical = -torch.log((pixels + 1).clamp(1, 256) / 256)
        shift = 0.06 * amount * self._normal(count, 3, 1, 1)
        optical = torch.einsum("bihw,bij->bjhw", optical, mix) + shift
        return (256 * torch.exp(-optical) - 1).clamp(0, 255)

    def _degrade(self, pixels: Tensor) -> Tensor:
        """Blur or sharpening, saturation, gamma and noise, picture by picture."""
        count = len(pixels)
        blurred = _blur(pixels, self._uniform(0.4, 1.4, count))
        amount = self._uniform(-1.0, 1.0, count, 1, 1, 1)  # below 0 sharpens
        pixels = pixels + torch.where(amount > 0, amount.clamp(max=1), amount * 0.7) * (blurred - pixels)
        grey = pixels.mean(1, keepdim=True)
        pixels = grey + (pixels - grey) * torch.exp(0.25 * self.colour * self._normal(count, 1, 1, 1))
        gamma = torch.exp(0.15 * self.colour * self._normal(count, 1, 1, 1))
        pixels = 255 * (pixels.clamp(0, 255) / 255 + 1e-4) ** gamma
        noise = self._normal(*pixels.shape) * self._uniform(0, 6, count, 1, 1, 1)
        return (pixels + noise).clamp(0, 255)


def _blur(pixels: Tensor, sigmas: Tensor) -> Tensor:
    """Each picture of a batch (B, 3, H, W) blurred by a Gaussian of its own deviation in pixels."""
    count, channels, height, width = pixels.shape
    places = torch.arange(-3, 4, dtype=torch.float32)
    weights = torch.exp(-0.5 * (places / sigmas[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = functional.pad(pixels.reshape(1, -1, height, width), (3, 3, 3, 3), mode="reflect")
    flat = functional.conv2d(flat, weights[:, None, None, :], groups=count * channels)
    flat = functional.conv2d(flat, weights[:, None, :, None], groups=count * channels)
    return flat.reshape(count, channels, height, width)
