"""Nuclei of one image as labels on its own pixels: ``segment_image``, and images and labels at other scales."""

from __future__ import annotations

import math
import os
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import ScaleError, SettingsError
from wsi_engine.kernels.resample import resample_area
from wsi_engine.nuclei.frame import COARSEST_MPP, FINEST_MPP, LEAST_SIDE
from wsi_engine.nuclei.method import NucleiMethod, create_method

Labels = NDArray[np.int32]


@runtime_checkable
class ImageMethod(Protocol):
    """A :class:`~wsi_engine.nuclei.method.NucleiMethod` that looks at an image as a whole where it is given one."""

    def segment_image(self, image: NDArray[np.uint8], mpp: float) -> Labels:
        """Nuclei of an image, uint8 (H, W, 3), at ``mpp``: int32 (H, W), 0 background, nuclei 1 … n without gaps."""
        ...


def segment_image(
    image: NDArray[np.uint8],
    mpp: float | None,
    model: str | os.PathLike[str] | NucleiMethod = "builtin",
    weights: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> Labels:
    """Label every nucleus of an image.

    Unlike :func:`~wsi_engine.nuclei.segmentation.segment_nuclei` it takes the image whole, as what fits in memory may
    be: every hole is filled, thresholds and splits may look at all of it, and the network's windows are the image's
    size. A method that knows slides alone is asked as for a slide.

    Args:
        image: uint8 (H, W, 3), H&E.
        mpp: micrometres per pixel of the image, 0.1–1.2; it is resampled to the method's own scale and the labels are
            brought back to the image's pixels.
        model: as in :func:`~wsi_engine.nuclei.method.create_method`; give a method to load weights once for many
            images.
        weights: the same.
        device: the same.

    Returns:
        int32 (H, W): 0 background, nuclei 1 … n without gaps.

    Raises:
        SettingsError: the method is unknown or the image is not uint8 (H, W, 3), or too small to tell nuclei.
        ScaleError: the mpp is missing or not believable.
        ModelError: the weights are missing, damaged or of another model.
        EncoderError: there is no such device.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise SettingsError(
            f"nuclei are looked for in an image of uint8 (H, W, 3), not {image.dtype} {image.shape}; convert it to RGB"
        )
    scale = check_mpp(mpp)
    method: NucleiMethod = create_method(model, weights, device)
    if isinstance(method, ImageMethod):
        return method.segment_image(image, scale)
    from wsi_engine.nuclei.segmentation import segment_nuclei  # noqa: PLC0415 - it leads to readers of slides

    return segment_nuclei(image, method, scale, tissue=None, allow_dark=True).labels()


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
