"""Labelling, filling and flooding nuclei: against SciPy and scikit-image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import remove_small_objects
from skimage.segmentation import watershed as skimage_watershed

from benchmarks._common import Case
from wsi_engine.kernels.distance import distance_transform
from wsi_engine.kernels.labels import fill_holes, label, remove_small
from wsi_engine.kernels.watersheds import watershed

SQUARE = np.ones((3, 3), bool)
DISK_7 = np.hypot(*np.mgrid[-7:8, -7:8]) <= 7


def cases(mask: NDArray[np.bool_], labels: NDArray[np.int32]) -> list[Case]:
    """Cases on a mask (H, W); the watershed is that of the post-processing, from maxima of the smoothed distance."""
    height = ndimage.gaussian_filter(distance_transform(mask), 1)
    peaks = (ndimage.maximum_filter(height, footprint=DISK_7) == height) & mask
    flipped, markers = -height, label(peaks)
    return [
        Case("label", "scipy.ndimage", 1.0, lambda: label(mask), lambda: ndimage.label(mask, SQUARE)),
        Case("fill_holes", "scipy.ndimage", 5.0, lambda: fill_holes(mask), lambda: ndimage.binary_fill_holes(mask)),
        Case(
            "remove_small, 60 px",
            "skimage remove_small_objects",
            1.0,
            lambda: remove_small(mask, 60),
            lambda: remove_small_objects(mask, max_size=59, connectivity=2),
        ),
        Case(
            "watershed",
            "skimage watershed",
            5.0,
            lambda: watershed(flipped, markers, mask),
            lambda: skimage_watershed(flipped, markers, mask=mask),
        ),
    ]
