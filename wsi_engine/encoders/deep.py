"""Encoders that are neural networks: uint8 tiles in, float32 features out, on one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from wsi_engine.encoders.base import EncoderCard
from wsi_engine.encoders.weights import digest_state, load_backbone
from wsi_engine.errors import EncoderError, SettingsError

PRECISIONS = ("auto", "fp32")


class DeepEncoder:
    """A network of the table or of timm, with its weights, ready to encode. One caller at a time."""

    def __init__(
        self, card: EncoderCard, weights: str | None = None, device: str = "auto", precision: str = "auto"
    ) -> None:
        """Build the network, load its weights and move it to the device.

        Args:
            card: what to build.
            weights: None for the published weights, ``random:SEED``, or the path of a file.
            device: ``auto`` (the first CUDA device, else the CPU) or a device by torch's name, such as ``cuda:1``.
            precision: ``fp32``, or ``auto``, which is fp32 on every device so far.

        Raises:
            WeightsError: the weights are missing, unreadable or of the wrong shape.
            EncoderError: the device is absent or too small.
        """
        self.device = choose_device(device)
        self.precision = choose_precision(precision)
        backbone, origin = load_backbone(card, weights)
        digest = digest_state(backbone.network.state_dict())
        self._card = dataclasses.replace(card, weights=origin, weights_digest=digest)
        with self._explain_memory(f"The network {card.name} does not fit in the memory of {self.device}"):
            backbone.requires_grad_(False).to(self.device)
            backbone.to(memory_format=torch.channels_last)
        self._backbone = backbone
        self._mean = torch.tensor(card.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(card.std, device=self.device).view(1, 3, 1, 1)

    @property
    def card(self) -> EncoderCard:
        """What this encoder is, with the digest of its weights."""
        return self._card

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features of a batch of RGB tiles.

        Args:
            pixels: uint8, (B, H, W, 3); square where the card fixes the size that the network sees.

        Returns:
            float32, (B, dim); row b depends on tile b alone.

        Raises:
            EncoderError: the batch does not fit in the memory of the device.
            SettingsError: the pixels are of another kind or shape.
        """
        self._check(pixels)
        batch = f"{len(pixels)} tiles of {pixels.shape[2]} × {pixels.shape[1]} px"
        with self._explain_memory(f"A batch of {batch} does not fit in the memory of {self.device}"):
            features = self._run(pixels)
        return features.cpu().numpy()

    @torch.inference_mode()
    def _run(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(B, H, W, 3) uint8 to (B, dim) float32 on the device."""
        tiles = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(self.device)
        tiles = tiles.permute(0, 3, 1, 2).float()  # (B, 3, H, W), channels last in memory
        tiles = self._fit_size(tiles)
        tiles = tiles.div_(255).sub_(self._mean).div_(self._std)
        # A lower precision belongs here: autocast around the backbone alone, its output brought back to float32.
        with _plain_float32(self.device):
            features: Tensor = self._backbone(tiles.contiguous(memory_format=torch.channels_last))
        return features.float()

    def _fit_size(self, tiles: Tensor) -> Tensor:
        """Resize and centre-crop to the size the network sees; tiles of that size stay untouched."""
        card = self._card
        if card.input_px == 0:
            return tiles
        tiles = resize_tiles(tiles, card.resize_px or card.input_px, card.interpolation)
        margin = (tiles.shape[-1] - card.input_px) // 2
        return tiles[..., margin : margin + card.input_px, margin : margin + card.input_px]

    def _check(self, pixels: NDArray[np.uint8]) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise SettingsError(f"tiles are uint8 of shape (B, H, W, 3), not {pixels.dtype} of shape {pixels.shape}")
        if self._card.input_px and pixels.shape[1] != pixels.shape[2]:
            size = f"{pixels.shape[2]} × {pixels.shape[1]}"
            raise SettingsError(f"encoder {self._card.name} takes square tiles, not tiles of {size} px")

    @contextmanager
    def _explain_memory(self, what: str) -> Iterator[None]:
        """Turn a device out of memory into one sentence."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise EncoderError(f"{what}; use a smaller batch, a smaller encoder or another device") from error
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            raise EncoderError(f"{what}; use a smaller batch, a smaller encoder or another device") from error


def resize_tiles(tiles: Tensor, side: int, filter_name: Literal["bilinear", "bicubic"]) -> Tensor:
    """Resize square tiles with antialiasing, as Pillow does: rows first, each pass rounded to whole grey values.

    The published networks were trained on tiles that Pillow resized, and its rounding between the passes
    clips overshoot at sharp edges.

    Args:
        tiles: float, (B, 3, H, H), values 0 to 255.
        side: side of the result in pixels.
        filter_name: the filter.

    Returns:
        float, (B, 3, side, side), whole numbers 0 to 255; ``tiles`` itself where the side is right already.
    """
    height = tiles.shape[-1]
    for size in ((height, side), (side, side)):
        if tiles.shape[-2:] != size:
            tiles = interpolate(tiles, size=size, mode=filter_name, antialias=True, align_corners=False)
            tiles = tiles.add_(0.5).floor_().clamp_(0, 255)  # halves go up, as in Pillow
    return tiles


def choose_device(device: str) -> torch.device:
    """The torch device of a name; ``auto`` is the first CUDA device, or the CPU.

    Raises:
        EncoderError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EncoderError(f"device {device!r} is not available here; use `--device auto` or `--device cpu`") from error
    return chosen


def choose_precision(precision: str) -> str:
    """The precision of a name; ``auto`` is fp32."""
    if precision not in PRECISIONS:
        raise SettingsError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    return "fp32"


@contextmanager
def _plain_float32(device: torch.device) -> Iterator[None]:
    """Full float32 in convolutions: cuDNN would otherwise round their inputs to ten bits (TF32)."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before
