"""The student on one image: maps from the network, nuclei from the maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from wsi_engine.encoders.precision import arithmetic, choose_precision, lower_network
from wsi_engine.errors import SettingsError
from wsi_engine.kernels import gaussian, h_maxima, label, watershed
from wsi_engine.kernels.components import find_components, paint_components
from wsi_engine.kernels.labels import find_holes
from wsi_engine.kernels.openings import open_labels
from wsi_engine.kernels.tallies import copy_runs, mark_owners, renumber_labels, tally_labels
from wsi_engine.memory import keep_freed_memory
from wsi_engine.models.nuclei_net import NucleiNet

STRIP = 1024
"""Rows and columns of an image that go through the network at a time, in pixels of its scale."""


VIEWS = 2
"""Turned views of an image that the maps are the mean of, unless asked otherwise: twice the time, a little better."""


@dataclass(frozen=True)
class SplitSettings:
    """How maps become nuclei; lengths in micrometres, so that they mean the same at every scale.

    Attributes:
        threshold: a pixel belongs to a nucleus where its probability is above this.
        sigma_um: of the Gaussian that smooths the depth, in µm.
        rise: two summits of depth are two nuclei where the way between them descends by this much, 0 … 1.
        least_score: nuclei whose mean probability is less are left out.
        least_area_um2: smaller nuclei are left out, in µm².
        opening: nuclei lose what a disk of this share of their inscribed radius does not reach: tails and thorns.
    """

    threshold: float = 0.65
    sigma_um: float = 0.35
    rise: float = 0.15
    least_score: float = 0.78
    least_area_um2: float = 4.0
    opening: float = 0.4

    def __post_init__(self) -> None:
        for name, low, high in (
            ("threshold", 0, 1),
            ("sigma_um", 0, 50),
            ("rise", 1e-6, 1),
            ("least_score", 0, 1),
            ("least_area_um2", 0, 1e6),
            ("opening", 0, 1),
        ):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
                raise SettingsError(f"{name} must be a number within {low}–{high}, not {value!r}")


class StudentPredictor:
    """A network made ready for inference.

    Args:
        network: trained.
        device: where it runs.
        precision: a name that ``choose_precision`` knows; auto is the fastest that the device computes in natively.
        views: turned and mirrored views that the maps are the mean of, 1–8.

    Raises:
        SettingsError: ``views`` is out of range or there is no such precision.
        EncoderError: the device cannot compute in it.
    """

    def __init__(
        self, network: NucleiNet, device: str | torch.device = "cpu", precision: str = "auto", views: int = VIEWS
    ) -> None:
        if views not in range(1, 9):
            raise SettingsError(f"views must be a whole number within 1–8, not {views!r}")
        self.device = torch.device(device)
        self.precision = choose_precision(precision, self.device)
        self.stride, self.reach, self.views = network.stride, network.reach, views
        self.network: nn.Module = lower_network(network.eval(), self.precision).to(self.device).eval()
        if self.device.type == "cpu":
            keep_freed_memory()

    @torch.inference_mode()
    def predict_maps(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probability of being in a nucleus, and depth below its outline: float32 (2, H, W), about 0 … 1.

        Args:
            image: uint8 (H, W, 3) at the network's mpp, of any size; the image is continued by its mirror image.
        """
        height, width = image.shape[:2]
        margin = -(-self.reach // self.stride) * self.stride
        padded = _mirror(image, margin, self.stride)
        out = np.empty((2, *padded.shape[:2]), np.float32)
        step = STRIP
        for top in range(margin, padded.shape[0] - margin, step):
            for left in range(margin, padded.shape[1] - margin, step):
                bottom, right = min(top + step, padded.shape[0] - margin), min(left + step, padded.shape[1] - margin)
                part = padded[top - margin : bottom + margin, left - margin : right + margin]
                pixels = torch.from_numpy(part.copy()).to(self.device).permute(2, 0, 1)[None]
                maps = average_views([view_maps(self, pixels, view) for view in range(self.views)])[0].cpu().numpy()
                out[:, top:bottom, left:right] = maps[:, margin : margin + bottom - top, margin : margin + right - left]
        return np.ascontiguousarray(out[:, margin : margin + height, margin : margin + width])


@torch.inference_mode()
def view_maps(predictor: StudentPredictor, pixels: Tensor, view: int) -> Tensor:
    """Probability and depth from one turned view, turned back.

    Args:
        predictor: of the student.
        pixels: uint8 (B, 3, S, S) on its device, S a multiple of the network's stride.
        view: 0–7: quarter turns, from 4 on of the mirror image.

    Returns:
        float32 (B, 2, S, S).
    """
    turned = torch.rot90(pixels, view % 4, (2, 3))
    turned = turned.flip(3) if view >= 4 else turned
    with arithmetic(predictor.precision, predictor.device):
        out = predictor.network(turned.float().contiguous(memory_format=torch.channels_last)).float()
    out = out.flip(3) if view >= 4 else out
    out = torch.rot90(out, -(view % 4), (2, 3))
    return torch.cat([torch.sigmoid(out[:, :1]), out[:, 1:]], dim=1)


def average_views(maps: Sequence[Tensor]) -> Tensor:
    """Mean of the maps of several views, added up in their order."""
    total = torch.zeros_like(maps[0])
    for one in maps:
        total = total + one
    return total / len(maps)


def _mirror(image: NDArray[np.uint8], margin: int, stride: int) -> NDArray[np.uint8]:
    """The image with ``margin`` pixels around it, and as many more below and right as the stride asks for."""
    height, width = image.shape[:2]
    sides = ((margin, margin + -height % stride), (margin, margin + -width % stride), (0, 0))
    return np.pad(image, sides, mode="symmetric")


def enlarge_maps(maps: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Maps (2, h, w) interpolated linearly to (2, height, width)."""
    if maps.shape[1:] == (height, width):
        return maps
    grown = functional.interpolate(torch.from_numpy(maps)[None], size=(height, width), mode="bilinear")
    return np.asarray(grown[0].numpy(), dtype=np.float32)


def split_nuclei(
    maps: NDArray[np.float32],
    mpp: float,
    settings: SplitSettings = SplitSettings(),
    mask: NDArray[np.bool_] | None = None,
    largest_hole_um2: float = math.inf,
) -> NDArray[np.int32]:
    """Nuclei of the maps of an image.

    What is above the threshold is nucleus; it is divided by a watershed of the smoothed depth from its summits, and
    each part is opened by a disk in proportion to it.

    Args:
        maps: float32 (2, H, W): probability and depth.
        mpp: micrometres per pixel of the maps.
        settings: thresholds.
        mask: bool (H, W), where the probability is above the threshold; None finds it.
        largest_hole_um2: larger holes are emptied again in the end: they lie between nuclei, not in them.

    Returns:
        int32 (H, W): 0 background, nuclei 1 … n without gaps.
    """
    mask = maps[0] > settings.threshold if mask is None else mask
    filled, wide = _fill_holes(mask, largest_hole_um2 / mpp**2)
    inside = find_components(filled, 8)
    if not inside.count:
        return np.zeros(mask.shape, np.int32)
    depth = np.zeros(mask.shape, np.float32)
    copy_runs(inside.runs, gaussian(maps[1], settings.sigma_um / mpp), depth)
    summits = h_maxima(depth, settings.rise, threshold=settings.rise)  # what is lower has no summit of its own
    summits &= filled
    seen = np.zeros(inside.count + 1, np.bool_)
    mark_owners(inside.runs, inside.owner, summits, seen)
    paint_components(inside, ~seen, summits)  # what has no summit is one nucleus
    labels = watershed(np.negative(depth, out=depth), label(summits), filled)
    renumber_labels(wide, np.zeros(int(labels.max()) + 1, np.int32), labels)
    open_labels(labels, inside.runs, settings.opening)
    _drop_doubtful(labels, inside.runs, maps[0], mpp, settings)
    return labels


def _fill_holes(mask: NDArray[np.bool_], most: float) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """The mask with all holes filled, and the runs (R, 3) of those with more than ``most`` pixels."""
    components, holes = find_holes(mask)
    filled = mask.copy()
    paint_components(components, holes, filled)
    return filled, components.runs[(holes & (components.areas() > most))[components.owner]]


def _drop_doubtful(
    labels: NDArray[np.int32],
    runs: NDArray[np.int32],
    score: NDArray[np.float32],
    mpp: float,
    settings: SplitSettings,
) -> None:
    """Clear labels that are small or unlikely, and number the others 1 … n."""
    count = int(labels.max()) + 1
    sizes, totals = np.zeros(count, np.int64), np.zeros(count)
    tally_labels(runs, labels, score, sizes, totals)
    least = max(settings.least_area_um2 / mpp**2, 1)
    kept = (totals / np.maximum(sizes, 1) >= settings.least_score) & (sizes >= least)
    kept[0] = False
    renumber_labels(runs, np.where(kept, np.cumsum(kept), 0).astype(np.int32), labels)
