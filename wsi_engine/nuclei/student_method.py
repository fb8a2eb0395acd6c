"""The student network on slides of any size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from wsi_engine.encoders.deep import choose_device
from wsi_engine.errors import ModelError
from wsi_engine.models.nuclei_net import NucleiNetError, load_nuclei_net
from wsi_engine.nuclei.method import LARGEST_HOLE_UM2, gaussian_reach
from wsi_engine.nuclei.student_inference import (
    VIEWS,
    SplitSettings,
    StudentPredictor,
    average_views,
    split_nuclei,
    view_maps,
)

BUILTIN_WEIGHTS = Path(__file__).parent / "weights" / "student.safetensors"
"""The student's weights that come with the engine; the model card lies beside them."""

WINDOW_PX, LARGE_WINDOW_PX = 512, 1024
"""Side of the windows without their margin: one shape for all, since a network's rounding hangs on it. The large one is
for networks whose margin is above a sixth of the small one, so that margins do not take most of the time."""

_CUDA_WINDOWS = 8
"""Windows that a GPU takes at a time, always so many."""


class StudentMethod:
    """A small network taught by painted tissue and unlabelled pictures; a :class:`~.method.NucleiMethod`.

    Its maps are enlarged twofold before they are cut, so that outlines are finer than the network's pixels. Holes are
    filled up to :data:`~wsi_engine.nuclei.method.LARGEST_HOLE_UM2` alone, so that a ring of touching nuclei keeps its
    lumen.

    Args:
        weights: a file; None for the built-in ones.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        settings: how maps become nuclei.
        precision: a name that ``choose_precision`` knows.
        views: turned views that the maps are the mean of, 1–8.

    Raises:
        ModelError: the weights are missing, damaged or of another model.
        EncoderError: there is no such device, or it cannot compute in the precision.
        SettingsError: ``views`` is out of range, or there is no such precision.
    """

    name = "student"
    detail = 2
    clean_px = 0

    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        device: str = "auto",
        settings: SplitSettings | None = None,
        precision: str = "auto",
        views: int = VIEWS,
    ) -> None:
        path = Path(weights) if weights is not None else BUILTIN_WEIGHTS
        try:
            network, card = load_nuclei_net(path)
        except NucleiNetError as error:
            raise ModelError(str(error)) from error
        self.settings, self.mpp = settings or SplitSettings(), float(card["mpp"])
        self.predictor = StudentPredictor(network, choose_device(device), precision, views)
        stride, enlarging = network.stride, 1
        self.margin_px = -(-(network.reach + enlarging) // stride) * stride
        self.window_px: int | None = WINDOW_PX if 6 * self.margin_px <= WINDOW_PX else LARGE_WINDOW_PX
        self.gap_px = 1 + gaussian_reach(self.settings.sigma_um / self.fine_mpp)
        self._weights = hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def fine_mpp(self) -> float:
        """Micrometres per pixel of the maps."""
        return self.mpp / self.detail

    def fit(self, samples: Sequence[NDArray[np.uint8]]) -> FittedStudent:
        """Nothing adapts to the slide."""
        return FittedStudent(self)

    def to_json(self) -> dict[str, Any]:
        """Digest of the weights, and the settings."""
        return {
            "weights": self._weights,
            "mpp": self.mpp,
            "views": self.predictor.views,
            "split": asdict(self.settings),
            "largest_hole_um2": LARGEST_HOLE_UM2,
        }


@dataclass(frozen=True)
class FittedStudent:
    """The student on one slide."""

    method: StudentMethod

    def foreground(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probability and depth: uint8 (N, h + 2 m, w + 2 m, 3) to float32 (N, 2, 2 h, 2 w), about 0 … 1."""
        predictor, method = self.method.predictor, self.method
        if predictor.device.type == "cpu":
            maps = _map_on_cpu(predictor, windows)
        else:
            maps = _map_in_batches(predictor, windows)
        return np.concatenate([_enlarge(some, method.margin_px, method.detail).cpu().numpy() for some in maps])

    def mask(self, maps: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Where the probability is above the threshold."""
        return np.asarray(maps[0] > self.method.settings.threshold)

    def split(self, maps: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Divide components by a watershed of their depth."""
        return split_nuclei(maps, self.method.fine_mpp, self.method.settings, mask, LARGEST_HOLE_UM2)

    def to_json(self) -> dict[str, Any]:
        """Where and how precisely it was computed."""
        predictor = self.method.predictor
        return {"device": predictor.device.type, "precision": str(predictor.precision)}


def _map_in_batches(predictor: StudentPredictor, windows: NDArray[np.uint8]) -> list[Tensor]:
    """Maps of windows, batches of one size at a time."""
    out = []
    for start in range(0, len(windows), _CUDA_WINDOWS):
        some = windows[start : start + _CUDA_WINDOWS]
        filled = np.concatenate([some, np.zeros((_CUDA_WINDOWS - len(some), *some.shape[1:]), np.uint8)])
        pixels = torch.from_numpy(filled).permute(0, 3, 1, 2).to(predictor.device)
        out.append(average_views([view_maps(predictor, pixels, view) for view in range(predictor.views)])[: len(some)])
    return out


def _map_on_cpu(predictor: StudentPredictor, windows: NDArray[np.uint8]) -> list[Tensor]:
    """Maps of windows, each view by one thread: threads that share a convolution wait for each other at every layer."""
    threads, views = torch.get_num_threads(), predictor.views
    pixels = [torch.from_numpy(window).permute(2, 0, 1)[None] for window in windows]
    tasks = [(one, view) for one in pixels for view in range(views)]
    try:
        with ThreadPoolExecutor(min(threads, len(tasks)), "nuclei-maps", torch.set_num_threads, (1,)) as pool:
            maps = list(pool.map(lambda task: view_maps(predictor, *task), tasks))
    finally:
        torch.set_num_threads(threads)  # the number holds for threads to come as well
    return [average_views(maps[start : start + views]) for start in range(0, len(maps), views)]


def _enlarge(maps: Tensor, margin: int, detail: int) -> Tensor:
    """Maps (B, C, h + 2 m, w + 2 m) without their margin, interpolated linearly: (B, C, d · h, d · w)."""
    edge = margin - 1  # interpolation looks at the next pixel
    inner = maps[..., edge : maps.shape[2] - edge, edge : maps.shape[3] - edge]
    grown = functional.interpolate(inner, scale_factor=float(detail), mode="bilinear", align_corners=False)
    return grown[..., detail : grown.shape[2] - detail, detail : grown.shape[3] - detail]
