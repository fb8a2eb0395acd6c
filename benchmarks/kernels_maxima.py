"""Smoothing, local maxima, h-maxima and reconstruction: against SciPy and scikit-image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import feature, filters, morphology

from benchmarks._common import Case
from wsi_engine.kernels.maxima import local_maxima
from wsi_engine.kernels.reconstruction import reconstruct
from wsi_engine.kernels.smoothing import gaussian, local_threshold
from wsi_engine.kernels.summits import h_maxima


def cases(mask: NDArray[np.bool_], labels: NDArray[np.int32]) -> list[Case]:
    """Cases on the smoothed distance (H, W) of the labels' nuclei; the noisy mask is not used."""
    nuclei = labels > 0
    distance = ndimage.distance_transform_edt(nuclei).astype(np.float32)
    smoothed = ndimage.gaussian_filter(distance, 1)
    lowered = smoothed - np.float32(1)
    disk, numbers = morphology.disk(7), nuclei.astype(int)

    def peaks(**options: object) -> object:
        return feature.peak_local_max(smoothed, footprint=disk, exclude_border=False, **options)

    return [
        Case(
            "Gaussian, σ 1",
            "scipy.ndimage",
            2,
            lambda: gaussian(distance, 1),
            lambda: ndimage.gaussian_filter(distance, 1),
        ),
        Case("local maxima, disk 7", "skimage peak_local_max", 10, lambda: local_maxima(smoothed, 7), peaks),
        Case(
            "local maxima, disk 7, in the mask",
            "skimage peak_local_max",
            10,
            lambda: local_maxima(smoothed, 7, mask=nuclei),
            lambda: peaks(labels=numbers),
        ),
        Case(
            "h-maxima, h 1",
            "skimage h_maxima",
            50,
            lambda: h_maxima(smoothed, 1),
            lambda: morphology.h_maxima(smoothed, 1),
        ),
        Case(
            "reconstruction of the image less 1",
            "skimage reconstruction",
            20,
            lambda: reconstruct(lowered, smoothed),
            lambda: morphology.reconstruction(lowered, smoothed),
        ),
        *[
            Case(
                f"local threshold, {method}, window 151",
                "skimage threshold_local",
                2,
                lambda method=method: local_threshold(distance, 151, method=method),
                lambda method=method: filters.threshold_local(distance, 151, method=method),
            )
            for method in ("gaussian", "mean")
        ],
    ]
