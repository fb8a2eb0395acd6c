"""The classical baseline: colour deconvolution, two thresholds, and the post-processing of attention maps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SettingsError
from wsi_engine.kernels import gaussian, local_threshold, nuclei_from_attention, otsu_threshold, unmix_stains
from wsi_engine.kernels.stains import EOSIN, HAEMATOXYLIN

STAIN_MPP = 0.25
"""Micrometres per pixel at which the settings below are meant."""

PIGMENT = (0.27, 0.57, 0.78)
"""Density of diaminobenzidine in R, G, B (Ruifrok & Johnston 2001, table 1): the third stain, which takes the brown."""

_STAINS = np.array([HAEMATOXYLIN, EOSIN, PIGMENT])


@dataclass(frozen=True)
class StainSettings:
    """How haematoxylin becomes nuclei; lengths in pixels of 0.25 µm.

    Attributes:
        sigma: of the Gaussian that smooths the haematoxylin.
        window: side of the window of the local threshold, odd.
        share_of_otsu: haematoxylin must be above this share of the image's Otsu threshold.
        clean_radii: radii of the openings and closings of the mask.
        peak_radius: two summits of distance closer than this are one nucleus.
        least_area: nuclei of fewer pixels are left out.
    """

    sigma: float = 1.0
    window: int = 151
    share_of_otsu: float = 0.9
    clean_radii: tuple[int, ...] = (2, 1)
    peak_radius: int = 7
    least_area: int = 60

    def __post_init__(self) -> None:
        for name in ("sigma", "share_of_otsu"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise SettingsError(f"{name} must be a finite number of at least 0, not {value!r}")
        for name in ("window", "peak_radius", "least_area"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SettingsError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.window % 2 == 0:
            raise SettingsError(f"window must be odd, not {self.window}")


def measure_haematoxylin(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Concentration of haematoxylin, at least 0: uint8 (H, W, 3) to float32 (H, W), in optical density.

    Told apart from Ruifrok's eosin and brown.
    """
    return np.maximum(unmix_stains(image, _STAINS)[..., 0], 0)


def segment_by_stain(
    image: NDArray[np.uint8],
    settings: StainSettings = StainSettings(),
) -> NDArray[np.int32]:
    """Nuclei where the haematoxylin is above its surroundings and near the image's Otsu threshold.

    Args:
        image: uint8 (H, W, 3) at 0.25 µm per pixel.
        settings: thresholds.

    Returns:
        int32 (H, W): 0 background, nuclei 1 … n without gaps.
    """
    stain = gaussian(measure_haematoxylin(image), settings.sigma)
    if not np.ptp(stain):
        return np.zeros(stain.shape, np.int32)
    local = stain > local_threshold(stain, settings.window)
    mask = local & (stain > settings.share_of_otsu * otsu_threshold(stain))
    return nuclei_from_attention(
        mask,
        clean_radii=settings.clean_radii,
        peak_radius=settings.peak_radius,
        fill=True,
        min_area=settings.least_area,
    )
