"""What the stain says of a crop: the answer that the stain epochs of scale attention learn, without a drawn label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels import fill_holes, gaussian, otsu_threshold
from wsi_engine.nuclei.method import LARGEST_HOLE_UM2, clean_mask, clean_reach
from wsi_engine.nuclei.stain import STAIN_MPP, StainSettings, measure_haematoxylin
from wsi_engine.readers.base import RGBImage

_STAIN = StainSettings()
_BLUR_PX = 0.7
"""Of the answer, so that an outline a pixel off costs little."""


def find_least_density(crops: Sequence[RGBImage], mpp: float) -> float:
    """The optical density of haematoxylin above which pixels of a picture count as nuclei.

    A share of Otsu's threshold over all crops, as of the method ``stain``. It is the picture's and not a crop's,
    because a crop may lie between nuclei or within one.

    Args:
        crops: of one picture, uint8 (h, w, 3).
        mpp: of the crops, in µm per pixel.

    Returns:
        Infinity where all crops are of one colour.
    """
    values = np.concatenate([_smooth_stain(crop, mpp).ravel() for crop in crops])
    return _STAIN.share_of_otsu * otsu_threshold(values) if np.ptp(values) else float("inf")


def paint_stain_target(pixels: RGBImage, mpp: float, least: float) -> NDArray[np.float32]:
    """Near 1 where the stain sees a nucleus and near 0 elsewhere.

    Args:
        pixels: uint8 (H, W, 3).
        mpp: their µm per pixel; lengths of the method ``stain`` are brought to it.
        least: the picture's :func:`find_least_density`.

    Returns:
        float32 (H, W) within 0-1: the mask, opened, closed and filled, with soft outlines.
    """
    radii = [round(radius * STAIN_MPP / mpp) for radius in _STAIN.clean_radii]
    edge = clean_reach(radii)  # nuclei go on beyond the crop
    mask = clean_mask(np.pad(_smooth_stain(pixels, mpp) > least, edge, mode="edge"), [one for one in radii if one])
    mask = fill_holes(mask, LARGEST_HOLE_UM2 / mpp**2)[edge : edge + pixels.shape[0], edge : edge + pixels.shape[1]]
    return gaussian(mask.astype(np.float32), _BLUR_PX)


def _smooth_stain(pixels: RGBImage, mpp: float) -> NDArray[np.float32]:
    """Haematoxylin (H, W) in optical density, smoothed over the same micrometres at every scale."""
    return gaussian(measure_haematoxylin(pixels), _STAIN.sigma * STAIN_MPP / mpp)
