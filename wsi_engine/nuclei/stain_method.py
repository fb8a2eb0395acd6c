"""The classical baseline on slides of any size: haematoxylin above its surroundings, split by distance."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.errors import SettingsError
from wsi_engine.kernels import fill_holes, gaussian, local_threshold, otsu_threshold
from wsi_engine.kernels.tallies import drop_small
from wsi_engine.nuclei.method import (
    LARGEST_HOLE_UM2,
    clean_mask,
    clean_reach,
    distance_gap,
    gaussian_reach,
    split_by_distance,
)
from wsi_engine.nuclei.stain import STAIN_MPP, StainSettings, measure_haematoxylin


class StainMethod:
    """Haematoxylin above a local threshold and near the slide's Otsu threshold; a :class:`NucleiMethod`.

    The steps of :func:`~wsi_engine.nuclei.stain.segment_by_stain`, with three differences that make a slide's nuclei
    independent of its tiles: Otsu's threshold is the slide's, a component is split without a look at the others (so
    none vanishes beside a larger one), and holes are filled up to :data:`~wsi_engine.nuclei.method.LARGEST_HOLE_UM2`.

    It runs on the processor, whatever ``device`` says.

    Source: A. C. Ruifrok and D. A. Johnston, Anal. Quant. Cytol. Histol. 23 (2001) for the stain; M. Sahasrabudhe et
    al., MICCAI 2020, section 2.4 for the post-processing.
    """

    name = "stain"
    mpp = STAIN_MPP
    detail = 1
    window_px: int | None = None

    def __init__(
        self,
        settings: StainSettings | None = None,
        weights: str | os.PathLike[str] | None = None,
        device: str = "auto",
    ) -> None:
        if weights is not None:
            raise SettingsError(f"the method stain has no weights; leave {os.fspath(weights)} out")
        self.settings = settings or StainSettings()
        self.margin_px = gaussian_reach(self.settings.sigma) + gaussian_reach((self.settings.window - 1) / 6)
        self.clean_px = clean_reach(self.settings.clean_radii)
        self.gap_px = distance_gap(self.settings.peak_radius)

    def fit(self, samples: Sequence[NDArray[np.uint8]]) -> FittedStain:
        """Find Otsu's threshold of the haematoxylin over all samples."""
        values = [gaussian(measure_haematoxylin(sample), self.settings.sigma).ravel() for sample in samples]
        joined = np.concatenate(values) if values else np.zeros(1, np.float32)
        flat = not np.ptp(joined)
        return FittedStain(self, float("inf") if flat else self.settings.share_of_otsu * otsu_threshold(joined))

    def to_json(self) -> dict[str, Any]:
        """The settings."""
        settings = asdict(self.settings)
        return settings | {
            "clean_radii": list(self.settings.clean_radii),
            "mpp": self.mpp,
            "largest_hole_um2": LARGEST_HOLE_UM2,
        }


@dataclass(frozen=True)
class FittedStain:
    """The baseline with a slide's ``least`` optical density of haematoxylin."""

    method: StainMethod
    least: float

    def foreground(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Haematoxylin above its threshold, in optical density: (N, h + 2 m, w + 2 m, 3) to (N, 1, h, w)."""
        settings, margin = self.method.settings, self.method.margin_px
        maps = []
        for window in windows:
            stain = gaussian(measure_haematoxylin(window), settings.sigma)
            over = stain - np.maximum(local_threshold(stain, settings.window), np.float32(self.least))
            maps.append(over[margin : len(over) - margin, margin : over.shape[1] - margin])
        return np.ascontiguousarray(np.stack(maps)[:, None])

    def mask(self, maps: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Where haematoxylin is above its threshold, opened and closed."""
        return clean_mask(maps[0] > 0, self.method.settings.clean_radii)

    def split(self, maps: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Divide components where the smoothed distance to their outline has several summits."""
        settings = self.method.settings
        mask = fill_holes(mask, LARGEST_HOLE_UM2 / self.method.mpp**2)
        labels = split_by_distance(mask, settings.peak_radius)
        drop_small(labels, mask, settings.least_area)
        return labels

    def to_json(self) -> dict[str, Any]:
        """The threshold."""
        return {"least_density": self.least if np.isfinite(self.least) else None}
