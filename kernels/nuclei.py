"""Nuclei from an attention map: the whole post-processing in one call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels.distance import distance_transform
from wsi_engine.kernels.labels import fill_holes, label, relabel, remove_small
from wsi_engine.kernels.maxima import local_maxima
from wsi_engine.kernels.morphology import close_disk, open_disk
from wsi_engine.kernels.smoothing import gaussian
from wsi_engine.kernels.watersheds import watershed


def nuclei_from_attention(
    attention: NDArray[Any],
    threshold: float = 0.5,
    *,
    clean_radii: tuple[int, ...] = (2, 1),
    sigma: float = 1.0,
    peak_radius: int = 7,
    fill: bool = False,
    min_area: int = 0,
) -> NDArray[np.int32]:
    """Label every nucleus of an attention map.

    The map is cut at ``threshold``, opened and closed by disks of ``clean_radii`` in turn, and split where the smoothed
    distance to the background has several summits: a watershed of its negative, within the mask, from its local maxima.

    Equal to the chain of ``binary_opening``, ``binary_closing``, ``distance_transform_edt``, ``gaussian_filter``,
    ``peak_local_max`` (footprint ``disk(peak_radius)``), ``label`` and ``watershed`` of SciPy and scikit-image 0.26,
    but that distances are kept as float32: summits or slopes that differ by less count as level.

    Args:
        attention: float, integer or bool (H, W); a nucleus is where it is above ``threshold``.
        threshold: in the values of ``attention``.
        clean_radii: radii in pixels of the openings and closings.
        sigma: of the Gaussian that smooths the distance, in pixels.
        peak_radius: two summits closer than this are one, in pixels.
        fill: fill holes of the cleaned mask.
        min_area: nuclei of fewer pixels are left out.

    Returns:
        int32 (H, W): 0 background, nuclei 1 … n in raster order of their summits, without gaps.

    Raises:
        ValueError: ``attention`` is not (H, W), holds NaN, or a setting is out of range.

    Complexity: O(H·W); shared by threads.

    Source: M. Sahasrabudhe et al., "Self-supervised nuclei segmentation in histopathological images using attention",
    MICCAI 2020, section 2.4.
    """
    attention = np.asarray(attention)
    if attention.ndim != 2:
        raise ValueError(f"nuclei_from_attention takes an array of shape (H, W), not {attention.shape}")
    if attention.dtype.kind == "f" and np.isnan(attention).any():
        raise ValueError("nuclei_from_attention needs an attention map without NaN")
    mask: NDArray[np.bool_] = attention > threshold
    for radius in clean_radii:
        mask = close_disk(open_disk(mask, radius), radius)
    if fill:
        mask = fill_holes(mask)
    if not mask.any():
        return np.zeros(mask.shape, np.int32)
    smoothed = gaussian(distance_transform(mask), sigma)
    markers = label(local_maxima(smoothed, peak_radius, mask=mask))
    labels = watershed(-smoothed, markers, mask)
    return relabel(remove_small(labels, min_area)) if min_area > 1 else labels
