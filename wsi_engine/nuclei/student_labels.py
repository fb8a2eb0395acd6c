"""Labels that nobody drew: nuclei on which stain and student agree, with a trust for each pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from wsi_engine.errors import SettingsError
from wsi_engine.kernels import dilate, erode, gaussian, measure_regions
from wsi_engine.nuclei.images import resample_image, resample_labels
from wsi_engine.nuclei.stain import STAIN_MPP, StainSettings, measure_haematoxylin, segment_by_stain
from wsi_engine.nuclei.student_inference import SplitSettings, split_nuclei

Labels = NDArray[np.int32]
Floats = NDArray[np.float32]

_RING_UM = 2.0
"""How far from a nucleus its surroundings reach, in µm."""


_SPLIT = SplitSettings(threshold=0.5, rise=0.1, least_score=0.6, opening=0)
"""How a teacher's maps are cut: more generously than for a user, since what is in doubt is weighed afterwards."""


@dataclass(frozen=True)
class TrustSettings:
    """What makes a nucleus believable, and how far each kind of pixel is trusted, 0 … 1.

    Attributes:
        least_solidity: area over convex area of a nucleus.
        least_um2, greatest_um2: area of a nucleus.
        sure: mean probability from which the student's word alone makes a nucleus; above 1: never.
        unsure: probability from which the student's word makes ground without stain doubtful.
        doubtful: trust of such ground, and of nuclei on which the two disagree.
        rim: trust of the outlines.
        least_contrast: haematoxylin of a nucleus above its surroundings', as a share of the image's median; what the
            student sees with less than that is taken for ground.
        flat: trust of such ground.
        least_seen: mean probability from which the word of the stain alone makes a nucleus.
    """

    least_solidity: float = 0.88
    least_um2: float = 8.0
    greatest_um2: float = 300.0
    sure: float = 0.8
    unsure: float = 0.4
    doubtful: float = 0.0
    rim: float = 0.5
    least_contrast: float = 0.3
    flat: float = 0.5
    least_seen: float = 0.0

    def __post_init__(self) -> None:
        for name in ("least_solidity", "unsure", "doubtful", "rim", "least_contrast", "flat", "least_seen"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} must be within 0–1, not {getattr(self, name)!r}")
        if not 0 <= self.least_um2 < self.greatest_um2:
            raise SettingsError(f"least_um2 must be below greatest_um2, not {self.least_um2!r}")


def label_by_stain(image: NDArray[np.uint8], mpp: float) -> Labels:
    """Nuclei of the classical method on an image (H, W, 3) of any mpp, in that image's pixels: int32 (H, W)."""
    fine = resample_image(image, mpp, STAIN_MPP)
    labels = segment_by_stain(fine, StainSettings(clean_radii=(1,), peak_radius=9))
    return resample_labels(labels, *image.shape[:2])


def believable(labels: Labels, mpp: float, settings: TrustSettings) -> NDArray[np.bool_]:
    """Which labels, 0 … n, are of the size and convexity of a nucleus; the border of the image is allowed to cut."""
    good = np.zeros(int(labels.max(initial=0)) + 1, bool)
    table = measure_regions(labels)
    area = table.area * mpp**2
    cut = (table.bbox[:, 0] == 0) | (table.bbox[:, 1] == 0)
    cut |= (table.bbox[:, 2] == labels.shape[0]) | (table.bbox[:, 3] == labels.shape[1])
    sized = (area <= settings.greatest_um2) & ((area >= settings.least_um2) | cut)
    good[table.label[sized & (table.solidity >= settings.least_solidity)]] = True
    return good


def _expand(labels: Labels, reach: float) -> Labels:
    """Labels grown over the ground by up to ``reach`` pixels; each pixel takes the nearest label."""
    away, nearest = distance_transform_edt(labels == 0, return_indices=True)
    return np.where(away <= reach, labels[tuple(nearest)], 0).astype(np.int32)


def contrast_of(image: NDArray[np.uint8], labels: Labels, mpp: float) -> NDArray[np.float64]:
    """Haematoxylin of labels 0 … n above that of the ground around them, over the median: float64 (n + 1,), [0] is 0.

    A label without ground around it has a contrast of 1.
    """
    stain = gaussian(measure_haematoxylin(image), 0.25 / mpp).ravel()
    around = np.where(labels > 0, 0, _expand(labels, _RING_UM / mpp)).ravel()
    count = int(labels.max(initial=0)) + 1
    sizes, rings = np.bincount(labels.ravel(), minlength=count), np.bincount(around, minlength=count)
    inside = np.bincount(labels.ravel(), stain, count) / np.maximum(sizes, 1)
    above = inside - np.bincount(around, stain, count) / np.maximum(rings, 1)
    known = (rings > 0) & (np.arange(count) > 0)
    usual = float(np.median(above[known])) if known.any() else 0.0
    shares = np.where(known, above / max(usual, 1e-3), 1.0)
    shares[0] = 0
    return np.asarray(shares)


def agree_on_labels(
    image: NDArray[np.uint8],
    stained: Labels,
    maps: Floats,
    mpp: float,
    settings: TrustSettings = TrustSettings(),
) -> tuple[Labels, Floats]:
    """Labels and their trust from the classical method and the student's maps.

    A believable nucleus of the student counts where stain confirms it or the student is sure; elsewhere a believable
    one of the stain counts. Everything else that either takes for nucleus is doubtful.

    Args:
        image: uint8 (H, W, 3).
        stained: int32 (H, W), of the classical method.
        maps: float32 (2, H, W), of the student.
        mpp: micrometres per pixel of both.
        settings: what is believed.

    Returns:
        int32 (H, W), and float32 (H, W) within 0–1.
    """
    seen = split_nuclei(maps, mpp, _SPLIT)
    flat = contrast_of(image, seen, mpp) < settings.least_contrast
    good = believable(seen, mpp, settings) & ~flat
    counts = np.maximum(np.bincount(seen.ravel()), 1)
    confirmed = np.bincount(seen.ravel(), stained.ravel() > 0) / counts
    chance = np.bincount(seen.ravel(), maps[0].ravel()) / counts
    good &= (confirmed > 0.5) | (chance > settings.sure)
    labels = np.where(good[seen], seen, 0).astype(np.int32)
    sizes = np.maximum(np.bincount(stained.ravel()), 1)
    taken = np.bincount(stained.ravel(), labels.ravel() > 0) / sizes
    likely = np.bincount(stained.ravel(), maps[0].ravel()) / sizes
    fits = believable(stained, mpp, settings) & (taken < 0.2) & (likely >= settings.least_seen)
    extra = fits[stained] & (labels == 0)
    labels[extra] = stained[extra] + (int(seen.max(initial=0)) + 1)
    trust = _trust(labels, (seen > 0) | (stained > 0) | (maps[0] > settings.unsure), settings)
    flat[0] = False
    ground = flat[seen] & (labels == 0) & (stained == 0)
    return labels, np.where(ground, np.float32(settings.flat), trust)


def _trust(labels: Labels, claimed: NDArray[np.bool_], settings: TrustSettings) -> Floats:
    """1 within nuclei and on ground that nobody claims, less at outlines and where something else was claimed."""
    mask = labels > 0
    trust = np.where(claimed & ~mask, settings.doubtful, 1.0).astype(np.float32)
    rim = dilate(mask, 1) & ~erode(mask, 1)
    return np.where(rim, np.minimum(trust, settings.rim), trust).astype(np.float32)
