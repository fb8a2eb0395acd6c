"""How well attention segments a labelled folder: for reports only, nothing is trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_engine.errors import InputError
from wsi_engine.kernels.nuclei import nuclei_from_attention
from wsi_engine.metrics.nuclei import score_nuclei
from wsi_engine.models.scale_attention import ScaleAttention, normalise_pixels
from wsi_engine.models.scale_inference import attend_windows
from wsi_engine.nuclei.scale_stains import Look, match_look, measure_look
from wsi_engine.nuclei.scoring import read_labels
from wsi_engine.readers.base import RGBImage
from wsi_engine.slide import open_slide

_IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")


@dataclass(frozen=True)
class LabelledScores:
    """Means over the pictures of a labelled folder.

    Attributes:
        images: how many.
        aji: aggregated Jaccard index.
        dice: of the foregrounds.
    """

    images: int
    aji: float
    dice: float


def list_labelled(folder: Path) -> list[tuple[Path, Path]]:
    """Pictures and their labels (``NAME_label.png``, whole numbers per pixel, 0 outside nuclei), by name.

    Raises:
        InputError: there are none.
    """
    pairs = []
    for label in sorted(folder.glob("*_label.png")):
        stem = label.name.removesuffix("_label.png")
        picture = next((p for p in (folder / (stem + ending) for ending in _IMAGES) if p.is_file()), None)
        if picture is not None:
            pairs.append((picture, label))
    if not pairs:
        raise InputError(f"{folder} holds no pair of NAME.png and NAME_label.png: name the folder of labelled images")
    return pairs


def attend_picture(
    network: ScaleAttention,
    pixels: RGBImage,
    views: int = 8,
    reference: Look | None = None,
    window: int = 512,
) -> NDArray[np.float32]:
    """Attention of a picture at the network's native scale, float32 (H, W), computed window by window.

    Args:
        network: trained, in eval mode.
        pixels: uint8 (H, W, 3).
        views: 1 to 8, see :func:`~wsi_engine.models.scale_inference.attend_views`.
        reference: the look that training brought pictures to; None where it did not.
        window: side in pixels of what is computed at a time.

    Raises:
        InputError: Macenko's stains cannot be told.
    """
    if reference is not None:
        pixels = match_look(pixels, measure_look(pixels, reference.kind), reference)
    device = network.tau.device
    out = np.empty(pixels.shape[:2], np.float32)

    def read(top: int, left: int, height: int, width: int) -> torch.Tensor:
        part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        return normalise_pixels(torch.from_numpy(part)[None].to(device))

    def keep(top: int, left: int, attention: torch.Tensor) -> None:
        height, width = attention.shape
        out[top : top + height, left : left + width] = attention.float().cpu().numpy()

    attend_windows(read, network, (pixels.shape[0], pixels.shape[1]), keep, window, views)
    return out


def score_labelled(
    network: ScaleAttention, pairs: list[tuple[Path, Path]], views: int = 1, reference: Look | None = None
) -> LabelledScores:
    """Segment each picture by attention above one half and the paper's post-processing, and compare with its labels.

    Raises:
        InputError: labels cannot be read, or are not of their picture's size.
        SlideError: a picture cannot be read.
    """
    scores = []
    for picture, label in pairs:
        with open_slide(picture, mpp=1.0) as slide:
            pixels = slide.read_region(0, 0, *slide.dimensions)
        truth = read_labels(label)
        if truth.shape != pixels.shape[:2]:
            raise InputError(f"{label} is {truth.shape} and its picture {pixels.shape[:2]}: give labels of its size")
        found = nuclei_from_attention(attend_picture(network, pixels, views, reference))
        scores.append(score_nuclei(truth, found))
    return LabelledScores(
        len(scores), float(np.mean([one.aji for one in scores])), float(np.mean([one.dice for one in scores]))
    )
