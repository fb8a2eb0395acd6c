"""Measuring and outlining labelled nuclei: against scikit-image, and OpenCV called for each label on its own box."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import regionprops_table

from benchmarks._common import Case
from wsi_engine.kernels.contours import trace_contours
from wsi_engine.kernels.regions import measure_regions

SHAPE = (
    "label",
    "area",
    "bbox",
    "centroid",
    "axis_major_length",
    "axis_minor_length",
    "eccentricity",
    "orientation",
    "perimeter",
    "area_convex",
    "solidity",
    "equivalent_diameter_area",
)
VALUES = ("intensity_mean", "intensity_std", "intensity_min", "intensity_max")


def contours_by_opencv(labels: NDArray[np.int32]) -> list[Any]:
    """Outer contour of each label, found in a mask cut out by its bounding box."""
    import cv2  # noqa: PLC0415

    contours = []
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        if box is not None:
            mask = (labels[box] == number).astype(np.uint8)
            corner = (box[1].start, box[0].start)
            contours.append(cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=corner)[0])
    return contours


def cases(mask: NDArray[np.bool_], labels: NDArray[np.int32]) -> list[Case]:
    """Cases on labels (H, W), with three channels of noise; the mask is not used."""
    channels = np.random.default_rng(0).integers(0, 256, (*labels.shape, 3), dtype=np.uint8)
    found = [
        Case(
            "measure_regions, shapes",
            "skimage regionprops_table",
            40,
            lambda: measure_regions(labels),
            lambda: regionprops_table(labels, properties=SHAPE),
        ),
        Case(
            "measure_regions, shapes and 3 channels",
            "skimage regionprops_table",
            40,
            lambda: measure_regions(labels, channels),
            lambda: regionprops_table(labels, channels, properties=SHAPE + VALUES),
        ),
    ]
    try:
        import cv2  # noqa: PLC0415
    except ImportError:
        return found
    cv2.setNumThreads(1)
    return [
        *found,
        Case(
            "trace_contours",
            "OpenCV findContours per label",
            1.0,
            lambda: trace_contours(labels),
            lambda: contours_by_opencv(labels),
        ),
        Case(
            "trace_contours, simplified by 1 px",
            "OpenCV findContours per label",
            1.0,
            lambda: trace_contours(labels, simplify=1.0),
            lambda: contours_by_opencv(labels),
        ),
    ]
