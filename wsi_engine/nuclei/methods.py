"""Methods that find nuclei in one image: each takes the image at a scale of its own and gives a label image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import ModelError, ScaleError, SettingsError
from wsi_engine.kernels.resample import resample_area
from wsi_engine.nuclei.stain import STAIN_MPP, segment_by_stain

if TYPE_CHECKING:
    from wsi_engine.nuclei.student_inference import StudentPredictor

Labels = NDArray[np.int32]
Segment = Callable[[NDArray[np.uint8], float, str | Path | None], Labels]

BUILTIN_WEIGHTS = Path(__file__).parent / "weights" / "student.safetensors"
"""The student's weights that come with the engine; the model card lies beside them."""

LEAST_SIDE = 32
"""Fewest rows and columns, at the method's own scale, from which nuclei are told."""

FINEST_MPP, COARSEST_MPP = 0.1, 1.2
"""Micrometres per pixel of images that the methods take: at coarser ones a nucleus is a few pixels."""


@dataclass(frozen=True)
class Method:
    """A way to find nuclei.

    Attributes:
        name: as the user calls it.
        summary: in one line.
        segment: from an image of any mpp, that mpp and a file of weights (None: the built-in ones) to labels.
    """

    name: str
    summary: str
    segment: Segment


def segment_image(
    image: NDArray[np.uint8], mpp: float | None, method: str = "student", weights: str | Path | None = None
) -> Labels:
    """Label every nucleus of an image.

    Args:
        image: uint8 (H, W, 3), H&E.
        mpp: micrometres per pixel of the image, 0.1–1.2; it is resampled to the method's own scale and the labels are
            brought back to the image's pixels.
        method: a name of :data:`METHODS`.
        weights: a file for a method that has weights; None: the built-in ones.

    Returns:
        int32 (H, W): 0 background, nuclei 1 … n without gaps.

    Raises:
        SettingsError: the method is unknown or the image is not uint8 (H, W, 3), or too small to tell nuclei.
        ScaleError: the mpp is missing or not believable.
        ModelError: the weights are missing, damaged or of another model.
    """
    if method not in METHODS:
        raise SettingsError(f"the method {method!r} is unknown; use one of {', '.join(METHODS)}")
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise SettingsError(
            f"nuclei are looked for in an image of uint8 (H, W, 3), not {image.dtype} {image.shape}; convert it to RGB"
        )
    return METHODS[method].segment(image, check_mpp(mpp), weights)


def check_mpp(mpp: float | None) -> float:
    """The mpp of an image, if it can be used; ``ScaleError`` otherwise."""
    if mpp is None:
        raise ScaleError("the micrometres per pixel of the image are not known; give them with mpp (--slide-mpp)")
    if not (isinstance(mpp, int | float) and math.isfinite(mpp) and FINEST_MPP <= mpp <= COARSEST_MPP):
        raise ScaleError(
            f"nuclei are looked for at {FINEST_MPP}–{COARSEST_MPP} µm per pixel, not {mpp!r}; "
            "check the mpp or give a finer level"
        )
    return float(mpp)


def resample_image(image: NDArray[np.uint8], mpp: float, to_mpp: float) -> NDArray[np.uint8]:
    """The image at another mpp: area means downwards, linear upwards; sides are rounded to whole pixels.

    Raises:
        SettingsError: a side would be shorter than 32 pixels.
    """
    height, width = (max(1, round(side * mpp / to_mpp)) for side in image.shape[:2])
    if min(height, width) < LEAST_SIDE:
        raise SettingsError(
            f"the image of {image.shape[1]} × {image.shape[0]} pixels at {mpp:g} µm is {width} × {height} pixels at "
            f"{to_mpp:g} µm, and nuclei are told from {LEAST_SIDE} on; give a larger image"
        )
    if (height, width) == image.shape[:2]:
        return np.ascontiguousarray(image)
    return resample_area(
        np.ascontiguousarray(image), 0.0, 0.0, image.shape[1] / width, image.shape[0] / height, width, height
    )


def resample_labels(labels: Labels, height: int, width: int) -> Labels:
    """Labels at another size: each pixel takes the label at its centre; ids stay without gaps.

    Nuclei that no centre falls into are left out.
    """
    if labels.shape == (height, width):
        return labels
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(np.intp)
    taken = labels[rows[:, None], columns[None]]
    present = np.bincount(taken.ravel(), minlength=int(labels.max(initial=0)) + 1) > 0
    present[0] = False
    lookup = np.where(present, np.cumsum(present), 0).astype(np.int32)
    return np.asarray(lookup[taken], dtype=np.int32)


def _segment_by_stain(image: NDArray[np.uint8], mpp: float, weights: str | Path | None) -> Labels:
    if weights is not None:
        raise SettingsError(f"the method stain has no weights; leave {weights} out or use the method student")
    labels = segment_by_stain(resample_image(image, mpp, STAIN_MPP))
    return resample_labels(labels, *image.shape[:2])


def _segment_by_student(image: NDArray[np.uint8], mpp: float, weights: str | Path | None) -> Labels:
    from wsi_engine.nuclei.student_inference import SplitSettings, enlarge_maps, split_nuclei  # noqa: PLC0415 - torch

    predictor, own_mpp = load_student(weights)
    maps = predictor.predict_maps(resample_image(image, mpp, own_mpp))
    height, width = image.shape[:2]
    if mpp >= own_mpp / 2:  # finer outlines than these are not in the maps
        return split_nuclei(enlarge_maps(maps, height, width), mpp, SplitSettings())
    return resample_labels(split_nuclei(maps, own_mpp, SplitSettings()), height, width)


@cache
def _load(path: Path, stamp: float) -> tuple[StudentPredictor, float]:
    """A predictor and its mpp; ``stamp``, the file's time, so that a replaced file is read again."""
    from wsi_engine.models.nuclei_net import NucleiNetError, load_nuclei_net  # noqa: PLC0415 - torch
    from wsi_engine.nuclei.student_inference import StudentPredictor  # noqa: PLC0415

    try:
        network, card = load_nuclei_net(path)
    except NucleiNetError as error:
        raise ModelError(str(error)) from error
    return StudentPredictor(network), float(card["mpp"])


def load_student(weights: str | Path | None = None) -> tuple[StudentPredictor, float]:
    """The student ready for inference, and the mpp it works at; the built-in one where no file is given.

    Raises:
        ModelError: the weights are missing, damaged or of another model.
    """
    path = Path(weights) if weights is not None else BUILTIN_WEIGHTS
    return _load(path, path.stat().st_mtime if path.is_file() else 0.0)


METHODS: dict[str, Method] = {
    "student": Method("student", "a small network taught by painted tissue and unlabelled images", _segment_by_student),
    "stain": Method("stain", "colour deconvolution, thresholds and watershed", _segment_by_stain),
}
"""Every method by name; the first is the default."""
