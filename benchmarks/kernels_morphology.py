"""Morphology by disks and the distance transform: against SciPy, scikit-image and OpenCV."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import morphology

from benchmarks._common import Case
from wsi_engine.kernels.distance import distance_transform
from wsi_engine.kernels.morphology import close_disk, open_disk


def ours(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Opening and closing with a disk of 2, then of 1."""
    for radius in (2, 1):
        mask = close_disk(open_disk(mask, radius), radius)
    return mask


def by_scipy(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The same by SciPy's binary operators."""
    for radius in (2, 1):
        disk = morphology.disk(radius)
        mask = ndimage.binary_closing(ndimage.binary_opening(mask, disk), disk)
    return mask


def by_scikit_image(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The same by scikit-image; its grey operators take bool masks as well, and "min" is our border rule."""
    for radius in (2, 1):
        disk = morphology.disk(radius)
        mask = morphology.closing(morphology.opening(mask, disk, mode="min"), disk, mode="min")
    return mask


def cases(mask: NDArray[np.bool_], labels: NDArray[np.int32]) -> list[Case]:
    """Cases on a noisy mask (H, W), and for the distance on the mask of the labels (H, W)."""
    nuclei = labels > 0
    found = [
        Case("open + close, disk 2 and 1", "SciPy binary", 25, lambda: ours(mask), lambda: by_scipy(mask)),
        Case("open + close, disk 2 and 1", "scikit-image", 25, lambda: ours(mask), lambda: by_scikit_image(mask)),
        Case(
            "distance transform",
            "scipy.ndimage",
            6,
            lambda: distance_transform(nuclei),
            lambda: ndimage.distance_transform_edt(nuclei),
        ),
    ]
    try:
        import cv2  # noqa: PLC0415
    except ImportError:
        return found
    cv2.setNumThreads(1)
    bytes_ = nuclei.astype(np.uint8)
    return [
        *found,
        Case(
            "distance transform",
            "OpenCV DIST_MASK_PRECISE",
            1 / 1.3,
            lambda: distance_transform(nuclei),
            lambda: cv2.distanceTransform(bytes_, cv2.DIST_L2, cv2.DIST_MASK_PRECISE),
        ),
    ]
