"""Encoders that are neural networks: uint8 tiles in, float32 features out, on one device."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from wsi_engine.encoders.base import EncoderCard
from wsi_engine.encoders.precision import (
    LEAST_COSINE,
    Precision,
    arithmetic,
    choose_precision,
    least_cosine,
    lower_network,
    probe_tiles,
)
from wsi_engine.encoders.weights import digest_state, load_backbone
from wsi_engine.errors import EncoderError, SettingsError
from wsi_engine.memory import explain_memory, keep_freed_memory
from wsi_engine.workers import usable_cores

log = logging.getLogger("wsi_engine")


class DeepEncoder:
    """A network of the table or of timm, with its weights, ready to encode. One caller at a time."""

    def __init__(
        self,
        card: EncoderCard,
        weights: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        tiles: int | None = None,
    ) -> None:
        """Build the network, load its weights and move it to the device.

        A precision below fp32 is tried on tiles of real tissue first. Where its features differ from those in fp32
        (cosine below :data:`~wsi_engine.encoders.precision.LEAST_COSINE`), ``auto`` falls back to fp32 with a warning.

        Args:
            card: what to build.
            weights: None for the published weights, ``random:SEED``, or the path of a file.
            device: ``auto`` (the first CUDA device, else the CPU) or a device by torch's name, such as ``cuda:1``.
            precision: one of :data:`~wsi_engine.encoders.precision.PRECISIONS`.
            tiles: how many tiles are to be encoded, about; ``auto`` compiles for a long job.

        Raises:
            WeightsError: the weights are missing, unreadable or of the wrong shape.
            EncoderError: the device is absent or too small, or cannot compute in the precision.
        """
        self.device = choose_device(device)
        wanted = choose_precision(precision, self.device, tiles)
        if self.device.type == "cpu":
            keep_freed_memory()
            torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        backbone, self._card = self._load(card, weights)
        with self._explain_memory(f"the network {card.name} does not fit in the memory of {self.device}"):
            backbone.requires_grad_(False).to(self.device)
            backbone.to(memory_format=torch.channels_last)
        self._mean = 255 * torch.tensor(card.mean, device=self.device).view(1, 3, 1, 1)
        self._gain = 1 / (255 * torch.tensor(card.std, device=self.device).view(1, 3, 1, 1))
        self._most = sys.maxsize
        """Tiles that have been seen to fit in the device's memory at once, at most."""
        self._backbone = backbone
        self._precision = Precision()
        if wanted != self._precision:
            self._lower(wanted, fall_back=precision == "auto")

    def _load(self, card: EncoderCard, weights: str | None) -> tuple[nn.Module, EncoderCard]:
        """The network on the CPU in float32, and what it is with the digest of its weights."""
        backbone, origin = load_backbone(card, weights)
        digest = digest_state(backbone.network.state_dict())
        return backbone, dataclasses.replace(card, weights=origin, weights_digest=digest)

    @property
    def backbone(self) -> nn.Module:
        """Normalised tiles (B, 3, H, W) to features (B, dim), on the device and in the precision; not a copy."""
        return self._backbone

    @property
    def precision(self) -> str:
        """Arithmetic that the features are computed in, such as ``fp32`` or ``bf16+compile``."""
        return str(self._precision)

    def _lower(self, wanted: Precision, fall_back: bool) -> None:
        """Go to a lower precision if its features agree with fp32 on tissue."""
        reference, name = self._backbone, self._card.name
        pixels = probe_tiles(self._card.resize_px or self._card.input_px or 256)
        with self._explain_memory(f"the network {name} does not fit in the memory of {self.device}"):
            expected = self._run(pixels)
            try:
                self._backbone, self._precision = lower_network(reference, wanted), wanted
                cosine = least_cosine(self._run(pixels), expected)
            except torch._dynamo.exc.TorchDynamoException as error:
                log.warning("%s cannot be compiled here (%s); it runs uncompiled", name, type(error).__name__)
                self._backbone, self._precision = reference, Precision()
                self._lower(dataclasses.replace(wanted, compiled=False), fall_back)
                return
        if cosine >= LEAST_COSINE:
            return
        why = f"{name} in {wanted} differs from fp32 on tissue (cosine {cosine:.4f}, at least {LEAST_COSINE} is needed)"
        if not fall_back:
            raise EncoderError(f"{why}; use --precision fp32")
        log.warning("%s; it runs in fp32", why)
        self._backbone, self._precision = reference, Precision()

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
        return self.submit(pixels)()

    def submit(self, pixels: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        """Start on a batch and return at once where the device works beside the processor.

        Calling what is returned waits for the features; ``pixels`` must stay as they are until then. A CUDA device
        copies from memory of :meth:`allocate` and computes while the caller goes on; the CPU computes here.

        Raises:
            EncoderError: not even one tile fits in the memory of the device.
            SettingsError: the pixels are of another kind or shape.
        """
        self._check(pixels)
        batch = f"{len(pixels)} tiles of {pixels.shape[2]} × {pixels.shape[1]} px"
        with self._explain_memory(f"a batch of {batch} does not fit in the memory of {self.device}"):
            parts = self._run_fitting(pixels)
        return lambda: torch.cat(parts).cpu().numpy()

    def allocate(self, size: int) -> bytearray | memoryview:
        """``size`` bytes for pixels; page-locked for a CUDA device, so that copies to it need not wait."""
        if self.device.type != "cuda":
            return bytearray(size)
        pinned: NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned.data

    def _run_fitting(self, pixels: NDArray[np.uint8]) -> list[Tensor]:
        """Features in one part, or in several where the device's memory does not hold them at once."""
        while True:
            try:
                return [self._run(pixels[i : i + self._most]) for i in range(0, len(pixels), self._most)]
            except torch.OutOfMemoryError:
                if min(self._most, len(pixels)) == 1:
                    raise
                self._most = max(1, min(self._most, len(pixels)) // 2)
                torch.cuda.empty_cache()
                log.warning("%s does not fit in the memory of %s; going on with %d", "a batch", self.device, self._most)

    @torch.inference_mode()
    def _run(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(B, H, W, 3) uint8 to (B, dim) float32 on the device."""
        tiles = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
        tiles = self.prepare(tiles.to(self.device, non_blocking=True))
        with arithmetic(self._precision, self.device):
            features: Tensor = self._backbone(tiles)
        return features.float()

    def prepare(self, pixels: Tensor) -> Tensor:
        """What the network takes, resized and normalised as its card says.

        Args:
            pixels: uint8 (B, H, W, 3), on the encoder's device; square where the card fixes the size.

        Returns:
            float32 (B, 3, h, w), channels last in memory.
        """
        tiles = pixels.permute(0, 3, 1, 2).float()  # (B, 3, H, W), channels last in memory
        tiles = self._fit_size(tiles)
        tiles = tiles.sub_(self._mean).mul_(self._gain)
        return tiles.contiguous(memory_format=torch.channels_last)

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

    def _explain_memory(self, what: str) -> AbstractContextManager[None]:
        """Turn a device out of memory into one sentence."""
        return explain_memory(EncoderError, f"{what}; use a smaller batch, a smaller encoder or another device")


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
