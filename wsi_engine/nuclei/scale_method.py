"""Scale attention, built in or as ``wsi train nuclei`` made it, on slides of any size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_engine.encoders.deep import choose_device
from wsi_engine.encoders.precision import arithmetic, choose_precision
from wsi_engine.errors import ModelError
from wsi_engine.memory import keep_freed_memory
from wsi_engine.models.scale_attention import SCALES_MPP, ScaleAttentionError, normalise_pixels
from wsi_engine.models.scale_files import load_scale_attention
from wsi_engine.models.scale_inference import attend_views, check_views, context_margin
from wsi_engine.nuclei.method import clean_mask, clean_reach, distance_gap, split_by_distance
from wsi_engine.nuclei.scale_stains import Look, match_look, measure_look, read_look

BUILTIN_WEIGHTS = Path(__file__).parent / "weights" / "scale_attention.safetensors"
"""Of a short training on a processor; the card beside them says which."""

WINDOW_PX = 512
"""Side of the windows without their margin: one shape for all, since a network's rounding hangs on it."""

CLEAN_RADII = (2, 1)
"""Of the openings and closings of the paper, in pixels of 0.25 µm."""

PEAK_RADIUS = 7
"""Two summits of distance closer than this are one nucleus, in pixels of 0.25 µm."""


class ScaleMethod:
    """The paper's method: attention above one half, opened and closed, split by distance; a ``NucleiMethod``.

    Args:
        weights: a file that ``wsi train nuclei`` wrote; None for the built-in ones.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        views: passes that attention is the mean of, 1–8; the paper takes 8.
        precision: a name that ``choose_precision`` knows.

    Raises:
        ModelError: the weights are missing, damaged or of another model.
        EncoderError: there is no such device, or it cannot compute in the precision.

    Source: M. Sahasrabudhe et al., "Self-supervised nuclei segmentation in histopathological images using attention",
    MICCAI 2020, sections 2.3 and 2.4.
    """

    name = "scale-attention"
    mpp = SCALES_MPP[0]
    detail = 1
    clean_px = clean_reach(CLEAN_RADII)
    gap_px = distance_gap(PEAK_RADIUS)
    window_px: int | None = WINDOW_PX

    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        device: str = "auto",
        views: int = 1,
        precision: str = "auto",
    ) -> None:
        path = Path(weights) if weights is not None else BUILTIN_WEIGHTS
        try:
            check_views(views)
            self.network, card = load_scale_attention(path)
            self.network.known_tau()
        except ScaleAttentionError as error:
            raise ModelError(str(error)) from error
        self.views = views
        self.margin_px = context_margin(self.network.settings, views)
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.network.to(self.device).to(memory_format=torch.channels_last)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.reference = _read_reference(card.get("normalisation"), path)
        self._weights = hashlib.sha256(path.read_bytes()).hexdigest()

    def fit(self, samples: Sequence[NDArray[np.uint8]]) -> FittedScale:
        """Measure the slide's look, where the network was trained on pictures brought to one."""
        if self.reference is None or not samples:
            return FittedScale(self, None)
        joined = np.concatenate([sample.reshape(-1, 1, 3) for sample in samples])
        return FittedScale(self, measure_look(joined, self.reference.kind, "the slide"))

    def to_json(self) -> dict[str, Any]:
        """Digest of the weights, and the settings."""
        return {
            "weights": self._weights,
            "mpp": self.mpp,
            "views": self.views,
            "clean_radii": list(CLEAN_RADII),
            "peak_radius": PEAK_RADIUS,
        }


def _read_reference(entry: Any, path: Path) -> Look | None:
    """The look that training brought pictures to, out of a card."""
    if entry is None:
        return None
    try:
        return read_look(entry)
    except ValueError as error:
        raise ModelError(f"the card in {path} has a damaged normalisation ({error}); train again") from error


@dataclass(frozen=True)
class FittedScale:
    """Scale attention on one slide, and its ``look`` where that is brought to another."""

    method: ScaleMethod
    look: Look | None

    def foreground(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Attention within 0–1: uint8 (N, h + 2 m, w + 2 m, 3) to float32 (N, 1, h, w)."""
        method = self.method
        margin, reference = method.margin_px, method.reference
        out = []
        for window in windows:
            pixels = window
            if self.look is not None and reference is not None:
                pixels = match_look(window, self.look, reference)
            images = normalise_pixels(torch.from_numpy(np.ascontiguousarray(pixels))[None].to(method.device))
            with arithmetic(method.precision, method.device):
                attention = attend_views(method.network, images, method.views)[0]
            out.append(attention[:, margin : attention.shape[1] - margin, margin : attention.shape[2] - margin])
        return np.asarray(torch.stack(out).float().cpu().numpy(), dtype=np.float32)

    def mask(self, maps: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Where attention is above one half, opened and closed."""
        return clean_mask(maps[0] > 0.5, CLEAN_RADII)

    def split(self, maps: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Divide components where the smoothed distance to their outline has several summits."""
        return split_by_distance(mask, PEAK_RADIUS)

    def to_json(self) -> dict[str, Any]:
        """Where and how precisely it was computed, and the slide's look."""
        where = {"device": self.method.device.type, "precision": str(self.method.precision)}
        return where | ({} if self.look is None else {"look": asdict(self.look)})
