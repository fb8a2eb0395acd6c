"""Images and label images at other scales."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SettingsError
from wsi_engine.kernels.resample import resample_area
from wsi_engine.nuclei.frame import LEAST_SIDE

Labels = NDArray[np.int32]


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
